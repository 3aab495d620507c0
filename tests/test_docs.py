"""README.md, tutorial.md, results/ must not rot: names exist, commands parse, quoted code and rows are real."""
import ast
import re
import shlex

import pytest

from conftest import ROOT
from tutorial_runner import COMMAND, is_marked, refusal

PAGES = sorted(f"results/{path.name}" for path in (ROOT / "results").glob("*.md"))
DOCS = ["README.md", "tutorial.md", *PAGES]
FOLDERS = [".", "methods", "support", "experiments", "tests", "results", "toy_model"]
CODE = (".", "methods", "support", "experiments")
SOURCES = [path for folder in CODE for path in (ROOT / folder).glob("*.py")]
MADE_BY_RUNS = {"results.md", "latency.md", "choosing.md", "patterns.md"}
LONGEST_TABLE, LONGEST_README = 12, 150


def text_of(doc):
    return (ROOT / doc).read_text(encoding="utf-8")


def fences(doc, language):
    """The contents of ```language blocks."""
    return re.findall(rf"```{language}(?: .noeval)?\n(.*?)```", text_of(doc), re.S)


def command_lines(doc):
    """Lines of bash blocks, continued ones joined, and what stands in backticks, in cells of tables too."""
    lines = [line for block in fences(doc, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text_of(doc), flags=re.S)
    return lines + re.findall(r"`(?:[A-Z_]+=\S+ )*(python [^`]+)`", prose)


def commands():
    """Every command of ours in the documents. -> [(doc, module, flags)]; pytest is not ours."""
    found = [(doc, match) for doc in DOCS for line in command_lines(doc) if (match := COMMAND.search(line))]
    found = [(doc, match[1] or match[2], match[3]) for doc, match in found]
    return [entry for entry in found if entry[1] not in ("pytest", "experiments.NAME", "assignments.grade")]


def names_in(path):
    """Top-level names of a file, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def tables_of(doc):
    """Every Markdown table. -> [(what stands before it, [its rows, without head and rule])]."""
    found = re.finditer(r"(?:^\|.*\n)+", text_of(doc), re.M)
    return [(text_of(doc)[:match.start()], match[0].splitlines()[2:]) for match in found]


def bare_tables(doc):
    """Tables without a comment above that says where they come from; tests/test_tutorial.py reads the others."""
    return [(before, rows) for before, rows in tables_of(doc) if not before.endswith("-->\n")]


# --- Names, files, links --------------------------------------------------------------------------------

@pytest.mark.parametrize("doc", DOCS)
def test_every_name_exists(doc):
    references = re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", text_of(doc))
    paths = [(ROOT / file, name) for file, name in references]
    assert not [f"{path}:{name}" for path, name in paths if not path.exists() or name not in names_in(path)]
    assert references or doc != "tutorial.md"


@pytest.mark.parametrize("doc", DOCS)
def test_every_file_exists(doc):
    files = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|md|txt))`", text_of(doc))
    named = re.findall(r"\bpytest ((?:\w+/)*\w+\.py)", text_of(doc))
    ours = [name for name in {*files, *named} - MADE_BY_RUNS if not name.startswith(("runs/", "data/"))]
    assert not [name for name in ours if not (ROOT / name).exists()]


@pytest.mark.parametrize("doc", DOCS)
def test_every_link_leads_somewhere(doc):
    links = re.findall(r"\]\(([^)]+)\)", text_of(doc))
    local = [link.split("#")[0] for link in links if not link.startswith("http")]
    assert not [link for link in local if not ((ROOT / doc).parent / link).exists()]


def test_the_map_from_paper_to_line():
    """Each row `[tag]` -> `file.py:name` of the tutorial's table: the tag stands in that file."""
    rows = re.findall(r"^\| (\[[^\]]+\]) .*?`((?:\w+/)*\w+\.py):[\w.]+`", text_of("tutorial.md"), re.M)
    assert len(rows) >= 10
    assert not [(tag, file) for tag, file in rows if tag not in text_of(file)]


def test_quoted_code_is_in_the_project():
    lines = {line.strip() for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines()}
    quoted = {line.strip() for block in fences("tutorial.md", "py") for line in block.splitlines()} - {""}
    assert quoted and not [line for line in quoted if line not in lines]


# --- Commands -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("doc, module, flags", commands())
def test_every_command_parses(doc, module, flags):
    """By the script's own parser, in a folder that holds only the files it names; nothing slow runs."""
    assert refusal(module, shlex.split(flags)) is None


@pytest.mark.parametrize("doc", DOCS)
def test_no_two_commands_write_to_one_folder(doc):
    """A used --out is refused, so a reader could not run the second."""
    outs = re.findall(r"--out (\S+)", "\n".join(fences(doc, "bash")))
    assert sorted(set(outs)) == sorted(outs)


# --- What is shown --------------------------------------------------------------------------------------

def test_the_readme_shows_what_the_main_job_prints():
    text = text_of("README.md")
    assert "```bash\npip install -r requirements.txt && python recover.py --method idp\npython -m pytest\n" in text
    first = [rows for _, rows in tables_of("README.md")][0]
    parts = ["prompt 1 alone (8 tokens)", "prompt 2 alone (16 tokens)", "concatenated"]
    assert [row.split("|")[1].strip() for row in first] == ["dense", "compressed", *parts, "idp"]


def test_the_readme_is_short():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= LONGEST_README
    assert not [line for line in lines if len(line) > 200 and not line.startswith("python ")]


@pytest.mark.parametrize("doc", ["README.md", "tutorial.md"])
def test_tables_are_short(doc):
    assert not [rows[0] for _, rows in tables_of(doc) if len(rows) > LONGEST_TABLE]


@pytest.mark.parametrize("doc", ["README.md", "tutorial.md"])
def test_quoted_rows_stand_on_their_page(doc):
    """A table whose last line before it says "rows of ... results/PAGE.md": each row is one of that page."""
    line = re.compile(r"rows of [^\n]*\]\((results/[\w-]+\.md)\)[^\n]*\n\n\Z")
    quoted = [(match[1], rows) for before, rows in bare_tables(doc) if (match := line.search(before))]
    assert quoted or is_marked(text_of(doc))
    assert not [row for page, rows in quoted for row in rows if row not in text_of(page).splitlines()]


@pytest.mark.parametrize("doc", ["README.md", "tutorial.md"])
def test_measured_rows_stand_in_results(doc):
    """Every row with a decimal number is a row of some page: it is changed in both places or in none."""
    known = {line for page in PAGES for line in text_of(page).splitlines()}
    number = re.compile(r"(?<![§\d.])\d+\.\d")            # but not the number of a section
    measured = [row for _, rows in bare_tables(doc) for row in rows if number.search(row)]
    assert (measured or is_marked(text_of(doc))) and not [row for row in measured if row not in known]


def test_every_finding_links_its_table():
    findings = re.search(r"## What was found\n(.*?)\n## ", text_of("README.md"), re.S)[1]
    sentences = re.split(r"^- ", findings, flags=re.M)[1:]
    assert len(sentences) == 6
    assert not [sentence for sentence in sentences if not re.search(r"\]\(results/[\w-]+\.md\)", sentence)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "results/README.md"])
def test_a_page_says_where_its_numbers_come_from(page):
    """Title, command, seed, machine, date, a table; and the index knows it."""
    text = text_of(page)
    assert text.startswith("# ") and fences(page, "bash") and tables_of(page)
    assert all(word in text for word in ("Seed: ", "Machine: ", "Date: "))
    assert f"]({page.removeprefix('results/')})" in text_of("results/README.md")


def test_every_figure_is_shown():
    shown = "\n".join(map(text_of, DOCS))
    assert not [path.name for path in (ROOT / "results").glob("*.png") if f"{path.name})" not in shown]


def test_nothing_is_needed_from_one_machine():
    """No absolute paths of somebody's machine in what is published."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).iterdir()]
    for path in [ROOT / ".ci/run", *paths]:
        if path.suffix in (".py", ".md", ".txt", ".json") or path.name == "run":
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not re.search(r"(?<![\w.])/(?:home|root|work|Users)/\w", line), f"{path}: {line[:100]}"
