"""--submission FILE: the student's file, of any name and in any place; without it the starter is graded.

--seeds N: what is random in a number test is drawn anew N times, and mean and spread are printed.
"""
import contextlib
import os
import pathlib
import statistics
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest

from assignments.fence import fence
from assignments.grading import load


def pytest_addoption(parser):
    parser.addoption("--submission", metavar="FILE", help="the file to grade (default: starter.py)")
    parser.addoption("--seeds", type=int, default=1, metavar="N", help="number tests with seeds 0 .. N-1")


def pytest_configure(config):
    """Refuse a path that is not there, and no seeds, before anything runs."""
    path = config.getoption("--submission")
    if path is not None and not pathlib.Path(path).expanduser().is_file():
        raise pytest.UsageError(f"--submission {path}: no such file; give the Python file that you wrote")
    if config.getoption("--seeds") < 1:
        raise pytest.UsageError(f"--seeds {config.getoption('--seeds')}: must be at least 1; use for example 5")


def pytest_generate_tests(metafunc):
    """With --seeds N every test that takes a seed runs N times."""
    seeds = metafunc.config.getoption("--seeds")
    if seeds > 1 and "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(seeds))


@pytest.fixture
def seed():
    """Without --seeds: 0."""
    return 0


def pytest_terminal_summary(terminalreporter):
    """A line for each name that tests gave to record_property: its value, or mean and standard deviation."""
    reports, found = sum(terminalreporter.stats.values(), []), {}
    for report in reports:
        for name, value in report.user_properties if getattr(report, "when", None) == "call" else ():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        spread = f" ± {statistics.stdev(values):.2g} (n = {len(values)})" if len(values) > 1 else ""
        terminalreporter.write_line(f"{name}: {statistics.mean(values):.4g}{spread}")


@pytest.fixture(scope="module")
def submission(request):
    """The student's module. ASKED: what it must define; FENCED: what it may not call."""
    given = request.config.getoption("--submission")
    path = pathlib.Path(given).expanduser() if given else request.path.parent / "starter.py"
    with contextlib.ExitStack() as stack:
        stack.enter_context(fence(request.module.FENCED))
        yield stack.enter_context(load(path.resolve(), request.module.ASKED))
