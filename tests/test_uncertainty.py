"""Intervals and tests equal published values or a slow twin; identical models are never called different."""
import itertools
import json
import math
import random

import pytest
import torch

import evaluate
from support.cli import UserError
from support import uncertainty
from support.output import write_json
from support.uncertainty import (accuracy, compare, holm, mcnemar, mean_ci95, paired_interval,
                                 perplexity_ci95, sign_flip, t_quantile, verdict, wilson)


# --- intervals --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_as_published(right, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17, 857-872, Table I, method 3."""
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (5, 5), (3, 7), (199, 200), (1200, 1200)])
def test_wilson_holds_the_shares_that_a_score_test_accepts(right, n):
    """The slow twin: all p with |right / n - p| <= z sqrt(p (1 - p) / n), on a fine grid."""
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    z = 1.959964
    accepted = grid[(right / n - grid).abs() <= z * (grid * (1 - grid) / n).sqrt()]
    low, high = wilson(right, n)
    assert (low, high) == pytest.approx((accepted.min().item(), accepted.max().item()), abs=2e-5)
    assert 0 <= low <= right / n <= high <= 1


def test_accuracy_of_five_right_answers():
    score = accuracy([True] * 5)
    assert (score["acc"], score["n"]) == (1.0, 5) and score["ci95"] == [pytest.approx(0.566, abs=5e-4), 1.0]
    assert json.loads(json.dumps(accuracy([0, 0, 1]))) == accuracy([False, False, True])
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


@pytest.mark.parametrize("df, t", [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (6, 2.4469), (7, 2.3646), (8, 2.3060),
    (9, 2.2622), (10, 2.2281), (29, 2.0452), (30, 2.0423), (120, 1.9799), (1000, 1.9623)])
def test_t_quantiles_of_the_tables(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=1e-4)


def test_t_quantiles_with_a_formula():
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), abs=1e-6)
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 8, 31, 200, 705])
def test_t_quantile_by_adding_up_the_density(df):
    """The slow twin: Simpson's rule over the density up to the quantile gives the share between."""
    t, steps = t_quantile(df), 4000
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = [constant * (1 + (t * i / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])) * t / steps / 3
    assert area == pytest.approx(0.475, abs=1e-8)


def test_the_interval_of_a_mean_by_hand():
    assert mean_ci95([1.0, 3.0]) == pytest.approx((-10.7062, 14.7062), abs=1e-4)     # sd / sqrt(2) = 1
    half = 2.2622 * 3.0277 / math.sqrt(10)                 # ten values: t for 9 degrees of freedom, sd 3.0277
    assert mean_ci95(torch.arange(1.0, 11.0)) == pytest.approx((5.5 - half, 5.5 + half), abs=1e-4)
    assert mean_ci95([0.25] * 9) == [0.25, 0.25]
    assert mean_ci95([1.0]) is mean_ci95([]) is mean_ci95([1.0, math.nan]) is None


