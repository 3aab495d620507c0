"""Uncertainty: 95 % intervals, and paired tests between the rows of two results.json.

    python evaluate.py --compare runs/A/results.json runs/B/results.json

Two models that answered the same questions are compared question by question, which sees differences that two
separate intervals hide. items.json: {row: {"loss" or task: {"data": digest, "values": [...]}}}.

  an accuracy                         Wilson's score interval: also right at 0 or 100 %, or from few questions
  a mean over chunks, or over seeds   Student's t interval (perplexity: exp of the interval of the mean loss)
  two accuracies                      exact McNemar test; Bonett and Price's interval of the difference
  two perplexities                    sign-flip test of paired differences of the loss; their t interval

None of them is a bootstrap: from five right answers that draws only right answers, and claims [100 %, 100 %].
"""
import functools
import math
import statistics

import torch

from support.cli import UserError
from support.files import BOOL, STRING, list_of, number, read_fields, user_path
from support.tables import markdown

Z = 1.959964                               # 97.5 % of the normal distribution lies below
FEW = 6                                    # with fewer items neither test below can reach 5 %


# --- 1. Intervals -----------------------------------------------------------------------------------------

def wilson(right, n):
    """95 % score interval of the share right / n. -> (low, high) [Wilson 1927; Newcombe 1998a, method 3]."""
    # (right + z^2 / 2 +- z sqrt(right (n - right) / n + z^2 / 4)) / (n + z^2)
    centre = (right + Z ** 2 / 2) / (n + Z ** 2)
    half = Z * math.sqrt(right * (n - right) / n + Z ** 2 / 4) / (n + Z ** 2)
    low = 0.0 if right == 0 else centre - half             # exactly, where rounding would leave 1e-17
    high = 1.0 if right == n else centre + half
    return low, high


def accuracy(correct):
    """A list of right or wrong. -> {"acc", "n", "ci95": [low, high]}. Raises ValueError when it is empty."""
    if len(correct) == 0:
        raise ValueError("accuracy: there are no answers; it needs at least one")
    right, n = sum(map(bool, correct)), len(correct)
    return {"acc": right / n, "n": n, "ci95": list(wilson(right, n))}


def t_central(t, df):
    """P(-t < T < t) for Student's T. df: whole, at least 1 [Abramowitz and Stegun 1964, 26.7.3, 26.7.4]."""
    # theta = atan(t / sqrt(df)), c = cos(theta), s = sin(theta)
    # df even: s (1 + 1/2 c^2 + (1 3)/(2 4) c^4 + ...), df / 2 terms
    # df odd:  2 / pi (theta + s (c + 2/3 c^3 + (2 4)/(3 5) c^5 + ...)), (df - 1) / 2 terms
    theta, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


@functools.lru_cache(maxsize=None)
def t_quantile(df):
    """The t below which 97.5 % of Student's distribution lies, by halving. df: as in t_central."""
    low, high = 0.0, 16.0                                  # 12.7 for df = 1 is the largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, df) < 0.95 else (low, middle)
    return high


def mean_ci95(values):
    """95 % t interval of a mean. -> [low, high]; None from one value, or when one is not a number."""
    values = [float(value) for value in values]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    # mean +- t sd / sqrt(n), t the 97.5 % quantile for n - 1 degrees of freedom
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def perplexity_ci95(losses):
    """exp of the t interval of the mean loss. losses: one a chunk. -> [low, high], or None without one."""
    ends = mean_ci95(losses)
    if ends is None or ends[1] > 700:                      # exp(710) is no float
        return None
    return [math.exp(end) for end in ends]


def shown(ci95, form, n=FEW):
    """'[low, high]' for a table; '[too few]' without an interval, or with fewer than 6 chunks behind it."""
    if ci95 is None or n < FEW:
        return "[too few]"
    return f"[{form(ci95[0])}, {form(ci95[1])}]"


# --- 2. Paired tests --------------------------------------------------------------------------------------

def discordant(a, b):
    """Items that only one of two models got right. -> (only a, only b)."""
    only_a = sum(bool(x and not y) for x, y in zip(a, b))
    only_b = sum(bool(y and not x) for x, y in zip(a, b))
    return only_a, only_b


