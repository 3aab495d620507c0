"""The grader of selector."""
import functools

import pytest
import torch

import recover
from assignments.grading import check_tensor, compressed_toy, must, numbers, unchanged
from experiments.choosing import PLANTED_LR, READING, AnswerPrompts, planted_rows
from idp_minimal import PromptBank, attach_idp, mean_attention
from methods.pruning import magnitude
from support.data import encode

ASKED, FENCED = ["fit_selector"], []
REACH, STEPS = 95.0, 60                                    # % of held-out people's questions with their own prompt


@functools.cache
def planted(seed):
    """The planted case: prompt 0 learns the answers after one trigger, prompt 1 after the other.

    -> (A, real, owner, best) of shown people's questions, and of held-out people's. n is 240 each.
    """
    model, tokenizer, _ = compressed_toy(lambda W: magnitude(W, 0.6), False)
    answered = [torch.tensor([encode(tokenizer, f"{row['context']} {row['choices'][row['answer']]}")
                              for row in rows]) for rows in planted_rows("toy_shown")]

    def sample(ids, step, batch_size, seqlen, seed):
        """-> (B, T): row b is of trigger b % 2."""
        at = recover.batch_at(torch.arange(len(answered[0])), step, batch_size // 2, 1, seed)[:, 0]
        return torch.stack([rows[at] for rows in answered], dim=1).flatten(0, 1)

    method = AnswerPrompts(model, [8, 8], seed=seed)
    recover.train(method, answered[0].flatten(), STEPS, 16, answered[0].shape[1], PLANTED_LR, sample=sample,
                  quiet=True)
    bank = PromptBank.from_prompts(model, [P.detach() for P in method.prompts])
    return [attention(model, tokenizer, bank, planted_rows(task)) for task in ("toy_shown", "toy_recall")]


@torch.no_grad()
def attention(model, tokenizer, bank, by_trigger):
    """What the first layer sees of every question. by_trigger: rows of each trigger. -> A, real, owner, best."""
    rows, seen = [row for rows in by_trigger for row in rows], []

    def note(A, real, owner):
        """A selector that keeps what it was given."""
        seen[:] = [A, real, owner]
        return mean_attention(A, real, owner)

    ids = torch.tensor([encode(tokenizer, row["context"]) for row in rows])                # (n, T)
    with attach_idp(model, bank, note, **READING):
        model(ids, logits_to_keep=1)
    return *seen, torch.tensor([row["answer"] for row in rows])


def share(selector, case):
    """Percent of a case's inputs that get their own prompt."""
    A, real, owner, best = case
    return 100 * (selector(A, real, owner).argmax(1) == best).float().mean().item()


@pytest.fixture(scope="module")
def small(submission):
    """A case of random numbers, with unequal prompts and padding on the left. -> A, real, owner, best."""
    A, real = numbers(0, 12, 2, 5, 7).softmax(-1), torch.ones(12, 5).bool()
    real[::3, :2] = False
    return A, real, torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.arange(12) % 3


def test_shapes(submission, small):
    selector = submission.fit_selector(*small)
    must(callable(selector), f"fit_selector must give back a function, got {type(selector).__name__}")
    check_tensor(selector(*small[:3]), (12, 3), "scores")
    A, real, owner, _ = small
    check_tensor(selector(A[:5], real[:5], owner), (5, 3), "scores of five other inputs")


def test_one_input_decides_alone(submission, small):
    """What a row gets may not depend on which others are asked with it."""
    A, real, owner, best = small
    selector = submission.fit_selector(A, real, owner, best)
    together, alone = selector(A, real, owner), selector(A[3:4], real[3:4], owner)
    must(torch.allclose(together[3:4], alone, atol=1e-5), "an input's scores change with the rest of the batch")


def test_inputs_are_left_alone(submission, small):
    A, real, owner, best = small
    with unchanged(A=A, real=real, owner=owner, best=best):
        submission.fit_selector(A, real, owner, best)(A, real, owner)


def test_the_number(submission, seed, record_property):
    """On held-out people. Control: the paper's rule, mean attention."""
    shown, heldout = planted(seed)
    reached, control = share(submission.fit_selector(*shown), heldout), share(mean_attention, heldout)
    record_property("own prompt %", reached)
    record_property("own prompt %, mean attention", control)
    must(reached >= REACH, f"{reached:.1f} % of the questions get their own prompt; it must be {REACH} %")
    must(control < REACH, f"mean attention reaches {control:.1f} % too: this case shows nothing")