def test_what_a_file_holds_is_json():
    for losses in ([1.0], [1.0, math.inf], [1.0, math.nan, 2.0]):
        assert json.dumps([mean_ci95(losses), perplexity_ci95(losses)]) == "[null, null]"
    assert perplexity_ci95([1.0, 400.0]) is None, "its upper end is beyond what a float holds"
    assert json.dumps(mean_ci95([2.0, 2.0])) == "[2.0, 2.0]"
    low, high = perplexity_ci95([1.0, 3.0])
    assert (math.log(low), math.log(high)) == pytest.approx((-10.7062, 14.7062), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_t_intervals_cover_95_percent(n):
    generator = torch.Generator().manual_seed(n)
    hits = [low <= 7 <= high for low, high in
            (mean_ci95((torch.randn(n, generator=generator) + 7).tolist()) for _ in range(2000))]
    assert sum(hits) / 2000 == pytest.approx(0.95, abs=0.015)


def test_shown():
    form = "{:.1f}".format
    assert uncertainty.shown([1.0, 2.0], form) == uncertainty.shown([1.0, 2.0], form, 6) == "[1.0, 2.0]"
    assert uncertainty.shown(None, form) == uncertainty.shown([1.0, 2.0], form, 5) == "[too few]"


def test_tables_say_too_few():
    row = {"row": "dense", "ppl": 2.0, "ppl_ci95": None, "ppl_seqlen": 8, "ppl_context": 2, "ppl_chunks": 1,
           "trainable_params": 0, "extra_bytes": 0, "weight_bytes": 1, "tasks": {"arc": accuracy([True] * 5)}}
    five, six = ({**row, "ppl_ci95": [1.0, 3.0], "ppl_chunks": n} for n in (5, 6))
    first, second, third = evaluate.format_table([row, five, six]).splitlines()[2:5]
    assert "| 2.00 [too few] | 100.0 [56.6, 100.0] |" in first and "| 2.00 [too few] |" in second
    assert "| 2.00 [1.00, 3.00] |" in third


# --- paired tests -----------------------------------------------------------------------------------------

def test_mcnemar_by_hand():
    a, b = [1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]
    # five only a, one only b: 2 (C(6, 0) + C(6, 1)) / 2^6
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(14 / 64)
    assert mcnemar(a, a) == 1.0 and mcnemar([], []) == 1.0, "nothing discordant: nothing shown"
    assert mcnemar([1] * 4000, [0] * 4000) < 1e-300, "no overflow"


def outcomes(both, only_a, only_b, neither):
    """Two lists of outcomes with these counts."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    return a, [True] * both + [False] * only_a + [True] * only_b + [False] * neither


def test_paired_proportions_as_published():
    """Response before and after therapy (Cavo et al. 2012), as the R package contingencytables prints it.

    The package belongs to Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017).
    """
    a, b = outcomes(59, 16, 6, 80)
    assert paired_interval(a, b) == pytest.approx((-0.1195, -0.0032), abs=5e-5)     # Wald with Bonett-Price
    assert mcnemar(a, b) == pytest.approx(0.052479, abs=5e-7)                       # exact conditional test


def test_paired_interval_is_the_usual_one_with_two_more_items():
    a, b = outcomes(10, 7, 3, 5)
    differences = [float(y) - float(x) for x, y in zip(a + [True, False], b + [False, True])]
    n, mean = len(differences), sum(differences) / len(differences)
    half = 1.959964 * math.sqrt(sum((d - mean) ** 2 for d in differences) / n / n)
    assert paired_interval(a, b) == pytest.approx((mean - half, mean + half))
    low, high = paired_interval([True] * 20, [True] * 20)
    assert low == -high and 0.1 < high < 0.2, "no difference seen is not no difference"
    assert paired_interval([False], [True])[1] == 1.0 and paired_interval([True], [False])[0] == -1.0


@pytest.mark.parametrize("n, p1, p2, shared", [(8, 0.5, 0.5, 0.3), (30, 0.9, 0.8, 0.5), (200, 0.6, 0.5, 0.6)])
def test_paired_intervals_cover(n, p1, p2, shared):
    """Two models that agree on a share of items: about 95 of 100 intervals hold the true difference."""
    chance, hits = random.Random(n), 0
    for _ in range(1500):
        a, b = [], []
        for _ in range(n):
            u, v = chance.random(), chance.random()
            a.append(u < p1)
            b.append((u if chance.random() < shared else v) < p2)
        low, high = paired_interval(a, b)
        hits += low <= p2 - p1 <= high
    assert hits / 1500 >= 0.935


@pytest.mark.parametrize("d", [
    [1.0, 2.0, 3.0], [1.0, -2.0, 3.0, 0.0], [0.5] * 6, [0.1, 0.2, 0.3, -0.1, 0.4, 0.1, 0.2], [-1.0, 1.0]])
def test_sign_flips_one_by_one(d):
    """The slow twin, in whole numbers, so that no rounding decides."""
    whole = [round(10 * x) for x in d]
    patterns = list(itertools.product([-1, 1], repeat=len(d)))
    far = sum(abs(sum(s * x for s, x in zip(signs, whole))) >= abs(sum(whole)) for signs in patterns)
    assert sign_flip(d) == sign_flip([-x for x in d]) == far / len(patterns)


def test_sign_flip_as_published():
    """Darwin's maize, eighths of an inch [Fisher 1935]: 863 of 2^15 patterns reach 314 on each side."""
    maize, p = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], 2 * 863 / 2 ** 15       # 0.0527
    assert sign_flip(maize) == pytest.approx(p, abs=0.007), "three standard deviations of 10,000 flips"
    assert sign_flip(maize, flips=400_000) == pytest.approx(p, abs=0.0011)
    assert sign_flip(maize) == sign_flip(maize), "the seed decides"


