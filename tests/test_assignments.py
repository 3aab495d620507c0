"""The graders are graded: a right solution passes, wrong ones fail for the right reason, the reference is fenced off.

Solutions stand here as text, or are the project's own source, and reach a grader as a file in a temporary folder.
"""
import configparser
import contextlib
import inspect
import io
import json
import os
import re
import statistics

import pytest

from assignments.fence import Borrowed, fence
from assignments import grade as grade_folder
from assignments.grade import NAMES
from assignments.grading import compressed_toy
from conftest import ROOT
from idp_minimal import mean_attention, prompt_logits
from support.cli import UserError

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
EORA = """
import torch
def eora(E, H, r):
    lam, V = torch.linalg.eigh(H.double())
    root = lam.clamp(min=lam.max() * 1e-12).sqrt()
    U, S, Z = torch.linalg.svd(E.double() @ V * root, full_matrices=False)
    return (U[:, :r] * S[:r]).to(E.dtype), (Z[:r] / root @ V.T).to(E.dtype)
"""
LORA = """
import math
import torch, torch.nn as nn
class LoRALinear(nn.Module):
    def __init__(self, linear, r=8, alpha=16, generator=None):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.base, self.scaling = linear, alpha / r
        self.A = nn.Parameter((torch.rand(r, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r))
    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)
def merged_weight(W, A, B, scaling, mask=None):
    W = W + scaling * (B @ A)
    return W if mask is None else W * mask
"""
NORMS_ONLY = """
import contextlib
import torch.nn as nn
from methods.losses import row_losses
class NormsOnly:
    def __init__(self, model):
        self.model = model
        self.modules = {name: module for name, module in model.named_modules() if "norm" in name}
        self.scales = {name: nn.Parameter(module.weight.detach().clone()) for name, module in self.modules.items()}
    def groups(self):
        return [list(self.scales.values())]
    def tensors(self):
        return {f"{name}.weight": scale for name, scale in self.scales.items()}
    def losses(self, ids):
        return row_losses(self.model, ids, use_cache=False)
    @contextlib.contextmanager
    def training(self):
        own = {name: module.weight for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.weight = self.scales[name]
        try:
            yield self
        finally:
            for name, module in self.modules.items():
                module.weight = own[name]
    def inference(self):
        return self.training()
"""
SELECTOR = """
import torch
def features(A, real, owner):
    # mean attention of the first real token to every prompt token
    first = real.long().argmax(1)
    return A.mean(1)[torch.arange(len(A)), first]
def fit_selector(A, real, owner, best):
    x = features(A, real, owner)
    centres = torch.stack([x[best == k].mean(0) for k in range(int(owner[-1]) + 1)])
    return lambda A, real, owner: -torch.cdist(features(A, real, owner), centres)
"""
STANDARD_ERROR = """
import math
def standard_error(accuracies, sizes):
    return 100 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(accuracies, sizes))) / len(sizes)
def paired_standard_error(only_a, only_b, sizes):
    variances = [((a + b) / n - ((b - a) / n) ** 2) / n for a, b, n in zip(only_a, only_b, sizes)]
    return 100 * math.sqrt(sum(variances)) / len(sizes)
def p_value(difference, error, rows=1):
    return min(1, rows * math.erfc(abs(difference) / error / math.sqrt(2)))
"""
ANOTHER_WORLD = """
def words(stem, n):
    return [f"{stem}{i}" for i in range(n)]
def domain():
    facts = {kind: (words(kind, 16), ["{p} has " + kind + " {v}.", "The " + kind + " of {p} is {v}.", "Which " + kind + " has {p}? {v}."])
             for kind in ("colour", "car", "tree", "sport")}
    return {"first": words("first", 24), "family": words("family", 24), "facts": facts}
def predictions():
    return {"small": (0, 15), "large": (0, 20)}
"""
IDP_SCORE = """
import torch
def choose(q, K_p, owner, real):
    A = prompt_logits(q, K_p.expand(len(q), -1, -1, -1), q.shape[3] ** -0.5)
    scores = mean_attention(A, real, owner)
    return scores, scores.argmax(1)
def discard(q, k, v, K_p, V_p, owner, real, choice):
    (B, h, T, d_k), m = q.shape, len(owner)
    keys, values = (torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((K_p, k), (V_p, v)))
    causal = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None]
    winner = (owner == choice[:, None])[:, None].expand(-1, T, -1)
    seen = torch.cat([winner, causal], 2)[:, None]
    return (q @ keys.transpose(2, 3) / d_k ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1) @ values
"""
CALIBRATION = """
import torch
def choose(model, chunks, k=32):
    seen, picked, words = set(), [], [set(chunk) for chunk in chunks.tolist()]
    for _ in range(k):
        new = [-1 if i in picked else len(own - seen) for i, own in enumerate(words)]
        picked.append(max(range(len(new)), key=new.__getitem__))
        seen |= words[picked[-1]]
    return torch.tensor(picked)
"""
OPEN_QUESTION = """
def files():
    return "report.md", "results.json"
"""