def mcnemar(a, b):
    """Exact McNemar test of two lists of outcomes on the same items: two-sided p of the discordant pairs.

    p = 2 P(X <= min(n01, n10)), X ~ Binomial(n01 + n10, 1/2)
    """
    only_a, only_b = discordant(a, b)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def paired_interval(a, b):
    """95 % interval of acc(b) - acc(a) on the same items. -> (low, high) [Bonett and Price 2012].

    The usual interval, after adding one item that only a got right and one that only b got right, so that it
    has a width also when the two models never differ. Fagerland, Lydersen and Laake (2014) recommend it. It
    is not exact: near 5 % it may leave out 0 where McNemar's exact test says no. Then the test counts.
    """
    only_a, only_b = discordant(a, b)
    n = len(a) + 2
    p, q = (only_a + 1) / n, (only_b + 1) / n
    # q - p +- z sqrt((p + q - (q - p)^2) / n)
    half = Z * math.sqrt((p + q - (q - p) ** 2) / n)
    return max(-1.0, q - p - half), min(1.0, q - p + half)


def sign_flip(differences, flips=10_000, seed=0):
    """Sign-flip test of paired differences: two like models could as well have given the other signs. -> p.

    p is the share of sign patterns whose sum lies as far from 0, on either side, as the sum that was found
    [Fisher 1935, section 21]. Up to 14 items: of all 2^n patterns. Beyond: of `flips` random ones and the one
    found (Phipson and Smyth 2010), so that p is never 0. The pattern found and its mirror image always count:
    p >= 2 / 2^n, and fewer than 6 items can never give p < 0.05. Differences that are all 0 give 1.
    """
    d = torch.as_tensor(differences, dtype=torch.float64)                                  # (n,)
    n = len(d)
    if n <= 14:
        every = 1 - 2 * (torch.arange(2 ** n)[:, None] >> torch.arange(n) & 1)             # (2^n, n)
        return as_far(every, d) / 2 ** n
    generator, count = torch.Generator().manual_seed(seed), 0
    size = max(1, 2 ** 22 // n)                            # rows at a time: 32 MB
    for start in range(0, flips, size):
        rows = min(size, flips - start)
        signs = 2 * torch.randint(2, (rows, n), generator=generator, dtype=torch.int8) - 1
        count += as_far(signs, d)
    return (1 + count) / (1 + flips)


def as_far(signs, d):
    """How many sign patterns bring the sum as far from 0 as it is. signs (patterns, n), d (n,) -> int."""
    slack = 1e-9 * d.abs().sum()                           # sums in another order differ in their last digits
    # |sum_i s_i d_i| >= |sum_i d_i|
    return ((signs.double() @ d).abs() >= d.sum().abs() - slack).sum().item()


def verdict(p, n):
    """The cell "real at 5 %" of one test on n items."""
    if n < FEW:
        return "too few"
    return "yes" if p < 0.05 else "no"


def holm(ps):
    """p values adjusted for making all these tests, in the same order [Holm 1979].

    When "real" means adjusted below 0.05, at most 5 % of such tables hold even one false "real".
    """
    adjusted, highest = [1.0] * len(ps), 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        # the k-th smallest of m, counted from 0: max over j <= k of (m - j) p_j, at most 1
        highest = max(highest, min(1.0, (len(ps) - k) * ps[i]))
        adjusted[i] = highest
    return adjusted


# --- 3. Two results.json ----------------------------------------------------------------------------------

def compare(path_a, path_b):
    """Every pair of rows of two results.json (items.json beside them) on what both measured. -> lines.

    Below the table: what so many tests mean, and what cannot be paired. The same file twice compares its own
    rows. Raises UserError when nothing can be paired.
    """
    path_a, path_b = (user_path(path, "--compare") for path in (path_a, path_b))
    A, B = read_run(path_a), read_run(path_b)
    pairs = [(a, b) for a in A for b in B]
    if path_a.resolve() == path_b.resolve():
        pairs = [(a, b) for i, a in enumerate(A) for b in list(A)[i + 1:]]
    tests, notes = [], []
    for a, b in pairs:
        for name in dict.fromkeys([*A[a], *B[b]]):
            x, y = A[a].get(name), B[b].get(name)
            note = why_not(name, a, b, x, y)
            if note:
                notes.append(f"{name}: {note}")
            else:
                tests.append({"a": a, "b": b, **paired_test(name, x["values"], y["values"])})
    if not tests:
        reasons = list(dict.fromkeys(notes))
        raise UserError(f"--compare {path_a} {path_b}: no two rows share items; " + "; ".join(reasons[:2]))
    head = ["A", "B", "on", "n", "A", "B", "B - A", "95 % of the difference", "p", "real at 5 %"]
    return [*markdown(head, map(cells_of, tests)).split("\n"), "", together(tests)] + [
        f"Not compared: {note}" for note in dict.fromkeys(notes)]


def why_not(name, a, b, x, y):
    """Why the items x of row a and y of row b cannot be paired. -> str, or None when they can."""
    if x is None or y is None:
        return f"only {f'{a} of A' if y is None else f'{b} of B'} measured it"
    n, m = len(x["values"]), len(y["values"])
    if x["data"] != y["data"] or n != m or n == 0:
        return (f"not the same items ({n} in {a} of A, {m} in {b} of B); "
                "use the same --tasks, --eval-text, --eval-seqlen and --limit")
    return None


def paired_test(name, x, y):
    """One test of two lists of outcomes on the same items. -> dict of what a line shows.

    Differences of the loss are rounded to 1e-5 nats a token, a hundredth of the last digit shown: a model
    differs from itself by less when float32 sums run in another order, and it is not better than itself.
    """
    n = len(x)
    if name == "loss":
        difference = [round(b - a, 5) for a, b in zip(x, y)]
        values = [math.exp(statistics.fmean(losses)) for losses in (x, y)]
        return {"on": "ppl (log difference)", "n": n, "values": values, "p": sign_flip(difference),
                "difference": statistics.fmean(difference),
                "ci95": mean_ci95(difference) if n >= FEW else None}
    values = [sum(map(bool, correct)) / n for correct in (x, y)]
    return {"on": name, "n": n, "values": values, "difference": values[1] - values[0],
            "ci95": paired_interval(x, y), "p": mcnemar(x, y)}


def cells_of(test):
    """One test as a row of the table."""
    interval = "too few" if test["ci95"] is None else "{:+.3f} .. {:+.3f}".format(*test["ci95"])
    return [test["a"], test["b"], test["on"], test["n"], *(f"{value:.3f}" for value in test["values"]),
            f"{test['difference']:+.3f}", interval, f"{test['p']:.3g}", verdict(test["p"], test["n"])]


def together(tests):
    """How many tests were made, how many chance would call real, and how many stay real. -> one line."""
    ps = [test["p"] for test in tests if test["n"] >= FEW]
    real, stay = sum(p < 0.05 for p in ps), sum(p < 0.05 for p in holm(ps))
    return (f"Tests: {len(ps)} (on {FEW} items or more). Where nothing differs, up to 5 % of them, here "
            f"{round(0.05 * len(ps), 2):g}, are \"yes\" by chance alone. Of the {real} \"yes\", the {stay} "
            "with the smallest p stay \"yes\" when all tests count together (Holm).")


def read_run(path):
    """{row name: items} of a results.json, from the items.json beside it. Raises UserError."""
    items = path.with_name("items.json")
    if not path.is_file() or not items.is_file():
        raise UserError(f"--compare {path}: needs results.json and items.json beside it, as recover.py --out "
                        "and evaluate.py --out write them")
    run = read_fields(items, "--compare")
    for row in run.obj:
        measured = run.within(row)
        for name in measured.obj:
            entry = measured.within(name)
            entry("data", STRING)
            entry("values", LOSSES if name == "loss" else ANSWERS)
    return run.obj


LOSSES = (list_of(number(0, 1e4))[0], "a list of losses, in nats")
ANSWERS = (list_of(BOOL)[0], "a list of true and false")
