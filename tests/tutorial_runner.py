"""Runs a page of Markdown as a reader would, and compares what it shows with what comes out.

    python -m pytest -m tutorial -s                        # tutorial.md, minutes; -s shows the seconds of each block
    python tests/tutorial_runner.py PAGE.md                # any page, without pytest

In a copy of the project, in order: each ```bash block by `bash -e`, from the copy's root; all ```python blocks in one
interpreter. ```py is quoted code and ``` without a language any text: neither is run. Comments (invisible on GitHub) say more:

    <!-- runs -->                          in the first five lines: every block, text and table of this page is checked
    <!-- parsed only: no GPU here -->      before ```bash .noeval: the commands only go through the scripts' own parsers; .noeval
                                           is for jupytext: in a notebook the block is text, not a cell
    <!-- --- jupyter: ... --- -->          near the top, over several lines: jupytext's header, which says that cells are Python
    <!-- printed -->                       before a table: the block above printed it; its columns may be some of those
    <!-- from results/NAME.md -->          before a table: the cells of each row stand, in that order, in one row of that page
    <!-- within 5 % --> <!-- within 2 points -->    before ```text or a printed table, below the other comment: how far numbers
                                           may be apart; without it they are as printed

A ```text block stands directly behind the block that prints it: all of stdout, line by line, and what one likes of stderr. A line
"...", and a row "| ... |", stands for any lines. Blank lines and the width of spaces do not count. Never compared: numbers before
" s", " ms" and " seconds", and columns whose head has one of these.
"""
import collections
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# kind: bash, python, text, table. line: of its first line in the page. lines: its content. notes: {comment: its value}.
Block = collections.namedtuple("Block", "kind line lines notes")
NOTES = {  # comment -> its pattern; the first group is its value
    "runs": r"(runs)", "printed": r"(printed)", "from": r"from (results/[\w-]+\.md)", "parsed only": r"parsed only: (\S.*)", "notebook": r"--- jupyter: (.+) ---",
    "within": r"within (\d[\d.]* (?:%|points))"}
TAKES = {"bash": {"parsed only"}, "python": set(), "text": {"within"}, "table": {"printed", "from", "within"}}
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
SECONDS = re.compile(r"(?<!')\b(?:s|ms|seconds)\b")
COMMAND = re.compile(r"(?:^|&& |`)python (?:(\w+)\.py|-m ([\w.]+)) *(.*?) *(?:#.*)?$")
OPEN_ROW = '{"context": "c", "target": "t", "text": "a text"}\n'


# --- 1. The page ----------------------------------------------------------------------------------------------------------------

def is_marked(text):
    """Does the page say <!-- runs --> in its first five lines?"""
    return "<!-- runs -->" in text.splitlines()[:5]


def pieces_of(text):
    """-> (kind, number of its first line, its lines): fences by their language, tables, comments, words."""
    lines, i = text.splitlines(), 0
    while i < len(lines):
        start, line = i, lines[i]
        kind = next((kind for kind, sign in (("fence", "```"), ("table", "|"), ("comment", "<!--")) if line.startswith(sign)), "words")
        inside = {"fence": lambda line: line != "```", "table": lambda line: line.startswith("|"),
                  "comment": lambda line: "-->" not in lines[i - 1]}.get(kind, lambda line: False)
        i += 1
        while i < len(lines) and inside(lines[i]):
            i += 1
        if kind == "fence":
            yield line[3:].removesuffix(" .noeval").strip(), start + 2, lines[start + 1:i]
            i += 1
        elif line.strip():
            yield kind, start + 1, lines[start:i]


def blocks_of(text):
    """-> [Block], and what is wrong with the comments, as [(line, words)]."""
    blocks, wrong, notes, before = [], [], {}, ""
    for kind, number, lines in pieces_of(text):
        if kind == "comment":
            key, value = note_of(" ".join(lines))
            notes[key] = (value, number)
            continue
        wrong += [(at, f"this comment means nothing here: {value}") for key, (value, at) in notes.items()
                  if key not in TAKES.get(kind, ()) and not (key in ("runs", "notebook") and at <= 5)]
        if kind == "text" and before not in ("bash", "python"):
            wrong.append((number - 1, "a ```text block stands directly behind the ```bash or ```python block that prints it"))
        if kind in TAKES:
            blocks.append(Block(kind, number, lines, {key: value for key, (value, _) in notes.items()}))
        notes, before = {}, kind
    return blocks, wrong


def note_of(line):
    """'<!-- within 5 % -->' -> ("within", "5 %"); an unknown comment -> (None, its words)."""
    words = " ".join(line.removeprefix("<!--").removesuffix("-->").split())
    found = {key: match[1] for key, pattern in NOTES.items() if (match := re.fullmatch(pattern, words))}
    return next(iter(found.items()), (None, words))