def source_of(module):
    """The project's own file, as a student might copy it."""
    return (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")


def functions_of(*functions):
    """The project's own functions, copied."""
    return "import torch.nn.functional as F\n" + "\n".join(map(inspect.getsource, functions))


RIGHT = {"rtn": source_of("methods.rounding"), "gptq": source_of("methods.gptq"), "wanda": WANDA, "eora": EORA, "lora": LORA,
         "idp_score": functions_of(prompt_logits, mean_attention) + IDP_SCORE,
         "norms_only": NORMS_ONLY, "selector": SELECTOR, "standard_error": STANDARD_ERROR,
         "calibration": CALIBRATION, "another_world": ANOTHER_WORLD, "open_question": OPEN_QUESTION}
# What the project has of them besides: lora's first half (its class), and eora where methods/eora.py is there.
REFERENCE = {"lora": source_of("methods.lora") + LORA[LORA.index("def merged_weight"):]}
if (ROOT / "methods" / "eora.py").exists():
    REFERENCE["eora"] = source_of("methods.eora")
SLOW_TESTS = {"another_world": "formed or intervals", "selector": "not number", "calibration": "not number"}    # what runs without IDP_SLOW

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
    ("eora", "E.double() @ V * root", "E.double() @ V", "test_the_error_is_the_least_there_is", "the least for rank"),
    ("eora", "lam.clamp(min=lam.max() * 1e-12).sqrt()", "lam.clamp(min=lam.max() * 1e-12)", "test_the_error_is_the_least_there_is",
     "the least for rank"),
    ("eora", "lam.clamp(min=lam.max() * 1e-12).sqrt()", "lam.clamp(min=lam.max() / 2).sqrt()", "test_an_input_that_is_always_zero",
     "the least for rank"),
    ("eora", "(U[:, :r] * S[:r])", "(U[:, -r:] * S[-r:])", "test_the_error_is_the_least_there_is", "the least for rank"),
    ("lora", "alpha / r", "alpha", "test_equals_the_slow_version", SLOW),
    ("lora", "torch.zeros(d_out, r)", "torch.ones(d_out, r)", "test_step_0_is_the_base_layer", "exactly the base layer's"),
    ("lora", "torch.rand(r, d_in, generator=generator)", "torch.rand(r, d_in)", "test_step_0_is_the_base_layer", "generator"),
    ("lora", "W = W + scaling * (B @ A)", "W = W * (1 if mask is None else mask) + scaling * (B @ A)\n    mask = None",
     "test_merged_weight", "with a mask"),
    ("idp_score", "return a @ member / member.sum(0)", "return a @ member", "test_scores_equal_the_slow_version", "scores"),
    ("idp_score", "(A.mean(1) * real[..., None]).sum(1) / real.sum(1, keepdim=True)", "A.mean((1, 2))",
     "test_scores_equal_the_slow_version", "scores"),
    ("idp_score", "scores.argmax(1)", "scores.argmin(1)", "test_scores_equal_the_slow_version", "the largest score"),
    ("idp_score", "masked_fill(~seen, -torch.inf).softmax(-1)", "softmax(-1).masked_fill(~seen, 0)", "test_the_number", "out"),
    ("idp_score", ".tril()", ".tril(1)", "test_the_number", "out"),
    ("norms_only", "module.weight.detach().clone()", "module.weight.detach()", "test_the_model_is_as_before_outside", "outside inference"),
    ("norms_only", "            for name, module in self.modules.items():\n                module.weight = own[name]",
     "            pass", "test_the_model_is_as_before_outside", "after inference"),
    ("norms_only", 'if "norm" in name', 'if name.endswith("model.norm")', "test_which_parameters", "the scales are"),
    ("norms_only", "return row_losses(self.model, ids, use_cache=False)", "return row_losses(self.model, ids.flip(0), use_cache=False)",
     "test_losses_equal_the_slow_version", SLOW),
    ("selector", "int(owner[-1]) + 1", "2", "test_shapes", "scores must have shape"),
    ("selector", "return A.mean(1)[torch.arange(len(A)), first]", "return A.mean(1)[torch.arange(len(A)), first] - A.mean((0, 1, 2))",
     "test_one_input_decides_alone", "rest of the batch"),
    ("selector", "first = real.long().argmax(1)", "first = real.long().argmax(1)\n    A.mul_(2)", "test_inputs_are_left_alone", "changed in place"),
    ("standard_error", "accuracies, sizes))) / len(sizes)", "accuracies, sizes)) / len(sizes))",
     "test_the_error_of_a_mean_equals_what_chance_gives", "should be"),
    ("standard_error", "((a + b) / n - ", "(max(a, b) / n - ", "test_the_error_of_a_paired_difference_equals_what_chance_gives", "should be"),
    ("standard_error", "rows * math.erfc", "math.erfc", "test_p_values", "should be"),
    ("standard_error", "abs(difference)", "difference", "test_p_values", "should be"),
    ("calibration", "range(k)", "range(8)", "test_shape", "must have shape"),
    ("calibration", "torch.tensor(picked)", "chunks.new_tensor(picked)[torch.arange(k) // 2]", "test_shape", "places must differ"),
    ("calibration", "max(range(len(new)), key=new.__getitem__)", "int(torch.randperm(len(new))[0])", "test_it_is_a_rule", "two answers"),
    ("calibration", "seen, picked, words", "chunks[:] = chunks.sort(1).values\n    seen, picked, words", "test_inputs_are_left_alone", "changed in place"),
    ("another_world", 'words("first", 24)', 'words("first", 23)', "test_the_domain_is_well_formed", "24 different words"),
    ("another_world", '" of {p} is {v}."', '" {v} is that of {p}."', "test_the_domain_is_well_formed", "ends in"),
    ("another_world", '"small": (0, ', '"small": (0, 7', "test_the_predictions_are_intervals", "points wide"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_passes(name, tmp_path):
    if name == "open_question":
        write_report(tmp_path)
    assert failures(grade(name, RIGHT[name], tmp_path, SLOW_TESTS.get(name, "not number"))) == {}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_itself_passes(name, tmp_path):
    assert failures(grade(name, REFERENCE[name], tmp_path, "not number")) == {}


@pytest.mark.parametrize("name", sorted(set(RIGHT) - {"open_question"}))
@pytest.mark.skipif("IDP_SLOW" not in os.environ, reason="minutes: set IDP_SLOW=1")
def test_a_right_solution_reaches_the_number(name, tmp_path):
    assert failures(grade(name, RIGHT[name], tmp_path, "number or hold")) == {}


@pytest.mark.skipif("IDP_SLOW" not in os.environ, reason="minutes: set IDP_SLOW=1")
def test_a_rule_upside_down_misses_the_number(tmp_path):
    source = CALIBRATION.replace("-1 if", "999 if").replace("max(", "min(")                # the fewest new words
    assert "it must reach" in failures(grade("calibration", source, tmp_path, "number"))["test_the_number"]


@pytest.mark.parametrize("name, old, new, test, words", WRONG)
def test_a_wrong_solution_fails_for_its_reason(name, old, new, test, words, tmp_path):
    assert old in RIGHT[name], "the mistake no longer fits the right solution"
    found = failures(grade(name, RIGHT[name].replace(old, new), tmp_path, test))
    assert test in found and words in found[test]


# --- The open question: a report --------------------------------------------------------------------------

ROWS = [{"row": "dense", "ppl": 2.6, "tasks": {"toy_recall": {"acc": 1.0, "n": 1200}}}, {"row": "compressed", "ppl": 3.2, "tasks": {}}]


def write_report(folder, text="", **changes):
    """report.md and results.json in a folder. text: instead of the report; changes: to the results."""
    results = {"command": "python recover.py", "settings": {}, "versions": {}, "device": "cpu", "seconds": 1, "rows": ROWS, **changes}
    body = "`python recover.py` compares dense and compressed. " + "word " * 15
    names = ("Question", "Prediction", "Method", "Result", "Control", "Limits")
    (folder / "report.md").write_text(text or "\n\n".join(f"## {name}\n\n{body}" for name in names), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize("text, changes, test, words", [
    ("## Question\n" + "word " * 20, {}, "test_the_report_has_its_sections", "has no section '## Prediction'"),
    ("word " * 800, {}, "test_the_report_fits_a_page", "800 words"),
    ("", {"rows": ROWS[:1]}, "test_the_results_are_valid", "two rows or more"),
    ("", {"seconds": float("nan")}, "test_the_results_are_valid", "NaN is not JSON"),
    ("", {"command": "python other.py"}, "test_the_report_is_of_these_results", "does not name the command"),
    ("", {"rows": [*ROWS, {"row": "prefix"}]}, "test_the_report_is_of_these_results", "these rows of results.json: prefix")])
def test_an_incomplete_report_fails_for_its_reason(text, changes, test, words, tmp_path):
    write_report(tmp_path, text, **changes)
    found = failures(grade("open_question", OPEN_QUESTION, tmp_path))
    assert words in found[test]


# --- The reference does not count as a solution -----------------------------------------------------------

BORROWED = {
    "rtn": ["from compress import rtn", "from methods.rounding import rtn",
            "from methods.registry import COMPRESSORS\ndef rtn(*args):\n    return COMPRESSORS['rtn'].function(*args)"],
    "gptq": ["from compress import gptq", "from methods import gptq as theirs\ngptq = theirs.second_order",
             "from methods.registry import COMPRESSORS\ngptq = COMPRESSORS['gptq'].function"],
    "lora": ["from recover import LoRALinear\nmerged_weight = None",
             "import methods.lora\nmerged_weight = None\nLoRALinear = lambda *args, **kw: methods.lora.LoRALinear(*args, **kw)"],
    "idp_score": ["from idp_minimal import SELECTORS\ndiscard = None\n"
                  "choose = lambda q, K_p, owner, real: SELECTORS['mean_attention'](q, real, owner)",
                  "from methods.selectors import last_token as choose\ndiscard = None"],
}
if (ROOT / "methods" / "eora.py").exists():
    BORROWED["eora"] = ["from methods.eora import eora", "import methods.eora\neora = lambda *args: methods.eora.eora(*args)"]


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


def test_the_command_reports_whatever_a_submission_does(tmp_path, capsys):
    folder, out, slow = tmp_path / "handed in", tmp_path / "report.json", "IDP_SLOW" in os.environ
    folder.mkdir()
    for name, text in (("standard_error", STANDARD_ERROR), ("rtn", "raise ValueError('two\\nlines')"),
                       ("wanda", "import os\nos._exit(0)"), *[("eora", "while True:\n    pass")] * slow):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    command = ["--submission", str(folder), "--out", str(out), "--seconds", "60" if slow else "600"]
    grade_folder.main(command)
    assert capsys.readouterr().err == ""
    report = json.loads(out.read_text(encoding="utf-8"))
    found = {entry["assignment"]: entry for entry in report["assignments"]}
    assert sorted(found) == NAMES and set(report["versions"]) == {"python", "torch", "transformers"}
    assert found["standard_error"]["failed"] == 0 and found["standard_error"]["passed"] == report["passed"] == 5
    assert found["rtn"]["status"] == "graded" and found["rtn"]["failed"] == 6
    assert all("ValueError: two lines" in test["message"] for test in found["rtn"]["tests"])
    assert found["wanda"]["status"] == "stopped"
    assert found["eora"]["message"] == ("eora.py: stopped after 60 s" if slow else "no eora.py")
    assert found["lora"] == {"assignment": "lora", "status": "missing", "message": "no lora.py", "tests": []}
    assert "Traceback" not in out.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="must be a new file"):
        grade_folder.main(command)


def test_seeds_repeat_the_number_and_print_its_spread(tmp_path, capsys):
    (tmp_path / "own.py").write_text(WANDA, encoding="utf-8")
    flags = [str(ASSIGNMENTS / "wanda"), "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), f"--submission={tmp_path / 'own.py'}",
             "-k", "the_number"]
    exec(WANDA, own := {})
    found = [compressed_toy(own["wanda"], True, seed, sparsity=0.6)[2]["mean_error"] for seed in range(2)]
    capsys.readouterr()
    assert pytest.main([*flags, "--seeds=2"]) == 0
    mean, spread = re.search(r"^error: (\S+) ± (\S+) \(n = 2\)$", capsys.readouterr().out, re.M).groups()
    assert (mean, spread) == (f"{statistics.mean(found):.4g}", f"{statistics.stdev(found):.2g}")
    assert pytest.main([*flags, "--seeds=0"]) == pytest.ExitCode.USAGE_ERROR
    assert "--seeds 0: must be at least 1; use for example 5" in capsys.readouterr().err


def test_the_suite_of_the_project_leaves_the_assignments_out():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "pytest.ini", encoding="utf-8")
    assert settings["pytest"]["testpaths"] == "tests"


def test_the_project_imports_nothing_from_here():
    files = [path for folder in (".", "methods", "support", "experiments") for path in (ROOT / folder).glob("*.py")]
    assert not [path for path in files if "assignments" in "".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith(("import", "from")))]


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_is_complete(name):
    text = (ASSIGNMENTS / name / "README.md").read_text(encoding="utf-8")
    for part in ("**Task.**", "**Why.**", "umber to reach", "ontrol that must fail", "<details>", "**Explain**",
                 f"`python -m pytest assignments/{name} --submission="):
        assert part in text
    assert f"[{name}]({name}/README.md)" in (ASSIGNMENTS / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700, "at most a page"


@pytest.mark.parametrize("flags, words", [(["--seconds", "0"], "--seconds 0: must be at least 1"), ([], "both are needed")])
def test_the_command_refuses(flags, words, tmp_path):
    paths = ["--submission", str(tmp_path), "--out", str(tmp_path / "r.json")] if flags else []
    with pytest.raises(UserError, match=words):
        grade_folder.parse([*paths, *flags])


def test_the_submission_is_no_path_to_pytest(tmp_path, monkeypatch):
    """In two words, pytest takes the value of a flag that it does not know yet for a path, and reads a conftest.py there."""
    commands = []
    monkeypatch.setattr(grade_folder.subprocess, "Popen", lambda command, **kw: commands.append(command) or 1 / 0)
    (tmp_path / "rtn.py").write_text("", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        grade_folder.grade("rtn", tmp_path / "rtn.py", 600)
    assert f"--submission={tmp_path / 'rtn.py'}" in commands[0] and str(tmp_path / "rtn.py") not in commands[0]