def test_sign_flip_at_its_ends():
    assert [sign_flip([1.0] * n) for n in (1, 5, 6, 14)] == [1.0, 2 / 2 ** 5, 2 / 2 ** 6, 2 / 2 ** 14]
    assert sign_flip([0.0] * 7) == sign_flip([0.0] * 50) == 1.0, "no difference at all"
    assert sign_flip([1.0] * 50) == 1 / 10_001, "random patterns never give 0"
    big = torch.ones(20_000)
    assert sign_flip(big, flips=300) == 1 / 301, "more items than one portion of patterns holds"


@pytest.mark.parametrize("n", [1, 5, 8, 20, 60])
@pytest.mark.parametrize("name", ["loss", "arc"])
def test_identical_noisy_models_differ_in_5_percent(name, n):
    """Items that differ by noise alone: "yes" in at most 5 % of trials; 7.2 % is two sigma above in 400."""
    generator, yes = torch.Generator().manual_seed(n), 0
    for _ in range(400):
        noise, shared = torch.rand(2, n, generator=generator), torch.rand(n, generator=generator)
        items = noise + shared if name == "loss" else noise < 0.6                          # (2, n)
        yes += verdict(uncertainty.paired_test(name, *items.tolist())["p"], n) == "yes"
    assert yes / 400 <= 0.072
    assert n >= uncertainty.FEW or yes == 0


def test_a_true_difference_is_seen():
    generator = torch.Generator().manual_seed(0)
    for n in (8, 20):
        x = torch.randn(n, generator=generator)
        y = x + 0.5 + 0.2 * torch.randn(n, generator=generator)
        assert verdict(uncertainty.paired_test("loss", x.tolist(), y.tolist())["p"], n) == "yes"


def test_rounding_of_float32_is_no_difference():
    """The same model in another batch: every loss a little higher, by less than float32 can tell."""
    x = [3.0 + i / 100 for i in range(50)]
    test = uncertainty.paired_test("loss", x, [value + 1e-6 for value in x])
    assert (test["p"], test["difference"], test["ci95"]) == (1.0, 0.0, [0.0, 0.0])


def test_holm_by_hand_and_one_after_the_other():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.04, 0.001]) == pytest.approx([0.04, 0.002])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    chance = random.Random(0)
    for _ in range(50):
        ps = [chance.random() ** 4 for _ in range(6)]
        real, left = set(), sorted(range(6), key=lambda i: ps[i])
        while left and ps[left[0]] < 0.05 / len(left):     # the smallest against 5 % / m, then 5 % / (m - 1)
            real.add(left.pop(0))
        assert {i for i, p in enumerate(holm(ps)) if p < 0.05} == real


# --- two results.json -------------------------------------------------------------------------------------

def run_folder(folder, rows):
    """A results.json with its items.json. rows: {row: {name: (fingerprint, values)}} -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "items.json", {
        row: {name: {"data": data, "values": values} for name, (data, values) in items.items()}
        for row, items in rows.items()})
    write_json(folder / "results.json", {"rows": []})
    return folder / "results.json"


def cells_of(lines):
    """The lines of the table's body. -> list of lists of cells."""
    body = [line for line in lines if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in body]


def test_compare_pairs_items(tmp_path):
    x, loss = [True] * 6 + [False] * 4, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    a = run_folder(tmp_path / "a", {"dense": {"loss": ("f", loss), "arc": ("f", x)}})
    worse = {"loss": ("f", [value + 0.5 for value in loss]), "arc": ("f", [False] * 10)}
    b = run_folder(tmp_path / "b", {"idp": worse})
    lines = compare(a, b)
    assert {line.count("|") for line in lines if line.startswith("|")} == {11}, "every line has every column"
    ppl, arc = cells_of(lines)
    assert ppl[:4] == ["dense", "idp", "ppl (log difference)", "6"]
    assert ppl[6:] == ["+0.500", "+0.500 .. +0.500", "0.0312", "yes"]
    assert arc[2:7] == ["arc", "10", "0.600", "0.000", "-0.600"]
    # (1 - 7) / 12 +- 1.96 sqrt((1/12 + 7/12 - 1/4) / 12), and 2 / 2^6
    assert arc[7:] == ["-0.865 .. -0.135", "0.0312", "yes"]
    assert lines[-2] == "" and lines[-1].startswith("Tests: 2 (on 6 items or more)")


