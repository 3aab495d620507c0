"""The graders are graded: a right solution passes, wrong ones fail for the right reason, the reference is fenced off.

Solutions stand here as text, or are the project's own source, and reach a grader as a file in a temporary folder.
"""
import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from assignments.fence import Borrowed, fence
from assignments.grade import NAMES
from conftest import ROOT

ASSIGNMENTS = ROOT / "assignments"


class Recorder:
    """A pytest plugin that notes what each test came to: {test: message, or None when it passed}."""

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.outcomes[report.nodeid.split("::")[-1]] = str(report.longrepr)
        elif report.when == "call":
            self.outcomes[report.nodeid.split("::")[-1]] = None


def grade(name, source, folder, tests=""):
    """Run a grader within this process. source: the submission's text. -> {test: message or None}."""
    path, recorder = folder / "my file.py", Recorder()
    path.write_text(source, encoding="utf-8")
    only = ["-k", tests] if tests else []
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([str(ASSIGNMENTS / name), "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
                     "--submission", str(path), *only], plugins=[recorder])
    assert recorder.outcomes, "no test ran"
    return recorder.outcomes


def failures(outcomes):
    """Messages of the tests that failed."""
    return {test: message for test, message in outcomes.items() if message is not None}


# --- Right solutions ------------------------------------------------------------------------------------

WANDA = """
import torch
def wanda(W, H, sparsity=0.5):
    score = W.abs().float() * H.diagonal().sqrt()
    return W.scatter(1, torch.argsort(score, dim=1, stable=True)[:, :round(sparsity * W.shape[1])], 0)
"""


def source_of(module):
    """The project's own file, as a student might copy it."""
    return (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")


RIGHT = {"rtn": source_of("methods.rounding"), "gptq": source_of("methods.gptq"), "wanda": WANDA}

# --- Wrong ones: (assignment, what of the right solution becomes what, which test fails, with which words)
SLOW = "differs from the slow version"
WRONG = [
    ("rtn", "split(width, dim=1)", "split(width + 1, dim=1)", "test_equals_the_slow_version", SLOW),
    ("rtn", "(-low / scale)", "(low / scale)", "test_equals_the_slow_version", SLOW),
    ("rtn", "scale, zero = fit_grid(w,", "scale, zero = fit_grid(w[-1:].expand_as(w),", "test_a_row_decides_its_own_grid", SLOW),
    ("rtn", "return W if W.dtype == torch.float64 else W.float()", "return W.mul_(0.9)", "test_W_is_left_alone", "changed in place"),
    ("gptq", "W[i + 1:end].addr_(U[i, i + 1:end], error, alpha=-1)", "W[i + 1:end].addr_(U[i, i + 1:end], error)",
     "test_equals_the_slow_version", SLOW),
    ("gptq", "self.W[i:i + self.group]", "self.W[i + 1:i + 1 + self.group]", "test_equals_the_slow_version", SLOW),
    ("gptq", "add_(damp * mean)", "add_(damp)", "test_damping_counts", SLOW),
    ("gptq", "            W[i] = q\n", "", "test_on_the_grid", "different values"),
    ("wanda", "dim=1, stable=True)[:, :round(sparsity * W.shape[1])]", "dim=0, stable=True)[:, :round(sparsity * W.shape[1])]",
     "test_equals_the_slow_version", SLOW),
    ("wanda", "stable=True)", "stable=True, descending=True)", "test_equals_the_slow_version", SLOW),
    ("wanda", ".sqrt()", "", "test_equals_the_slow_version", SLOW),
    ("wanda", "torch.argsort(score, dim=1", "torch.argsort(score.mean(1, keepdim=True) * score, dim=0",
     "test_every_row_has_the_same_number_of_zeros", "zeros"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(name, tmp_path):
    assert failures(grade(name, RIGHT[name], tmp_path, "not number")) == {}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.skipif("IDP_SLOW" not in os.environ, reason="minutes: set IDP_SLOW=1")
def test_a_right_solution_reaches_the_number(name, tmp_path):
    assert failures(grade(name, RIGHT[name], tmp_path, "number")) == {}


@pytest.mark.parametrize("name, old, new, test, words", WRONG)
def test_a_wrong_solution_fails_for_its_reason(name, old, new, test, words, tmp_path):
    assert old in RIGHT[name], "the mistake no longer fits the right solution"
    found = failures(grade(name, RIGHT[name].replace(old, new), tmp_path, test))
    assert test in found and words in found[test]


# --- The reference does not count as a solution -----------------------------------------------------------

BORROWED = {
    "rtn": ["from compress import rtn", "from methods.rounding import rtn",
            "from methods.registry import COMPRESSORS\ndef rtn(*args):\n    return COMPRESSORS['rtn'].function(*args)"],
    "gptq": ["from compress import gptq", "from methods import gptq as theirs\ngptq = theirs.second_order",
             "from methods.registry import COMPRESSORS\ngptq = COMPRESSORS['gptq'].function"],
}


@pytest.mark.parametrize("name, source", [(name, source) for name in BORROWED for source in BORROWED[name]])
def test_importing_the_reference_is_no_solution(name, source, tmp_path):
    outcomes = grade(name, source, tmp_path, "shape")
    assert outcomes and all("is the project's own solution" in (message or "") for message in outcomes.values())


def test_the_fence_is_taken_down_again():
    import compress
    from methods.registry import COMPRESSORS
    before = compress.gptq, dict(COMPRESSORS)
    with fence(["methods.gptq"]):
        for function in (compress.gptq, COMPRESSORS["gptq"].function, COMPRESSORS["sparsegpt_gptq"].function):
            with pytest.raises(Borrowed):
                function()
    assert (compress.gptq, COMPRESSORS) == before


# --- The starters, the command, the folder ----------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_the_starter_fails_with_not_implemented(name, tmp_path):
    outcomes = grade(name, (ASSIGNMENTS / name / "starter.py").read_text(encoding="utf-8"), tmp_path)
    assert all("NotImplementedError" in (message or "passed") for message in outcomes.values())


@pytest.mark.parametrize("source, words", [("x = 1", "has no rtn; keep the starter's names"),
                                           ("def rtn(:", "line 1: cannot be imported: SyntaxError"),
                                           ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3")])
def test_a_file_that_cannot_be_graded_is_one_message(source, words, tmp_path):
    for message in grade("rtn", source, tmp_path).values():
        assert words in message and "Traceback" not in message and "\n" not in message.strip()