def cells_of(row):
    """'| a | b |' -> ["a", "b"]."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def has_numbers(table):
    """Does a table hold a number that is neither in `code` nor in a tag such as [§3.2] or [Hu et al. 2021]?"""
    words = re.sub(r"`[^`]*`|\[[^\]\d]*[A-Za-z§][^\]]*\]", "", "\n".join(table.lines))
    return bool(re.search(r"\d", words))


def check_page(text, root=ROOT):
    """What can be said without running anything. -> [(line, words)]."""
    blocks, wrong = blocks_of(text)
    for block in blocks:
        if block.kind == "table":
            if "from" in block.notes:
                wrong += missing_rows(block, root / block.notes["from"])
            elif "printed" not in block.notes and has_numbers(block):
                wrong.append((block.line, "a table with numbers, and neither <!-- printed --> nor <!-- from results/... -->"))
    return sorted(wrong)


def missing_rows(table, page):
    """Rows of which the page has no row with the same cells in the same order. -> [(line, words)]."""
    if not page.exists():
        return [(table.line, f"there is no {page.parent.name}/{page.name}")]
    known = [cells_of(line) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [(number, f"no row of {page.parent.name}/{page.name} has the cells of {row}")
            for number, row in enumerate(table.lines[2:], table.line + 2)
            if not any(stand_in(cells_of(row), cells) for cells in known)]


def stand_in(some, cells):
    """Are these cells among those, in the same order?"""
    rest = iter(cells)
    return all(cell in rest for cell in some)


# --- 2. Comparing ---------------------------------------------------------------------------------------------------------------

def same(expected, came, within):
    """Are two lines equal: words, and numbers within a tolerance such as "5 %", "2 points" or None?"""
    pairs = [split(expected), split(came)]
    if pairs[0][0] != pairs[1][0]:
        return False
    return all(near(*numbers, within) for numbers in zip(pairs[0][1], pairs[1][1]))


def split(line):
    """-> its words, with # for each number and each time; its numbers, as written, without times."""
    line = re.sub(NUMBER.pattern + r"(?= (?:s|ms|seconds)\b)", "(time)", " ".join(line.split()))
    return NUMBER.sub("#", line), NUMBER.findall(line)


def near(expected, came, within):
    """Two numbers as written, within a tolerance."""
    if expected == came or within is None:
        return expected == came
    a, b = (float(text.replace(",", "").replace("−", "-")) for text in (expected, came))
    size, unit = within.split()
    return abs(a - b) <= float(size) * (abs(a) / 100 if unit == "%" else 1) + 1e-9


def compare_text(block, out, err):
    """Where a ```text block differs from what came. out, err: texts -> [(line, words)], the first one only."""
    out, err = ([line for line in text.splitlines() if line.strip()] for text in (out, err))
    skipping, within = False, block.notes.get("within")
    for number, line in enumerate(block.lines, block.line):
        if not line.strip() or line.strip() == "...":
            skipping = skipping or bool(line.strip())
            continue
        fits = lambda lines: next((i for i, came in enumerate(lines) if same(line, came, within)), None)
        at, aside = fits(out if skipping else out[:1]), fits(err)
        if at is not None:
            out, skipping = out[at + 1:], False
        elif aside is not None:
            err = err[aside + 1:]
        else:
            return [(number, differ(line, out[0] if out else "nothing more"))]
    return [(block.line + len(block.lines), differ("nothing more", out[0]))] if out and not skipping else []


def differ(expected, came):
    """Two lines, one above the other."""
    return f"expected: {expected.strip()}\n        came:     {came.strip()}"


def compare_table(block, out):
    """Where a table differs from the one that was printed. out: text -> [(line, words)], the first one only."""
    head = cells_of(block.lines[0])
    printed = [[cells_of(row) for row in found.splitlines()] for found in re.findall(r"(?:^\|.*\n?)+", out, re.M)]
    fitting = [rows for rows in printed if set(head) <= set(rows[0])]
    if not fitting:
        came = "; ".join(" | ".join(rows[0]) for rows in printed) or "no table"
        return [(block.line, differ(" | ".join(head), came))]
    rows = [[row[fitting[0][0].index(name)] for name in head] for row in fitting[0][2:]]
    shown = [[mask(cell, name) for cell, name in zip(row, head)] for row in rows]
    lines = [line_of(cells_of(row), head) for row in block.lines[2:]]
    return compare_text(block._replace(line=block.line + 2, lines=lines), "\n".join(map(" | ".join, shown)), "")


def line_of(cells, head):
    """A row of the page as a line; "..." for one that stands for any."""
    return "..." if set(cells) <= {"...", ""} else " | ".join(mask(cell, name) for cell, name in zip(cells, head))


def mask(cell, name):
    """A cell, or "(time)" in a column of seconds."""
    return "(time)" if SECONDS.search(name) else cell


# --- 3. Running -----------------------------------------------------------------------------------------------------------------

def copy_project(target, root=ROOT):
    """What git tracks, as it is now; without git, all but runs/ and caches."""
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode == 0:
        for name in filter(None, listed.stdout.split("\0")):
            if (root / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, target / name)
    else:
        ignored = shutil.ignore_patterns("runs", "__pycache__", ".*_cache", ".git", ".venv", "*.tmp", "*.old")
        shutil.copytree(root, target, ignore=ignored, dirs_exist_ok=True)