def test_compare_says_too_few(tmp_path):
    rows = {"loss": ("f", [1.0, 2.0, 3.0]), "arc": ("f", [True] * 5)}
    far = {"loss": ("f", [2.0, 3.0, 4.0]), "arc": ("f", [False] * 5)}
    lines = compare(run_folder(tmp_path / "a", {"dense": rows}), run_folder(tmp_path / "b", {"idp": far}))
    ppl, arc = cells_of(lines)
    assert ppl[7:] == ["too few", "0.25", "too few"] and arc[8:] == ["0.0625", "too few"]
    assert lines[-1].startswith("Tests: 0 ")


def test_compare_counts_its_tests(tmp_path):
    """One clear difference, one that Holm takes back, one of nothing."""
    clear, weak, none = ([True] * n + [False] * (30 - n) for n in (0, 24, 30))
    a = run_folder(tmp_path / "a", {"dense": {name: ("f", [True] * 30) for name in ("p", "q", "r")}})
    b = run_folder(tmp_path / "b", {"idp": {"p": ("f", clear), "q": ("f", weak), "r": ("f", none)}})
    lines = compare(a, b)
    assert [row[-1] for row in cells_of(lines)] == ["yes", "yes", "no"]          # p = 2e-9, 0.031, 1
    assert lines[-1] == (
        'Tests: 3 (on 6 items or more). Where nothing differs, up to 5 % of them, here 0.15, are "yes" by '
        'chance alone. Of the 2 "yes", the 1 with the smallest p stay "yes" when all tests count together '
        '(Holm).')


def test_compare_says_what_it_cannot_pair(tmp_path):
    a = run_folder(tmp_path / "a", {"dense": {
        "loss": ("f", [1.0]), "arc": ("f", [True, False]), "sciq": ("f", [True]), "boolq": ("f", [])}})
    b = run_folder(tmp_path / "b", {"idp": {
        "loss": ("f", [1.0]), "arc": ("g", [True, False]), "piqa": ("f", [True]), "boolq": ("f", [])}})
    notes = [line for line in compare(a, b) if line.startswith("Not compared")]
    assert len(notes) == 4 and "arc: not the same items (2 in dense of A, 2 in idp of B)" in notes[0]
    assert "sciq: only dense of A" in notes[1] and "piqa: only idp of B" in notes[3]
    assert "boolq: not the same items (0 in dense of A" in notes[2], "no items are not the same items"


def test_compare_one_file_with_itself_and_nothing_discordant(tmp_path):
    items = {"loss": ("f", [1.0 + i for i in range(7)]), "arc": ("f", [True, False] * 4)}
    path = run_folder(tmp_path, {"dense": items, "compressed": items, "idp": items})
    rows = cells_of(compare(path, path))
    pairs = [("dense", "compressed"), ("dense", "idp"), ("compressed", "idp")]
    assert [(row[0], row[1]) for row in rows[::2]] == pairs
    assert all(row[-2:] == ["1", "no"] for row in rows)


def test_compare_mistakes(tmp_path):
    a = run_folder(tmp_path / "a", {"dense": {"arc": ("f", [True])}})
    b = run_folder(tmp_path / "b", {"idp": {"arc": ("g", [True, True])}})
    with pytest.raises(UserError, match="no two rows share items.*1 in dense of A, 2 in idp of B"):
        compare(a, b)
    with pytest.raises(UserError, match="no two rows"):    # one row has nothing to be compared with
        compare(a, a)
    (tmp_path / "b" / "items.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        compare(a, b)
    (tmp_path / "b" / "items.json").unlink()
    with pytest.raises(UserError, match="items.json beside it"):
        compare(a, b)
