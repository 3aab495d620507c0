"""Grade a folder of submissions: every assignment, one JSON report.

    python -m assignments.grade --submission DIR --out report.json     # DIR holds rtn.py, gptq.py, ...

A file that is not there is "missing". Whatever a submission does (a mistake, sys.exit, no end) is one line of
the report. Each file runs as a process of its own, with your rights: grade only what you would run.
"""
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

from support.architectures import versions
from support.cli import UserError, parse_flags, run
from support.files import user_path
from support.output import json_text

HERE = pathlib.Path(__file__).resolve().parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/test_*.py"))


def line_of(case):
    """What one test came to, in one line. case: an element of pytest's XML."""
    trouble = next((part for part in case if part.tag in ("failure", "error")), None)
    if trouble is None:
        return {"test": case.get("name"), "passed": True}
    words = " ".join((trouble.get("message") or "failed").split())
    for before in ("failed on setup with ", "Failed: "):
        words = words.strip('"').removeprefix(before)
    return {"test": case.get("name"), "passed": False, "message": words[:500].strip('"')}


def wait(process, seconds):
    """Let it run that long, then end it and what it started. -> whether it ended by itself."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def grade(name, path, seconds):
    """Run one grader on one file. -> its part of the report."""
    if not path.is_file():
        return {"assignment": name, "status": "missing", "message": f"no {path.name}", "tests": []}
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        xml = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}",
                   str(HERE / name), f"--submission={path}"]
        process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        ended = wait(process, seconds)
        tests = [line_of(case) for case in ElementTree.parse(xml).iter("testcase")] if xml.exists() else []
    passed = sum(test["passed"] for test in tests)
    result = {"assignment": name, "status": "graded", "passed": passed, "failed": len(tests) - passed,
              "seconds": round(time.time() - start, 1), "tests": tests}
    if not tests:
        why = "the process ended before the tests did" if ended else f"stopped after {seconds} s"
        result.update(status="stopped", message=f"{path.name}: {why}")
    return result


def parse(argv=None):
    """The command line. -> argparse.Namespace. Raises UserError."""
    def add(parser):
        """What only this script has."""
        parser.add_argument("--submission", metavar="DIR", help="folder with NAME.py files")
        parser.add_argument("--out", metavar="FILE", help="the report, a new JSON file")
        parser.add_argument("--seconds", type=int, metavar="N", help="the longest one grader may run (600)")

    args = parse_flags(__doc__, [], argv, {}, add=add)
    if args.submission is None or args.out is None:
        raise UserError("--submission DIR and --out report.json: both are needed")
    args.seconds = 600 if args.seconds is None else args.seconds
    if args.seconds < 1:
        raise UserError(f"--seconds {args.seconds}: must be at least 1; use for example 600")
    args.submission = user_path(args.submission, "--submission")
    if not args.submission.is_dir():
        raise UserError(f"--submission {args.submission}: no such folder; give one that holds rtn.py and "
                        "so on")
    args.out = user_path(args.out, "--out")
    if args.out.exists() or not args.out.resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: must be a new file in a folder that is there")
    return args


def main(argv=None):
    """Grade all, write the report, print a line each."""
    args, results = parse(argv), []
    for name in NAMES:
        results.append(grade(name, args.submission.resolve() / f"{name}.py", args.seconds))
        counts = f"{results[-1].get('passed', 0)} passed, {results[-1].get('failed', 0)} failed"
        print(f"{name}: {results[-1]['status']}, {counts}", flush=True)
    report = {"submission": str(args.submission), "versions": versions(), "assignments": results,
              "passed": sum(result.get("passed", 0) for result in results),
              "failed": sum(result.get("failed", 0) for result in results)}
    with open(args.out, "x", encoding="utf-8") as file:    # x: never over a file that is there
        file.write(json_text(report))


if __name__ == "__main__":
    run(main)
