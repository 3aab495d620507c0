"""The grader of open_question: that the report is complete. What it is worth, a teacher says (README.md)."""
import json
import math
import pathlib
import re

from assignments.grading import fail, must

ASKED, FENCED = ["files"], []
SECTIONS = ["Question", "Prediction", "Method", "Result", "Control", "Limits"]
SHORTEST, LONGEST = 15, 700                                # words of a section, of the report
KEYS = ["command", "settings", "versions", "device", "seconds", "rows"]


def read(submission, which):
    """The text of report.md (0) or results.json (1)."""
    paths = submission.files()
    must(isinstance(paths, (tuple, list)) and len(paths) == 2, "files() must give back two paths, (report.md, results.json)")
    path = pathlib.Path(submission.__file__).parent / paths[which]
    must(path.is_file(), f"files() names {path}, which is not there")
    return path.read_text(encoding="utf-8")


def no_constant(name):
    """JSON has no NaN."""
    fail(f"results.json: {name} is not JSON; write null, or leave the row out")


def results(submission):
    """results.json, parsed."""
    try:
        found = json.loads(read(submission, 1), parse_constant=no_constant)
    except ValueError as error:
        found = fail(f"results.json cannot be read: {error}")
    must(isinstance(found, dict), "results.json must be an object with the keys " + ", ".join(KEYS))
    return found


def sections(text):
    """{heading: words below it} of the lines that begin with ##."""
    parts = re.split(r"^##[ \t]+(.+?)[ \t]*$", text, flags=re.M)
    return {heading: body.split() for heading, body in zip(parts[1::2], parts[2::2])}


def test_the_report_has_its_sections(submission):
    found = sections(read(submission, 0))
    for name in SECTIONS:
        must(name in found, f"report.md: has no section '## {name}'; it needs {', '.join(SECTIONS)}")
        must(len(found[name]) >= SHORTEST, f"report.md: '## {name}' has {len(found[name])} words; write at least {SHORTEST}")


def test_the_report_fits_a_page(submission):
    words = len(read(submission, 0).split())
    must(words <= LONGEST, f"report.md: has {words} words; one page is at most {LONGEST}")


def test_the_results_are_valid(submission):
    found = results(submission)
    missing = [key for key in KEYS if key not in found]
    must(not missing, f"results.json: has no {', '.join(missing)}; recover.py --out writes all of {', '.join(KEYS)}")
    must(isinstance(found["rows"], list) and len(found["rows"]) >= 2, "results.json: rows must hold two rows or more")
    for row in found["rows"]:
        must(isinstance(row, dict) and isinstance(row.get("row"), str), f"results.json: a row has no name: {str(row)[:60]}")
        ppl = row.get("ppl", 1.0)
        must(isinstance(ppl, (int, float)) and math.isfinite(ppl) and ppl >= 1,
             f"results.json: ppl of {row['row']} is {ppl!r}; it must be a number of at least 1")
        for task, score in row.get("tasks", {}).items():
            must(isinstance(score.get("acc"), (int, float)) and 0 <= score["acc"] <= 1,
                 f"results.json: acc of {task} in {row['row']} must be a share from 0 to 1, got {score.get('acc')!r}")
            must(isinstance(score.get("n"), int) and score["n"] >= 1, f"results.json: {task} in {row['row']} has no n")


def test_the_report_is_of_these_results(submission):
    """The command that makes them, and every row's name, stand in the report."""
    text, found = read(submission, 0), results(submission)
    must(str(found.get("command")) in text, f"report.md: does not name the command of results.json: {found.get('command')}")
    absent = [row["row"] for row in found["rows"] if row["row"] not in text]
    must(not absent, f"report.md: does not speak of these rows of results.json: {', '.join(absent)}")
