"""--submission FILE: the student's file, of any name and in any place; without it the starter is graded."""
import contextlib
import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest

from assignments.fence import fence
from assignments.grading import load


def pytest_addoption(parser):
    parser.addoption("--submission", metavar="FILE", help="the file to grade (default: starter.py)")


def pytest_configure(config):
    """Refuse a path that is not there before anything runs."""
    path = config.getoption("--submission")
    if path is not None and not pathlib.Path(path).expanduser().is_file():
        raise pytest.UsageError(f"--submission {path}: no such file; give the Python file that you wrote")


@pytest.fixture(scope="module")
def submission(request):
    """The student's module. ASKED: what it must define; FENCED: what it may not call."""
    given = request.config.getoption("--submission")
    path = pathlib.Path(given).expanduser() if given else request.path.parent / "starter.py"
    with contextlib.ExitStack() as stack:
        stack.enter_context(fence(request.module.FENCED))
        yield stack.enter_context(load(path.resolve(), request.module.ASKED))
