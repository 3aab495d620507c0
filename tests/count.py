"""The size of the house: lines, columns and functions of every file, counted as tests/test_house.py counts them.

    python tests/count.py            # a line a file, a sum a folder; a student reads root and methods
"""
import statistics

from conftest import ROOT
from test_house import CORE, FILES, functions_of, length

HEAD = "{:32} {:>6} {:>6} {:>10} {:>7} {:>8}"


def sizes(paths):
    """Lines, the widest line, functions, the median and the longest of these without docstrings. -> tuple."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lengths = [length(function) for path in paths for function in functions_of(path)] or [0]
    return len(lines), max(map(len, lines)), len(lengths), f"{statistics.median(lengths):g}", max(lengths)


def main():
    """Print the table."""
    print(HEAD.format("file", "lines", "widest", "functions", "median", "longest"))
    folders = dict.fromkeys(path.parent for path in FILES)
    for folder in folders:
        files = [path for path in FILES if path.parent == folder]
        for path in files:
            print(HEAD.format(str(path.relative_to(ROOT)), *sizes([path])))
        print(HEAD.format(f"  together, {len(files)} files", *sizes(files)) + "\n")
    print(HEAD.format("root and methods", *sizes([path for path in CORE if path.parent.name != "support"])))
    print(HEAD.format("core: these and support", *sizes(CORE)))


if __name__ == "__main__":
    main()