def environment():
    """Of all commands: this Python first, no network, no window."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}


def run_bash(block, folder):
    """-> stdout, stderr, and what failed as [(line, words)]."""
    with tempfile.NamedTemporaryFile("r", suffix=".line") as failed:
        trap = f"trap 'echo $LINENO > {failed.name}' ERR\n"
        done = subprocess.run(["bash", "-e", "-c", trap + "\n".join(block.lines)], cwd=folder, env=environment(),
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
        number = block.line + int(failed.read() or 2) - 2  # the trap is the script's first line
    words = "\n        ".join(done.stderr.strip().splitlines()[-12:])
    wrong = [(number, f"the command ended with exit code {done.returncode}\n        {words}")] if done.returncode else []
    return done.stdout, done.stderr, wrong


# The one interpreter: a line of JSON with a block's code comes in, a line with what it printed goes out.
INTERPRETER = """
import contextlib, io, json, os, sys, traceback
answers, scope = os.fdopen(os.dup(1), "w"), {"__name__": "__main__"}
os.dup2(2, 1)
sys.path.insert(0, "")
for request in sys.stdin:
    streams, failed = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)], None
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            exec(compile(json.loads(request), "PAGE", "exec"), scope)
        except BaseException as error:
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "PAGE"]
            failed = [at[-1] if at else getattr(error, "lineno", None), "".join(traceback.format_exception_only(error)).strip()]
    printed = [stream.buffer.getvalue().decode() for stream in streams]
    print(json.dumps([*printed, failed]), file=answers, flush=True)
"""


def run_python(block, interpreter):
    """-> stdout, stderr, and what failed as [(line, words)]."""
    code = "\n" * (block.line - 1) + "\n".join(block.lines)   # so that its lines have the page's numbers
    interpreter.stdin.write(json.dumps(code) + "\n")
    interpreter.stdin.flush()
    answer = interpreter.stdout.readline()
    if not answer:
        return "", "", [(block.line, f"the interpreter ended with exit code {interpreter.wait()}")]
    out, err, failed = json.loads(answer)
    return out, err, [(failed[0] or block.line, failed[1])] if failed else []


def parse_commands(block):
    """The block's commands by the scripts' own parsers. -> what they refuse, as [(line, words)]."""
    wrong, number = [], block.line
    for line in re.split(r"(?<!\\)\n", "\n".join(block.lines)):
        match = COMMAND.search(line.replace("\\\n", " "))
        if match:
            refused = refusal(match[1] or match[2], shlex.split(match[3]))
            wrong += [(number, refused)] if refused else []
        number += 1 + line.count("\n")
    return wrong


def refusal(module, flags):
    """Why a script's parser refuses flags, or None. In a folder that holds only the files they name."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        make_files(flags, pathlib.Path(folder))
        os.chdir(folder)
        try:
            parse = getattr(importlib.import_module(module), "parse", None)
            if parse is None:
                return f"{module} takes no flags" if flags else None
            parse(flags)
        except (ValueError, ImportError) as error:         # support.cli.UserError is a ValueError
            return str(error)
        finally:
            os.chdir(before)


def make_files(flags, folder):
    """Small files where a command names some: texts, tasks, data of the reader's own."""
    for word in flags:
        for name in re.findall(r"[\w./-]+\.(?:txt|jsonl)\b", word):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(OPEN_ROW, encoding="utf-8")


def run_page(text, folder, say=print):
    """Everything. folder: the copy of the project -> what is wrong, as [(line, words)]; stops at a command that fails."""
    (blocks, _), wrong, printed, start = blocks_of(text), check_page(text, folder), ("", ""), time.time()
    with subprocess.Popen([sys.executable, "-c", INTERPRETER], cwd=folder, env=environment(), text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as interpreter:
        for block in blocks:
            begun, failed = time.time(), []
            if "parsed only" in block.notes:
                wrong += parse_commands(block)
            elif block.kind in ("bash", "python"):
                *printed, failed = run_bash(block, folder) if block.kind == "bash" else run_python(block, interpreter)
                say(f"{time.time() - begun:7.1f} s  line {block.line}: {' '.join(block.lines)[:90]}")
            elif block.kind == "text":
                wrong += compare_text(block, *printed)
            elif "printed" in block.notes:
                wrong += compare_table(block, printed[0])
            if failed:
                wrong += failed + [(block.line + len(block.lines), "what follows was not run")]
                break
    say(f"{time.time() - start:7.1f} s in all")
    return sorted(wrong)


def report(wrong, page):
    """[(line, words)] -> text."""
    return "\n".join(f"{page}:{line}: {words}" for line, words in wrong)


def main():
    """One page, without pytest."""
    page = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        copy_project(pathlib.Path(folder))
        wrong = run_page(page.read_text(encoding="utf-8"), pathlib.Path(folder))
    print(report(wrong, page) or "everything is as the page says")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
