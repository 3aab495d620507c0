"""README.md and tutorial.md must not rot: names exist, tags stand where they say, commands parse, quoted code is real."""
import ast
import importlib
import re
import shlex

import pytest

from conftest import ROOT

DOCS = ["README.md", "tutorial.md"]
COMMAND = re.compile(r"^python (\w+)\.py *(.*?) *(?:#.*)?$", re.M)


def text_of(doc):
    return (ROOT / doc).read_text(encoding="utf-8")


def fences(doc, language):
    """The contents of ```language blocks."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(doc), re.S)


def commands():
    """Every `python X.py ...` of the two documents' bash blocks, continued lines joined. -> [(doc, script, flags)]."""
    found = []
    for doc in DOCS:
        for block in fences(doc, "bash"):
            found += [(doc, script, flags) for script, flags in COMMAND.findall(block.replace("\\\n", " "))]
    return found


def names_in(path):
    """Top-level names of a script, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("doc", DOCS)
def test_every_name_exists(doc):
    references = re.findall(r"`(\w+)\.py:([\w.]+)`", text_of(doc))
    assert references or doc == "README.md"
    missing = [f"{script}.py:{name}" for script, name in references if name not in names_in(ROOT / f"{script}.py")]
    assert not missing


@pytest.mark.parametrize("doc", DOCS)
def test_every_file_exists(doc):
    files = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt))`", text_of(doc))
    made_by_runs = {"results.md", "latency.md", "choosing.md", "patterns.md"}
    assert not [name for name in set(files) - made_by_runs if not (ROOT / name).exists()]


def test_the_map_from_paper_to_line():
    """Each row `[tag]` -> `file.py:name` of the tutorial's table: the tag stands in that file."""
    rows = re.findall(r"^\| (\[[^\]]+\]) .*?`(\w+)\.py:[\w.]+`", text_of("tutorial.md"), re.M)
    assert len(rows) >= 10
    missing = [(tag, script) for tag, script in rows if tag not in (ROOT / f"{script}.py").read_text(encoding="utf-8")]
    assert not missing


def test_quoted_code_is_in_the_project():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    lines = {line.strip() for line in sources.splitlines()}
    quoted = [line.strip() for block in fences("tutorial.md", "python") for line in block.splitlines() if line.strip()]
    assert quoted and not [line for line in quoted if line not in lines]


@pytest.mark.parametrize("doc, script, flags", commands())
def test_every_command_parses(doc, script, flags, tmp_path, monkeypatch):
    """By the script's own parser, in an empty folder, so that --out is free; nothing slow runs."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    if hasattr(module, "parse"):
        module.parse(shlex.split(flags))
    else:
        assert not flags, f"{script}.py takes no flags"


def test_the_readme_shows_what_the_main_job_prints():
    """The README's first table has the rows of the default command, and the toy's true sizes."""
    table = text_of("README.md")
    for row in ("| dense |", "| compressed |", "| idp |"):
        assert row in table
    assert "pip install -r requirements.txt && python recover.py --method idp" in table and "python -m pytest" in table


def test_nothing_is_needed_from_one_machine():
    """No absolute paths of somebody's machine in what is published."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.txt"), *ROOT.glob("tests/*.py"), ROOT / ".ci/run"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"(?<![\w.])/(?:home|root|work|Users)/\w", line), f"{path.name}: {line.strip()}"
