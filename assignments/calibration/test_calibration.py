"""The grader of calibration."""
import pytest
import torch

import compress
from assignments.grading import check_tensor, must, recall, unchanged
from support import toy_world
from support.data import encode
from support.models import load_model

ASKED, FENCED = ["choose"], []
COMMON, RARE, FEW, POOLS = 480, 32, 32, 5                  # chunks of 64 tokens: harbour people, crews, chosen
REACH = 38.0                                               # % recall of the toy at 2 bits, mean over the pools


def pool(tokenizer, seed):
    """A lopsided pool of text: 480 chunks about harbour people, 32 about crews, shuffled. -> (512, 64)."""
    parts = []
    for i, (domain, count) in enumerate((("harbour", COMMON), ("orbit", RARE))):
        ids = torch.tensor(encode(tokenizer, " ".join(toy_world.text("shown", domain=domain))))        # (tokens,)
        parts.append(compress.calibration_ids(ids, count, 64, 2 * seed + i))
    order = torch.randperm(COMMON + RARE, generator=torch.Generator().manual_seed(seed))
    return torch.cat(parts)[order]


@pytest.fixture(scope="module")
def dense():
    """The dense toy and a small pool. -> model, chunks (40, 64)."""
    model, tokenizer = load_model("toy")
    return model, pool(tokenizer, 0)[:40]


def check_choice(picked, n, k):
    """k different places in 0 .. n-1. -> picked."""
    check_tensor(picked, (k,), f"the choice of {k} of {n}")
    must(picked.dtype == torch.long, f"the choice must be of dtype long, got {picked.dtype}")
    places = picked.tolist()
    must(0 <= min(places) and max(places) < n, f"places must lie in 0 .. {n - 1}, got {places}")
    must(len(set(places)) == k, f"the {k} places must differ, got {sorted(places)}")
    return picked


def test_shape(submission, dense):
    model, chunks = dense
    for n, k in ((40, 8), (40, 1), (9, 9)):
        check_choice(submission.choose(model, chunks[:n], k), n, k)


def test_it_is_a_rule(submission, dense):
    """Not luck: asked twice, it answers the same."""
    first, second = (submission.choose(*dense, 8).tolist() for _ in range(2))
    must(first == second, f"the same chunks, two answers: {first} and {second}")


def test_inputs_are_left_alone(submission, dense):
    model, chunks = dense
    with unchanged(chunks=chunks, **{name: p.detach() for name, p in model.named_parameters()}):
        submission.choose(model, chunks, 8)


def kept(choose, seed):
    """% recall after GPTQ at 2 bits, calibrated on what is chosen; the mean over five pools."""
    recalls = []
    for number in range(POOLS * seed, POOLS * (seed + 1)):
        model, tokenizer = load_model("toy")
        chunks = pool(tokenizer, number)
        picked = check_choice(choose(model, chunks, FEW), len(chunks), FEW)
        compress.compress_model(model, tokenizer, "gptq", chunks[picked], bits=2)
        recalls.append(recall(model, tokenizer))
    return sum(recalls) / POOLS


def test_the_number(submission, seed, record_property):
    """Five pools. Control: the first 32 chunks of each, which is as good as drawing them."""
    reached, control = kept(submission.choose, seed), kept(lambda model, chunks, k: torch.arange(k), seed)
    record_property("toy_recall %", reached)
    record_property("toy_recall %, the first 32", control)
    must(reached >= REACH, f"toy_recall is {reached:.1f} %, a mean over {POOLS} pools; it must reach {REACH} %")
    must(control < REACH, f"the first {FEW} chunks have {control:.1f} % too: this case shows nothing")
