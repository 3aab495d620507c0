"""The tutorial runs, and shows what comes out: tests/tutorial_runner.py does it, and is itself tested here."""
import pathlib
import re
import textwrap

import pytest

from conftest import ROOT
from tutorial_runner import check_page, copy_project, is_marked, report, run_page

TUTORIAL = (ROOT / "tutorial.md").read_text(encoding="utf-8")


@pytest.mark.tutorial
def test_the_tutorial_runs(tmp_path):
    """Minutes; only when asked for: python -m pytest -m tutorial -s."""
    assert is_marked(TUTORIAL), "tutorial.md does not say <!-- runs --> in its first lines"
    copy_project(tmp_path)
    wrong = run_page(TUTORIAL, tmp_path)
    assert not wrong, "\n" + report(wrong, "tutorial.md")


def test_the_tutorial_says_where_its_numbers_come_from():
    assert not is_marked(TUTORIAL) or not check_page(TUTORIAL), report(check_page(TUTORIAL), "tutorial.md")


def test_a_notebook_runs_what_the_test_runs():
    """jupytext makes text of ```bash .noeval, and cells of the others: Python by the header, bash by %%bash."""
    assert TUTORIAL.startswith("<!-- runs -->\n<!--\n---\njupyter:\n  kernelspec: {") and ", language: python, " in TUTORIAL[:120]
    assert TUTORIAL.count("<!-- parsed only") == len(re.findall(r"<!-- parsed only.*\n```bash .noeval\n", TUTORIAL)) == TUTORIAL.count(".noeval")


def test_a_copy_holds_the_project_and_nothing_made_by_runs(tmp_path):
    copy_project(tmp_path)
    assert (tmp_path / "recover.py").read_bytes() == (ROOT / "recover.py").read_bytes()
    assert (tmp_path / "toy_model/model.safetensors").exists() and (tmp_path / "results/README.md").exists()
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("__pycache__"))


# --- The runner, on small pages -------------------------------------------------------------------------------------------------

def run(page, folder):
    """What is wrong with a page, without its seconds. -> {line: words}."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results/source.md").write_text("| row | ppl | recall % |\n|---|---|---|\n| dense | 2.66 | 100.0 |\n| lora | 2.92 | 76.8 |\n")
    return dict(run_page(textwrap.dedent(page).strip() + "\n", folder, say=lambda words: None))


RIGHT = """
    # A page

    <!-- runs -->

    Quoted code, which is not run:

    ```py
    raise SystemExit(1)
    ```

    ```bash
    echo one \\
        two > made.txt
    cat made.txt; echo "took 3.1 s" >&2
    ```

    ```text
    one two
    took 99 s
    ```

    ```python
    import pathlib
    made = pathlib.Path("made.txt").read_text()
    print(made, 2.61, "in 8 ms")
    print("| row | ppl | seconds |\\n|---|---|---|\\n| dense | 2.66 | 1.2 |\\n| lora | 2.92 | 3.4 |\\n| idp | 3.17 | 2 |")
    ```

    <!-- within 5 % -->
    ```text
    one two
    2.70 in 9 ms
    ...
    | idp | 3.10 | 2 |
    ```

    <!-- printed -->
    <!-- within 2 points -->
    | row | seconds |
    |---|---|
    | dense | 7 |
    | ... |

    ```bash
    echo again >> made.txt
    ```

    ```python
    print(made == pathlib.Path("made.txt").read_text())
    ```

    ```text
    False
    ```

    <!-- parsed only: needs a GPU -->
    ```bash .noeval
    a-command-that-is-not-there
    python recover.py --method lora \\
        --model smollm2 --text data/mine.txt
    ```

    <!-- from results/source.md -->
    | row | recall % |
    |---|---|
    | lora | 76.8 |

    | letter | code |
    |---|---|
    | B batch | `file2.py:name` [Hu et al. 2021] |
"""


def test_a_right_page_passes(tmp_path):
    assert run(RIGHT, tmp_path) == {}


WRONG = {  # what is changed in the right page -> the line of the fault, and words of its message
    "a number": ("    2.70 in 9 ms", "    2.80 in 9 ms", 32, "came:     2.61 in 8 ms"),
    "a number that counts as printed": ("    <!-- within 5 % -->\n", "", 31, "expected: 2.70 in 9 ms"),
    "a word": ("    one two\n    took", "    one three\n    took", 18, "came:     one two"),
    "a line too many": ("    False\n", "    False\n    True\n", 54, "came:     nothing more"),
    "a line too few": ("    one two\n    took 99 s\n", "    took 99 s\n", 19, "expected: nothing more"),
    "a row that was not printed": ("| dense | 7 |", "| prompt | 7 |", 41, "came:     dense | (time)"),
    "rows left out in silence": ("    | ... |\n", "", 42, "came:     lora | (time)"),
    "a column that was not printed": ("    | row | seconds |\n", "    | row | hours |\n", 39, "expected: row | hours"),
    "a command that fails": ("    cat made.txt;", "    ls nowhere.txt;", 14, "nowhere.txt"),
    "code that fails": ("    import pathlib\n", "    import pathlib\n    1 / 0\n", 24, "ZeroDivisionError"),
    "a flag that is not there": ("--method lora", "--methods lora", 59, "--methods"),
    "a source that is not there": ("results/source.md", "results/other.md", 64, "there is no results/other.md"),
    "a row that is not in the source": ("| lora | 76.8 |", "| lora | 76.9 |", 66, "no row of results/source.md"),
    "cells of two rows": ("| lora | 76.8 |", "| lora | 100.0 |", 66, "no row of results/source.md"),
    "a table without a source": ("    <!-- from results/source.md -->\n", "", 63, "a table with numbers"),
    "a comment that means nothing": ("<!-- printed -->", "<!-- prints -->", 37, "prints"),
    "a comment in the wrong place": ("    <!-- parsed only: needs a GPU -->\n", "    <!-- printed -->\n", 56, "printed"),
    "text that nothing prints": ("    ```text\n    False", "    Words.\n\n    ```text\n    False", 54, "directly behind"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_found_in_its_line(name, tmp_path):
    old, new, line, words = WRONG[name]
    assert old in RIGHT
    wrong = run(RIGHT.replace(old, new, 1), tmp_path)
    assert line in wrong and words in wrong[line], wrong


def test_nothing_runs_after_a_failure(tmp_path):
    wrong = run("```bash\nfalse\n```\n\n```bash\ntouch made\n```\n", tmp_path)
    assert list(wrong) == [2, 3] and not (tmp_path / "made").exists()


def test_seconds_are_told(tmp_path):
    told = []
    run_page("```bash\nsleep 0.2\n```\n", pathlib.Path(tmp_path), told.append)
    assert "line 2: sleep 0.2" in told[0] and "in all" in told[1] and float(told[0].split()[0]) >= 0.2
