"""Uncertainty: bootstrap intervals, and paired tests between the rows of two results.json.

    python evaluate.py --compare runs/A/results.json runs/B/results.json

Two models that answered the same questions are compared question by question, which sees differences that two separate
intervals hide. Items live in items.json: {row: {"loss" or task: {"data": fingerprint, "values": [...]}}}.
"""
import json
import math
import pathlib
import zlib

import torch

from loading import UserError


# --- 1. Intervals ---------------------------------------------------------------------------------------------------------------

def bootstrap(values, samples=2000, seed=0):
    """95 % percentile interval of the mean, resampling items. values: (n,) -> (low, high)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def accuracy(correct):
    """-> {"acc", "n", "ci95"}."""
    return {"acc": sum(correct) / len(correct), "n": len(correct), "ci95": list(bootstrap(correct))}


# --- 2. Paired tests ------------------------------------------------------------------------------------------------------------

def fingerprint(data):
    """Eight hexadecimal digits that tell two sets of questions apart. data: anything JSON can hold."""
    return f"{zlib.crc32(json.dumps(data).encode()):08x}"


def mcnemar(a, b):
    """Exact McNemar test of two lists of outcomes on the same items: two-sided p of the discordant pairs.

    p = 2 P(X <= min(n01, n10)), X ~ Binomial(n01 + n10, 1/2)
    """
    only_a, only_b = sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def compare(path_a, path_b):
    """Every pair of rows of two results.json (their items.json beside them) on what both measured. -> Markdown lines.

    Accuracy: exact McNemar. Perplexity: paired bootstrap of the difference of log-perplexity over chunks. What cannot be
    paired is said below the table. The same file twice compares its own rows. Raises UserError when nothing can be paired.
    """
    A, B = read_run(path_a), read_run(path_b)
    pairs = [(a, b) for a in A for b in B]
    if pathlib.Path(path_a).resolve() == pathlib.Path(path_b).resolve():
        pairs = [(a, b) for i, a in enumerate(A) for b in list(A)[i + 1:]]
    lines, notes = [], []
    for a, b in pairs:
        for name in dict.fromkeys([*A[a], *B[b]]):
            x, y = A[a].get(name), B[b].get(name)
            if x is None or y is None:
                notes.append(f"{name}: only {f'{a} of A' if y is None else f'{b} of B'} measured it")
            elif x["data"] != y["data"] or len(x["values"]) != len(y["values"]):
                notes.append(f"{name}: not the same items ({len(x['values'])} in {a} of A, {len(y['values'])} in {b} of B); "
                             "use the same --tasks, --eval-text, --eval-seqlen and --limit")
            else:
                lines.append(f"| {a} | {b} | {compare_items(name, x['values'], y['values'])} |")
    if not lines:
        raise UserError(f"--compare {path_a} {path_b}: no two rows share items; " + "; ".join(dict.fromkeys(notes)))
    head = ["| A | B | on | n | A | B | B - A | 95 % of the difference | p | real at 5 % |", "|" + "---|" * 10]
    return head + lines + [""] * bool(notes) + [f"Not compared: {note}" for note in dict.fromkeys(notes)]


def compare_items(name, x, y):
    """One paired test of two lists of outcomes on the same items. -> the cells from "on" to "real at 5 %"."""
    n, difference = len(x), torch.tensor(y, dtype=torch.float64) - torch.tensor(x, dtype=torch.float64)
    low, high = bootstrap(difference)
    if name == "loss":
        name, p, real, shown = "ppl (log difference)", "-", low > 0 or high < 0, [math.exp(sum(v) / n) for v in (x, y)]
    else:
        p, shown = mcnemar(x, y), [sum(v) / n for v in (x, y)]
        real, p = p < 0.05, f"{p:.3g}"
    return (f"{name} | {n} | {shown[0]:.3f} | {shown[1]:.3f} | {difference.mean():+.3f} | {low:+.3f} .. {high:+.3f} | {p} | "
            f"{'yes' if real else 'no'}")


def read_run(path):
    """{row name: items} of a results.json. Raises UserError when it or its items.json is missing or damaged."""
    path = pathlib.Path(path)
    items = path.with_name("items.json")
    if not path.is_file() or not items.is_file():
        raise UserError(f"--compare {path}: needs results.json and items.json beside it, as recover.py --out and "
                        "evaluate.py --out write them")
    try:
        return json.loads(items.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--compare {items}: is not JSON ({error.msg}); write it again with --out") from error
