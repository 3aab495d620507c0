"""The grader of another_world."""
import contextlib
import functools
import re

import torch
from unittest import mock

import compress
from assignments.grading import must, recall
from experiments import toy_model
from support import toy_world

ASKED, FENCED = ["domain", "predictions"], []
LOADS, STEPS, WIDEST = {"small": 10, "large": 40}, 800, 25
REACH, CHANCE = 90.0, 20.0                                 # % recall: known people at least, unknown at most


@contextlib.contextmanager
def world(words):
    """Within the block toy_world is the student's world."""
    with mock.patch.multiple(toy_world, WORLD={"own": words}, DOMAINS=("own",), UNKNOWN=20):
        yield


def measure(words, people):
    """Train a small model on the world, prune it. -> {"dense", "pruned", "unknown": % recall}."""
    with world(words):
        tokenizer = toy_model.build_tokenizer()
        model, tasks = toy_model.build_model(len(tokenizer), 64, layers=2), toy_world.tasks(count=people)
        toy_model.train(model, tokenizer, STEPS, batch_size=8, lr=5e-3, count=people)
        rows = tasks["toy_recall"] + tasks["toy_shown"]
        result = {"dense": recall(model, tokenizer, rows), "unknown": recall(model, tokenizer, tasks["toy_unknown"])}
        ids = torch.tensor(tokenizer(" ".join(toy_world.text("train", count=people)))["input_ids"])
        calibration = compress.calibration_ids(ids, 4, 64, 0)
        compress.compress_model(model, tokenizer, "magnitude", calibration, sparsity=0.6)
        return {**result, "pruned": recall(model, tokenizer, rows)}


@functools.cache
def measured(domain):
    """Both worlds, once for all tests. domain: the student's function."""
    return {load: measure(domain(), people) for load, people in LOADS.items()}


def old_words():
    """Every name and value of the toy's own world."""
    return {word for part in toy_world.WORLD.values() for word in
            [*part["first"], *part["family"], *(v for values, _ in part["facts"].values() for v in values)]}


def check_words(words, count, what):
    """So many different words, each one token, none of them old."""
    must(len(words) == count == len(set(words)), f"{what}: must be {count} different words, got {len(set(words))}")
    odd = [word for word in words if not re.fullmatch(r"\w+", word)]
    must(not odd, f"{what}: each must be one word of letters and digits, not {odd[:3]}")
    must(not old_words() & set(words), f"{what}: {sorted(old_words() & set(words))[:3]} are in the toy's world already")


def test_the_domain_is_well_formed(submission):
    words = submission.domain()
    must(isinstance(words, dict) and sorted(words) == ["facts", "family", "first"],
         "domain() must be a dict with the keys first, family, facts")
    check_words(words["first"], 24, "first")
    check_words(words["family"], 24, "family")
    must(len(words["facts"]) >= 3, f"facts: 3 attributes or more, got {len(words['facts'])}")
    for kind, (values, phrasings) in words["facts"].items():
        check_words(values, 16, kind)
        must(len(phrasings) >= 2, f"{kind}: 2 phrasings or more, got {len(phrasings)}")
        for phrasing in phrasings:
            must("{p}" in phrasing and re.search(r"\{v\}\W*$", phrasing),
                 f"{kind}: a phrasing holds {{p}} and ends in {{v}} (and a stop): {phrasing!r}")
        must("?" in phrasings[-1], f"{kind}: the last phrasing must be a question, got {phrasings[-1]!r}")


def test_the_predictions_are_intervals(submission):
    expected = submission.predictions()
    must(sorted(expected) == ["large", "small"], f"predictions() must have the keys small and large, got {sorted(expected)}")
    for load, (low, high) in expected.items():
        must(0 <= low < high <= 100 and high - low <= WIDEST,
             f"{load}: ({low}, {high}) must lie in 0 .. 100 and be at most {WIDEST} points wide")


def test_the_predictions_hold(submission):
    expected = submission.predictions()
    for load, result in measured(submission.domain).items():
        lost, (low, high) = result["dense"] - result["pruned"], expected[load]
        must(low <= lost <= high, f"{load}: pruning takes {lost:.1f} points, you expected {low} to {high}. Do not just move "
                                  "the interval: say in your answer what you had overlooked")


def test_the_number(submission, record_property):
    """Known people are known. Control: people in no text are not."""
    for load, result in measured(submission.domain).items():
        for people, value in result.items():
            record_property(f"recall %, {load} world, {people}", value)
        must(result["dense"] >= REACH, f"{load}: before pruning recall is {result['dense']:.1f} %; it must reach {REACH} %")
        must(result["unknown"] <= CHANCE, f"{load}: people in no text are known to {result['unknown']:.1f} %: your phrasings "
                                          "or names give answers away")
