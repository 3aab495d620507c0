"""The grader of standard_error."""
import math

import torch

from assignments.grading import must

ASKED = ["standard_error", "paired_standard_error", "p_value"]
FENCED = ["support.uncertainty"]
# ARC-e, ARC-c, SciQ, WebQS, TriviaQA, PIQA, HellaSwag, LAMBADA, WinoGrande: questions in the usual test sets
SIZES = [2376, 1172, 1000, 2032, 17944, 1838, 10042, 5153, 1267]
# of a model of 7 billion parameters, made up for the exercise; their mean is the paper's, about 57.5 %
ACCURACIES = [0.67, 0.38, 0.93, 0.12, 0.40, 0.77, 0.54, 0.70, 0.66]
CHANGED = 0.08                                             # share of questions whose answer a remedy turns over
ERROR, PAIRED, P = 0.3070, 0.2096, 0.0775                  # what comes out for these


def check_number(value, right, what, tolerance):
    """A float within a share `tolerance` of the right one."""
    must(isinstance(value, (int, float)) and math.isfinite(value), f"{what} must be a finite float, got {value!r}")
    must(abs(value - right) <= tolerance * abs(right), f"{what} is {value:.4f}, should be {right:.4f}")


def draw(probabilities, n, draws, seed):
    """How many of n questions each of several outcomes gets. probabilities (k,) -> (draws, k)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.multinomial(torch.tensor(probabilities), draws * n, True, generator=generator).view(draws, n)
    return torch.stack([(picks == k).sum(1) for k in range(len(probabilities))], 1)


def test_the_error_of_a_mean_equals_what_chance_gives(submission):
    """The slow version: sit the exam 4,000 times."""
    accuracies, sizes = [0.9, 0.3, 0.55], [50, 200, 80]
    means = sum(draw([p, 1 - p], n, 4000, n)[:, 0] / n for p, n in zip(accuracies, sizes)) / 3
    right = 100 * means.std().item()
    check_number(submission.standard_error(accuracies, sizes), right, "standard_error (4,000 exams)", 0.06)


def test_the_error_of_a_paired_difference_equals_what_chance_gives(submission):
    only_a, only_b, sizes = [10, 30], [30, 40], [100, 200]
    counts = [draw([a / n, b / n, 1 - (a + b) / n], n, 4000, n) for a, b, n in zip(only_a, only_b, sizes)]
    means = sum((c[:, 1] - c[:, 0]) / n for c, n in zip(counts, sizes)) / 2
    value = submission.paired_standard_error(only_a, only_b, sizes)
    check_number(value, 100 * means.std().item(), "paired_standard_error (4,000 exams)", 0.06)


def test_p_values(submission):
    for difference, error, rows, right in ((1.959964, 1, 1, 0.05), (-1.959964, 1, 1, 0.05), (0, 1, 1, 1),
                                           (1.959964, 1, 4, 0.2), (0.1, 1, 9, 1), (0.62, 0.31, 1, 0.0455)):
        check_number(submission.p_value(difference, error, rows), right,
                     f"p_value({difference}, {error}, {rows})", 1e-3)


def test_inputs_are_left_alone(submission):
    accuracies, sizes = [0.5, 0.7], [10, 20]
    submission.standard_error(accuracies, sizes)
    submission.paired_standard_error([1, 2], [3, 4], sizes)
    must((accuracies, sizes) == ([0.5, 0.7], [10, 20]), "an input list was changed in place")


def test_the_number(submission):
    """The paper's nine tasks. Control: nine accuracies taken for nine measurements of one thing."""
    check_number(submission.standard_error(ACCURACIES, SIZES), ERROR, "standard_error of nine tasks", 0.005)
    turned = [CHANGED * n / 2 for n in SIZES]
    paired = submission.paired_standard_error(turned, turned, SIZES)
    check_number(paired, PAIRED, "paired_standard_error of nine tasks", 0.005)
    check_number(submission.p_value(0.37, paired), P, "p of +0.37", 0.02)
    control = 100 * torch.tensor(ACCURACIES).std().item() / 3
    must(control > 10 * ERROR, f"the control gives {control:.2f}: this case would not show the mistake")
