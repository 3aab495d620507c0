"""The house: arrows point one way, files and functions stay small enough to read.

    python tests/count.py    # the numbers: lines, widest line and functions of every file
"""
import ast
import statistics

import pytest

from conftest import ROOT

# Lower floors first. A file may import its own floor and those below, never one above, and never in a circle.
FLOORS = [["idp_minimal"], ["support"], ["methods"], ["compress"], ["evaluate"], ["recover"], ["experiments"]]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
CORE = sorted(path for folder in (".", "methods", "support") for path in (ROOT / folder).glob("*.py"))
FILES = CORE + sorted((ROOT / "experiments").glob("*.py"))


def module_of(path):
    """'support/cli.py' -> 'support.cli'."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """Project modules that a file imports, anywhere in it. -> set of 'support.cli' and the like."""
    known, found = {module_of(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= known.intersection(names)
    return found


def functions_of(path):
    """Every function of a file, inner ones included."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def length(function):
    """Lines of a function, without its docstring."""
    words = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (words.count("\n") + 1 if words else 0)


def test_the_root_shows_four_scripts():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == ["compress", "evaluate", "idp_minimal", "recover"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_points_up(path):
    own = FLOOR[module_of(path).split(".")[0]]
    assert not [name for name in imports_of(path) if FLOOR[name.split(".")[0]] > own]


def test_there_is_no_circle():
    arrows = {module_of(path): imports_of(path) for path in FILES}
    while arrows:                                          # take away, again and again, what imports nothing that is left
        free = [name for name, targets in arrows.items() if not targets & set(arrows)]
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


def test_idp_minimal_stands_alone():
    assert imports_of(ROOT / "idp_minimal.py") == set()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_can_be_read_at_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 110]
    assert ast.get_docstring(ast.parse(text)), "the docstring is the door"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_one_statement_a_line(path):
    statements = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.stmt)]
    starts = [node.lineno for node in statements]
    assert sorted(set(starts)) == sorted(starts)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_functions_say_what_they_do(path):
    silent = [f.name for f in functions_of(path) if not f.name.startswith("_") and length(f) > 4 and not ast.get_docstring(f)]
    assert not silent


def test_functions_are_short():
    lengths = {f"{module_of(path)}.{f.name}": length(f) for path in FILES for f in functions_of(path)}
    assert statistics.median(lengths.values()) <= 14
    assert not {name: lines for name, lines in lengths.items() if lines > 45}


def test_what_a_student_reads_stays_below_3000_lines():
    """Root and methods. Support, which a student may skip, is as long again: its readers check every file and flag that a
    stranger may hand in, and tests/test_mistakes.py holds them to it. It may grow no more.
    """
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in CORE}
    support = sum(count for path, count in lines.items() if path.parent.name == "support")
    assert sum(lines.values()) - support <= 2730 and support <= 2845


def test_the_count_command_counts(tmp_path):
    import count
    path = tmp_path / "x.py"
    path.write_text('"""Door."""\n\n\ndef f():\n    """Words."""\n    return 1\n\n\ndef g(): return f()\n', encoding="utf-8")
    assert count.sizes([path]) == (9, 19, 2, "1.5", 2)     # lines, widest, functions, their median and longest
