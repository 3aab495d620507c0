"""Contract tests over COMPRESSORS: a new compressor is graded here without editing a test. Then twins, the
walk, the command."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import compress
from compress import COMPRESSORS, compress_model, gptq, hessians, magnitude, rtn, sparsegpt
from conftest import CONFIGS, ROOT, save_tiny, tiny_model, tiny_tokenizer
from kill import kills, listing, neighbours, run_forked
from methods.registry import Compressor
from methods.rounding import SHARES, fit_grid
from support import architectures, cli, models, output, packing
from support.cli import UserError

NAMES = sorted(COMPRESSORS)
QUANTIZERS = [name for name in NAMES if "bits" in COMPRESSORS[name].settings]
PRUNERS = [name for name in NAMES if "sparsity" in COMPRESSORS[name].settings]
ONLY_PRUNE = [name for name in PRUNERS if name not in QUANTIZERS]
OURS = ("rtn", "gptq", "magnitude", "sparsegpt", "sparsegpt_gptq")
EXACT = OURS                                               # they count over the whole layer
SECOND_ORDER = [name for name in NAMES if COMPRESSORS[name].takes_H]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(out=24, columns=48, dtype=torch.float32, tokens=400, seed=0):
    """A random W (out, in), correlated inputs X (tokens, in) and their H."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, columns)[:, None]
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * scales
    X = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    W, H = torch.randn(out, columns, generator=generator, dtype=torch.float64), X.T @ X / tokens
    return W.to(dtype), X, H if dtype == torch.float64 else H.float()


def run(name, W, H, details=None, **settings):
    """One entry of COMPRESSORS with those of the settings that it takes. -> Q."""
    function, takes_H, takes = COMPRESSORS[name]
    settings = {key: value for key, value in settings.items() if key in takes}
    return function(*([W, H] if takes_H else [W]), **settings, details=details)


def output_error(W, Q, X):
    """||X (W - Q)^T||, the slow way."""
    return (X @ (W.double() - Q.double()).T).norm()


# --- contracts ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_determinism_and_an_untouched_input(name, dtype):
    for out in (24, 1):
        W, X, H = problem(out, dtype=dtype)
        W[0] = 0 if out > 1 else W[0]                      # an all-zero row
        before, H_before = W.clone(), H.clone()
        Q = run(name, W, H, group_size=16)
        assert Q.shape == W.shape and Q.dtype == dtype and Q.is_contiguous() and Q.isfinite().all()
        assert torch.equal(Q, run(name, W, H, group_size=16)) and not torch.equal(Q, W)
        # the same W stored the other way round, as GPT-2's layers are
        assert torch.equal(Q, run(name, W.T.contiguous().T, H, group_size=16))
        assert torch.equal(W, before) and torch.equal(H, H_before), "the input was changed"
        assert out == 1 or (Q[0] == 0).all()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels_per_group(name, bits, sym):
    W, X, H = problem(columns=80)
    for group_size in (16, 64, -1):                        # 64: the last group is short; -1: the whole row
        details = {}
        Q = run(name, W, H, details, bits=bits, group_size=group_size, sym=sym, sparsity=0.0)
        groups = Q.split(80 if group_size == -1 else group_size, dim=1)
        levels = [len(row.unique()) for group in groups for row in group]
        assert max(levels) <= 2 ** bits
        assert bits > 3 or group_size == 16 or max(levels) == 2 ** bits, "levels are wasted"
        grid = details["grid"]
        assert torch.equal(grid.dequantize(), Q) and grid.scale.shape == (24, len(groups)) and grid.sym == sym


@pytest.mark.parametrize("name", QUANTIZERS)
def test_more_bits_and_smaller_groups_lose_less(name):
    W, X, H = problem(64, 128, tokens=800)
    error = lambda **settings: output_error(W, run(name, W, H, **settings, sparsity=0.0), X)
    assert error(bits=2) > error(bits=3) > error(bits=4) > error(bits=8) > 0
    assert error(group_size=-1) > error(group_size=32) > error(group_size=8)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", PRUNERS)
def test_sparsity_is_exact(name, sparsity):
    for dtype in (torch.float32, torch.float16):
        W, X, H = problem(23, 48, dtype)
        zeros = int((run(name, W, H, sparsity=sparsity) == 0).sum())
        wanted, slack = round(sparsity * W.numel()), 0 if name in EXACT else len(W)    # who counts per row may
        assert abs(zeros - wanted) <= slack if name in ONLY_PRUNE else zeros >= wanted - slack     # round each


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("name", [name for name in PRUNERS if "pattern" in COMPRESSORS[name].settings])
def test_n_of_m_is_exact(name, pattern):
    n, m = map(int, pattern.split(":"))
    W, X, H = problem()
    kept = (run(name, W, H, pattern=pattern) != 0).view(-1, m).sum(1)
    assert (kept == n).all() if name in ONLY_PRUNE else (kept <= n).all()


@pytest.mark.parametrize("name", ONLY_PRUNE)
def test_sparsity_0_changes_nothing_and_ties_are_exact(name):
    W, X, H = problem()
    assert torch.equal(run(name, W, H, sparsity=0.0), W)
    ties = torch.ones(10, 48)
    slack = 0 if name in EXACT else len(ties)
    assert abs(int((run(name, ties, torch.eye(48), sparsity=0.3) == 0).sum()) - 144) <= slack
    if "pattern" in COMPRESSORS[name].settings:
        assert (run(name, ties, torch.eye(48), pattern="2:4") == 0).view(-1, 4).sum(1).eq(2).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_kept(name):
    """Compressing what is pruned already loses none of its zeros: at 40 % before and 50 % asked for, and at
    60 %."""
    for before in (0.4, 0.6):
        W, X, H = problem(columns=192)  # two blocks: errors reach the zeros of the second before its turn
        W = magnitude(W, before)
        for pattern in (None, "2:4"):
            Q = run(name, W, H, group_size=16, sparsity=0.5, pattern=pattern)
            assert (Q[W == 0] == 0).all() and (Q != 0).any()
            if name in ONLY_PRUNE and pattern is None:     # what is zero already counts
                assert int((Q == 0).sum()) == round(max(before, 0.5) * W.numel())


@pytest.mark.parametrize("settings", [dict(bits=2), dict(bits=3, group_size=16), dict(bits=4, sym=True),
                                      dict(sparsity=0.7),
                                      dict(pattern="2:4"), dict(bits=3, act_order=True)], ids=str)
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_beats_the_baseline_on_correlated_inputs(name, settings):
    for dtype in (torch.float32, torch.bfloat16):
        W, X, H = problem(64, 96, dtype, 800)
        baseline = run("magnitude", W, H, **settings) if name in PRUNERS else W
        baseline = run("rtn", baseline, H, **settings) if name in QUANTIZERS else baseline
        assert output_error(W, run(name, W, H, **settings), X) < output_error(W, baseline, X)


BAD = {"bits": [0, 1, 9], "group_size": [0, -2], "sparsity": [-0.1, 1.1, float("nan")], "percdamp": [0, -1.0],
       "pattern": ["4:2", "0:4", "x", "2:4:8", "2:5"], "scope": ["column"]}


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_refused(name):
    """By the walk, for every entry; by our own functions too, which courses call."""
    model, calibration = tiny_model("llama"), torch.randint(3, 97, (1, 8))
    W, X, H = problem()
    for setting in BAD.keys() & set(COMPRESSORS[name].settings):
        for value in BAD[setting]:
            with pytest.raises(UserError, match=f"--{setting.replace('_', '-')} {value}"):
                compress_model(model, None, name, calibration, **{setting: value})
            if name in OURS:
                with pytest.raises(UserError, match=f"--{setting.replace('_', '-')} {value}"):
                    run(name, W, H, **{setting: value})


# --- grids --------------------------------------------------------------------------------------------------

def test_rtn_by_hand():
    W = torch.tensor([[-1.0, 0.1, 0.6, 2.0]])
    # 2 bits: scale (2 + 1) / 3 = 1, zero 1, points -1 0 1 2; symmetric: scale 4 / 3, zero 2, points -8/3 -4/3
    # 0 4/3
    assert torch.equal(rtn(W, 2, -1), torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    assert torch.allclose(rtn(W, 2, -1, sym=True), torch.tensor([[-4 / 3, 0.0, 0.0, 4 / 3]]), atol=1e-3)
    # all of one sign: 0 is still a point
    assert torch.equal(rtn(torch.tensor([[1.5, 3.0]]), 2, -1), torch.tensor([[2.0, 3.0]]))


def test_rtn_leaves_its_own_grid_alone_and_goes_to_the_nearest_point():
    W, details = problem()[0], {}
    Q = rtn(W, 3, 16, details=details)
    grid = details["grid"]
    # (out, groups, 8)
    points = grid.scale.float()[..., None] * (torch.arange(8) - grid.zero.float()[..., None])
    nearest = (W.view(24, 3, 16, 1) - points[:, :, None]).abs().amin(-1).view(24, 48)
    assert torch.allclose((W - Q).abs(), nearest, atol=1e-6)


def test_groups_are_independent_and_the_last_may_be_short():
    W = problem(columns=40)[0]
    pieces = torch.cat([rtn(W[:, a:b], 3, -1) for a, b in ((0, 16), (16, 32), (32, 40))], 1)
    assert torch.equal(rtn(W, 3, 16), pieces)
    assert torch.equal(rtn(W, 3, 1000), rtn(W, 3, -1))


def test_extreme_rows_stay_finite():
    W = torch.tensor([[0.0, 0.0], [1e-12, -1e-12], [3e5, -1e5], [5.0, 5.0]])
    for sym in (False, True):
        for bits in (2, 8):
            Q = rtn(W, bits, -1, sym)
            assert Q.isfinite().all() and (Q[0] == 0).all() and Q[1].abs().max() < 1e-6


# --- twins --------------------------------------------------------------------------------------------------

def brute_force(W, H, bits=None, group=None, pattern=None, sparsity=None, block=None, percdamp=0.01,
                mse=False):
    """Optimal brain quantization and surgeon, left to right, with the inverse of what is left recomputed for
    every column."""
    W, columns = W.clone(), W.shape[1]
    H = H + percdamp * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    inverse = [torch.linalg.inv(H[i:, i:]) for i in range(columns)]
    loss = lambda a, b: torch.stack([W[:, j] ** 2 / inverse[j][0, 0] for j in range(a, b)], 1)  # (out, b - a)
    zero_here = torch.zeros_like(W, dtype=torch.bool)
    for i in range(columns):
        if pattern and i % pattern[1] == 0:
            for row, losses in enumerate(loss(i, i + pattern[1])):
                zero_here[row, i + losses.argsort()[:pattern[1] - pattern[0]]] = True
        if sparsity and i % block == 0:
            end = min(i + block, columns)
            wanted = round(sparsity * end * len(W)) - int(zero_here.sum())
            flat = loss(i, end).flatten().argsort()[:wanted]
            zero_here[flat // (end - i), i + flat % (end - i)] = True
        q = torch.where(zero_here[:, i], 0, W[:, i])
        if bits and i % group == 0:  # with mse, what is known to become zero asks nothing of the grid
            scale, zero = fit_grid((torch.where(zero_here, 0, W) if mse else W)[:, i:i + group], bits, False,
                                   mse)
        if bits:
            q = scale * ((q / scale).round() + zero).clamp(0, 2 ** bits - 1).sub(zero)
        error = (W[:, i] - q) / inverse[i][0, 0]
        W[:, i + 1:] -= error[:, None] * inverse[i][0, 1:]
        W[:, i] = q
    return W


@pytest.mark.parametrize("bits, group", [(2, 48), (3, 48), (3, 16), (4, 8), (3, 20)])
def test_gptq_equals_brute_force(bits, group):
    W, X, H = problem(dtype=torch.float64)
    assert torch.allclose(gptq(W, H, bits, group, block_size=16), brute_force(W, H, bits, group), atol=1e-9)


@pytest.mark.parametrize("bits, group", [(2, 16), (3, 48), (4, 20)])
@pytest.mark.parametrize("act_order", [False, True])
def test_static_groups(bits, group, act_order):
    """The grids are RTN's own, whatever the order and the block; the order is not stored; blocks do not
    matter."""
    W, X, H = problem(dtype=torch.float64)
    H[:, 5] *= 3                                           # so that act-order moves columns between groups
    H[5] *= 3
    settings, rounded, details = dict(bits=bits, group_size=group, static_groups=True,
                                      act_order=act_order), {}, {}
    Q = gptq(W, H, **settings, details=details)
    rtn(W, bits, group, details=rounded)
    assert torch.equal(details["grid"].scale, rounded["grid"].scale)
    assert torch.equal(details["grid"].zero, rounded["grid"].zero)
    assert details["grid"].order is None
    assert torch.allclose(details["grid"].dequantize().double(), Q, atol=1e-6)
    assert torch.allclose(gptq(W, H, **settings, block_size=7), Q, atol=1e-9)
    error = lambda Q: (((W - Q) @ H) * (W - Q)).sum()
    assert error(Q) < error(rtn(W, bits, group))


@pytest.mark.parametrize("bits, sym", [(2, False), (3, False), (3, True)])
def test_mse_grids_are_the_best_of_their_shares(bits, sym):
    """Row by row and share by share, the slow way; and most rows gain by clipping."""
    W = problem(dtype=torch.float64)[0]
    W[0] = 0
    scale, zero = fit_grid(W, bits, sym, mse=True)
    for row, one_scale, one_zero in zip(W, scale, zero):
        low, high, errors = min(row.min().item(), 0), max(row.max().item(), 0), {}
        low, high = (-max(-low, high), max(-low, high)) if sym else (low, high)
        for share in (1, *SHARES):
            s = float(torch.tensor((high - low) * share / (2 ** bits - 1)).half()) or 1.0
            z = 2 ** (bits - 1) if sym else round(float(-low * share / s))
            q = torch.tensor([s * (min(max(round(float(w) / s) + z, 0), 2 ** bits - 1) - z) for w in row])
            errors[s, z] = float(((row - q) ** 2).sum())
        assert errors[float(one_scale), int(one_zero)] == min(errors.values())
    whole = fit_grid(W, bits, sym)[0]
    assert (scale <= whole).all() and (scale < whole).float().mean() > 0.5


@pytest.mark.parametrize("name", QUANTIZERS)
def test_mse_loses_less(name):
    for seed in range(3):
        W, X, H = problem(64, 128, tokens=800, seed=seed)
        for settings in (dict(bits=2, sparsity=0.0), dict(bits=3, sparsity=0.0), dict(bits=2, sparsity=0.5),
                         dict(bits=2, pattern="2:4")):
            error = [output_error(W, run(name, W, H, **settings, mse=mse), X) for mse in (True, False)]
            assert error[0] < error[1], settings


@pytest.mark.parametrize("settings", [dict(pattern="2:4"), dict(pattern="4:8"), dict(sparsity=0.5),
                                      dict(sparsity=0.7),
                                      dict(pattern="2:4", bits=3, group_size=16),
                                      dict(sparsity=0.5, bits=3, group_size=16),
                                      dict(sparsity=0.5, bits=3, group_size=16, mse=True),
                                      dict(pattern="2:4", bits=2, group_size=16, mse=True)], ids=str)
def test_sparsegpt_equals_brute_force(settings):
    W, X, H = problem(dtype=torch.float64)
    slow = dict(bits=settings.get("bits"), group=settings.get("group_size"),
                sparsity=settings.get("sparsity"), block=16, mse=settings.get("mse", False),
                pattern=tuple(map(int, settings["pattern"].split(":"))) if "pattern" in settings else None)
    assert torch.allclose(sparsegpt(W, H, **settings, block_size=16), brute_force(W, H, **slow), atol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_h_proportional_to_identity_is_rtn(scale, act_order):
    W = problem()[0]
    for bits, group, sym in ((2, 16, False), (3, -1, False), (3, 20, True), (4, 16, True)):
        assert torch.equal(gptq(W, scale * torch.eye(48), bits, group, sym, act_order),
                           rtn(W, bits, group, sym))
        assert torch.equal(gptq(W, scale * torch.eye(48), bits, group, sym, mse=True),
                           rtn(W, bits, group, sym, mse=True))
    assert torch.equal(sparsegpt(W, scale * torch.eye(48), pattern="2:4"), magnitude(W, pattern="2:4"))
    assert torch.equal(sparsegpt(W, scale * torch.eye(48), 0.5), magnitude(W, 0.5))


@pytest.mark.parametrize("group", [4, 16, 20, 32, -1])
def test_block_size_changes_nothing(group):
    """Groups smaller than, equal to, larger than the block, and none that divides the other."""
    W, X, H = problem(columns=64, dtype=torch.float64)
    grid = dict(bits=3, group_size=group)
    for method, settings in ((gptq, grid), (gptq, dict(grid, act_order=True)),
                             (sparsegpt, dict(pattern="2:4")),
                             (sparsegpt, dict(grid, pattern="2:4"))):
        results = [method(W, H, **settings, block_size=size) for size in (1, 7, 16, 32, 1000)]
        assert all(torch.allclose(results[0], other, atol=1e-9) for other in results[1:])


def test_act_order():
    """Equal diagonal: off. Otherwise the same as sorting the columns by hand; and the order is a permutation
    that was stored."""
    W, X, H = problem(dtype=torch.float64)
    equal = (H / H.diagonal().sqrt() / H.diagonal().sqrt()[:, None]).fill_diagonal_(1)
    assert torch.equal(gptq(W, equal, act_order=True), gptq(W, equal))
    order, details = H.diagonal().argsort(descending=True), {}
    by_hand = gptq(W[:, order], H[order][:, order], 3, 16)[:, order.argsort()]
    assert torch.equal(gptq(W, H, 3, 16, act_order=True, details=details), by_hand)
    assert torch.equal(details["grid"].order, order)
    assert torch.equal(details["grid"].dequantize().double(), by_hand)
    assert not torch.equal(gptq(W, H, 3, 16), by_hand)


def test_dead_columns_are_rounded_and_disturb_nothing():
    W, X, H = problem(dtype=torch.float64)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[0, 17, 47]] = True
    H[dead], H[:, dead] = 0, 0
    for act_order in (False, True):
        details = {}
        Q = gptq(W, H, 8, -1, act_order=act_order, details=details)
        assert "note" not in details and ((W - Q)[:, dead].abs() <= details["grid"].scale.double()).all()
        # the scale of H means nothing, dead columns or not
        assert torch.equal(gptq(W, H * 1e-6, 8, -1, act_order=act_order), Q)
    assert (sparsegpt(W, H, 0.5)[:, dead] == 0).all(), "what no token excites goes first"
    # four dead columns at the end: the others come out as if they were not there
    more, H_more = torch.cat([W, W[:, :4]], 1), torch.zeros(52, 52, dtype=torch.float64)
    H_more[:48, :48] = problem(dtype=torch.float64)[2]
    without = sparsegpt(W, H_more[:48, :48], pattern="2:4")
    assert torch.allclose(sparsegpt(more, H_more, pattern="2:4")[:, :48], without, atol=1e-9)


def test_few_tokens_are_enough():
    """Rank 5 of 48: damping makes it solvable, and the result still beats rounding on those tokens."""
    W, X, H = problem(tokens=5)
    for method, baseline in ((gptq, rtn), (sparsegpt, magnitude)):
        details = {}
        Q = method(W, H, details=details)
        assert "note" not in details and output_error(W, Q, X) < 0.5 * output_error(W, baseline(W), X)


@pytest.mark.parametrize("bad", ["nan", "inf", "indefinite", "zero"])
def test_hopeless_h_falls_back_and_says_so(bad):
    W, H = problem()[0], torch.eye(48)
    if bad == "indefinite":
        H[0, 1] = H[1, 0] = 100
    elif bad == "zero":
        H.zero_()
    else:
        H[3, 5] = H[5, 3] = float(bad)
    for name in SECOND_ORDER:
        details = {}
        Q = run(name, W, H, details)
        expected = run("magnitude", W, H) if name in PRUNERS else W
        expected = run("rtn", expected, H) if name in QUANTIZERS else expected
        assert torch.equal(Q, expected) and "unusable Hessian" in details["note"]
        assert 0 < compress.relative_error(W, Q, H) < 1 or bad in ("indefinite", "zero")


# --- not a number -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", OURS)
def test_weights_that_are_not_finite_are_refused(name, bad):
    for dtype in DTYPES:
        W, X, H = problem(dtype=dtype)
        W[3, 7] = float(bad)
        with pytest.raises(ValueError, match="not finite"):
            run(name, W, H)


@pytest.mark.parametrize("size", [1e15, 1e19, 1e20, 1e30])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_a_huge_activation_gives_finite_weights(name, size):
    """x^2 overflows float32 from 1e19.3 on: then it is RTN or magnitude, and a note says so."""
    W, X, H = problem()
    X[0, 5] = size
    H = (X.T @ X / len(X)).float()
    for settings in (dict(), dict(act_order=True), dict(static_groups=True), dict(pattern="2:4"),
                     dict(bits=8, group_size=-1)):
        details = {}
        Q = run(name, W, H, details, **settings)
        assert Q.isfinite().all() and 0 <= compress.relative_error(W, Q, H) < 10
        if not H.isfinite().all():
            assert "unusable Hessian" in details["note"]


@pytest.mark.parametrize("scale", [1e-40, 2.0**-100, 2.0**100, 1e35])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_size_of_h_means_nothing(name, scale):
    """Up to where float32 ends: beyond, the answer is still finite."""
    W, X, H = problem()
    details = {}
    Q = run(name, W, H * scale, details)
    assert Q.isfinite().all() and compress.relative_error(W, Q, H * scale) < 1
    if 1e-35 < scale < 1e35:
        assert torch.equal(Q, run(name, W, H)) and "note" not in details


@pytest.mark.parametrize("name", NAMES)
def test_large_weights_in_float16(name):
    """A grid, or a correction, may reach beyond 65,504: what comes out is finite all the same."""
    W, X, H = problem(dtype=torch.float16)
    W = W.float()
    W[0], W[1, 0], W[2] = W[0] * 2e4, 65504, -65504
    W = W.clamp(-65504, 65504).half()
    for settings in (dict(bits=3, group_size=-1), dict(bits=2, group_size=16), dict(bits=4, sym=True),
                     dict(sparsity=0.7)):
        details = {}
        Q = run(name, W, H, details, **settings)
        assert Q.dtype == torch.float16 and Q.isfinite().all() and compress.relative_error(W, Q, H) < 2
        if "grid" in details:
            assert torch.equal(details["grid"].round(Q),
                               Q) and torch.equal(details["grid"].dequantize(torch.float16), Q)


@pytest.mark.parametrize("weights, inputs", [(1e30, 1.0), (1.0, 1e37), (1e-30, 1e-30), (0.0, 1.0), (1.0, 0.0),
                                             (1e38, 1e37)])
def test_the_error_is_a_number_whatever_the_scale(weights, inputs):
    W, X, H = problem()
    Q = magnitude(W, 0.5)
    error = compress.relative_error(W * weights, Q * weights, H * inputs)
    expected = compress.relative_error(W, Q, H) if weights and inputs else 0
    assert error == pytest.approx(expected, rel=1e-3)


def test_a_layer_whose_inputs_overflow_is_named():
    """Block 1 multiplies beyond what float32 holds: block 2 reads infinities, and the message says where."""
    model = tiny_model("llama")
    for layer, factor in (("up_proj", 1e4), ("gate_proj", 1e4), ("down_proj", 1e38)):
        getattr(model.model.layers[1].mlp, layer).weight.data *= factor
    with pytest.raises(UserError, match=r"^--model: .*model\.layers\.2\.self_attn\.q_proj.*float32"):
        compress_model(model, None, "magnitude", CALIBRATION, sparsity=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_with_a_nan_is_named(name, any_model):
    for place in (-1, 0):
        path = list(linears(any_model))[place]
        linears(any_model)[path][0].weight.data.view(-1)[11] = float("nan")
        with pytest.raises(UserError, match=f"^--model: {path.replace('.', '[.]')} .*not finite"):
            compress_model(any_model, None, name, CALIBRATION)


def test_float16_overflow_is_named():
    model = tiny_model("llama").half()
    model.model.layers[0].mlp.down_proj.weight.data *= 1e4
    model.model.layers[0].mlp.up_proj.weight.data *= 1e4
    with pytest.raises(UserError, match=r"^--model: .*model\.layers\.[01]\..*float32"):
        compress_model(model, None, "magnitude", CALIBRATION, sparsity=0.1)


def test_damping_is_raised_before_giving_up():
    W, X, H = problem()
    # its smallest eigenvalues are negative, less than ten dampings
    H -= 0.05 * H.diagonal().mean() * torch.eye(48)
    details = {}
    Q = gptq(W, H, details=details)
    assert details["note"] == "damping raised to 0.1" and output_error(W, Q, X) < output_error(W, rtn(W), X)


def test_relative_error_is_that_of_the_outputs():
    W, X, H = problem(dtype=torch.float64)
    Q = rtn(W)
    slow = (output_error(W, Q, X) / (X @ W.T).norm()).item()
    assert compress.relative_error(W, Q, H.float()) == pytest.approx(slow, rel=1e-4)


# --- the walk -----------------------------------------------------------------------------------------------

CALIBRATION = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))


def linears(model):
    """{path: (module, is its weight transposed)} of every linear layer inside the blocks, found by class
    name."""
    blocks = architectures.arch_of(model).blocks + "."
    return {path: (module, type(module).__name__ == "Conv1D") for path, module in model.named_modules()
            if path.startswith(blocks) and type(module).__name__ in ("Linear", "Conv1D")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_every_block_is_fed_by_compressed_predecessors(arch, attention, monkeypatch):
    """The twin: the whole model runs for every layer; its H is taken by a hook, in float64; blocks before are
    compressed."""
    seen = []
    def recorded(W, H, details=None):
        seen.append((W.clone(), H.clone()))
        return rtn(W, 2, -1)
    monkeypatch.setitem(COMPRESSORS, "recorded", Compressor(recorded, True, ()))
    model, twin = tiny_model(arch), tiny_model(arch)
    for m in (model, twin):
        m.set_attn_implementation(attention)
    report = compress_model(model, None, "recorded", CALIBRATION)
    assert list(report["layers"]) == list(linears(model))
    for i, block in enumerate(architectures.blocks_of(twin)):
        inside = [path for path in linears(twin) if path.startswith(f"{architectures.arch_of(twin).blocks}.{i}.")]
        H = {path: slow_hessian(twin, path) for path in inside}
        for path in inside:
            module, transposed = linears(twin)[path]
            W, got = seen.pop(0)
            assert torch.equal(W, module.weight.T if transposed else module.weight)
            assert torch.allclose(got.double(), H[path], rtol=1e-4, atol=1e-5 * H[path].abs().max()), path
            Q = rtn(W, 2, -1)
            module.weight.data = Q.T.contiguous() if transposed else Q
    after, expected = model.state_dict(), twin.state_dict()
    assert all(torch.equal(after[key], expected[key]) for key in expected)


def slow_hessian(model, path):
    """Mean of x x^T over all tokens that the layer reads in a forward pass of the whole model."""
    rows = []
    hook = lambda layer, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))             # (tokens, in)
    handle = model.get_submodule(path).register_forward_pre_hook(hook)
    for chunk in CALIBRATION:
        model(chunk[None])
    handle.remove()
    X = torch.cat(rows).double()
    assert len(X) == CALIBRATION.numel()
    return X.T @ X / len(X)


@pytest.mark.parametrize("name", NAMES)
def test_only_block_linears_change(name, any_model):
    before = {key: value.clone() for key, value in any_model.state_dict().items()}
    report = compress_model(any_model, None, name, CALIBRATION)
    inside = {f"{path}.weight" for path in linears(any_model)}
    assert {f"{path}.weight" for path in report["layers"]} == inside and len(inside) >= 12
    for key, value in any_model.state_dict().items():
        assert torch.equal(value, before[key]) != (key in inside), key
        assert value.dtype == before[key].dtype and value.shape == before[key].shape and value.is_contiguous()


def test_hessians_do_not_mix_layers_whose_inputs_reuse_memory():
    """An input that is freed makes room for the next of the same shape: same address, another tensor."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        def forward(self, x):
            for k, layer in enumerate(self.layers):
                layer(x * (k + 1))                         # freed at once
            return x
    x = torch.randn(1, 50, 64)
    for k, H in enumerate(hessians(Block(), [x, x], {}).values()):
        assert torch.allclose(H, (k + 1) ** 2 * x[0].T @ x[0] / 50, rtol=1e-4, atol=1e-4)


def test_layers_that_read_the_same_tensor_share_one_h():
    model = tiny_model("llama")
    hidden, kwargs = compress.first_block_inputs(model, CALIBRATION, "cpu")
    H = hessians(architectures.blocks_of(model)[0], hidden, kwargs)
    assert H["self_attn.q_proj"] is H["self_attn.k_proj"] and H["mlp.gate_proj"] is H["mlp.up_proj"]
    assert len({id(h) for h in H.values()}) == 4


def test_one_block_at_a_time_on_the_device(monkeypatch):
    model, moves = tiny_model("llama"), []
    for i, block in enumerate(architectures.blocks_of(model)):
        def to(device, i=i, block=block):
            moves.append((i, str(device)))
            return nn.Module.to(block, device)
        monkeypatch.setattr(block, "to", to)
    compress_model(model, None, "rtn", CALIBRATION, device="cpu:0")
    assert moves == [(i, place) for i in range(3) for place in ("cpu:0", "cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_for_the_blocks_gives_the_same_error():
    model, other = tiny_model("llama"), tiny_model("llama")
    here, there = (compress_model(m, None, "gptq", CALIBRATION, device=d, grids={}) for m,
                   d in ((model, "cpu"), (other, "cuda")))
    assert other.device.type == "cpu" and there["mean_error"] == pytest.approx(here["mean_error"], rel=0.05)


# --- the report ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, settings, expected", [
    ("rtn", dict(bits=3, group_size=16), 3 + (16 + 3) / 16),
    ("rtn", dict(bits=4, group_size=16, sym=True), 4 + 16 / 16),
    ("gptq", dict(bits=2, group_size=8), 2 + (16 + 2) / 8), ("magnitude", dict(sparsity=0.5), 1 + 0.5 * 32),
    ("magnitude", dict(sparsity=0.0), 32), ("sparsegpt", dict(pattern="1:4"), 1 + 32 / 4)])
def test_bits_per_weight_by_hand(name, settings, expected):
    model = tiny_model("llama")
    report = compress_model(model, None, name, CALIBRATION, **settings)
    assert report["bits_per_weight"] == pytest.approx(expected, rel=1e-3)
    inside = sum(module.weight.numel() for module, _ in linears(model).values())
    rest = 4 * (sum(p.numel() for p in model.parameters()) - inside)
    assert report["weight_bytes"] == pytest.approx(rest + inside * expected / 8, rel=1e-3)


def test_the_report():
    report = compress_model(tiny_model("gpt2"), None, "sparsegpt", CALIBRATION, pattern="1:4", bits=3)
    json.dumps(report, allow_nan=False)
    # what the pattern overrides, and what only another compressor takes, is not listed
    assert report["settings"] == {"pattern": "1:4", "percdamp": 0.01}
    assert report["sparsity"] == 0.75 and report["calibration"] == {"nsamples": 3, "seqlen": 20}
    assert all({"error", "sparsity", "weights", "bits",
                "seconds"} <= set(row) for row in report["layers"].values())
    assert all(0 < row["error"] < 1 for row in report["layers"].values())
    assert "75.00 % zeros" in compress.summary(report)


def test_joint_quantizes_by_default():
    model = tiny_model("llama")
    compress_model(model, None, "sparsegpt_gptq", CALIBRATION)
    assert max(len(row.unique()) for module, _ in linears(model).values() for row in module.weight) <= 8


@pytest.mark.parametrize("settings, word", [
    (dict(name="zip"), "--compressor zip"), (dict(name="gptq", group=64), "group"),
    (dict(name="rtn", bits=1), "--bits 1"),
    (dict(name="magnitude", pattern="2:5"), "--pattern 2:5"),
    (dict(name="sparsegpt_gptq", pattern="2:4", group_size=6), "--group-size 6")])
def test_mistakes_are_found_before_any_forward_pass(settings, word, monkeypatch):
    monkeypatch.delattr(compress, "first_block_inputs")
    with pytest.raises(UserError, match=word):
        compress_model(tiny_model("llama"), None, settings.pop("name"), CALIBRATION, **settings)


# --- the command --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    ([], "--out"), (["--compressor", "zip"], "--compressor"), (["--bits", "9"], "--bits"),
    (["--bits", "1"], "--bits"),
    (["--bits", "x"], "--bits"), (["--group-size", "0"], "--group-size"),
    (["--sparsity", "1.0"], "--sparsity"),
    (["--sparsity", "-1"], "--sparsity"), (["--percdamp", "0"], "--percdamp"),
    (["--pattern", "4:2"], "--pattern"),
    (["--nsamples", "0"], "--nsamples"), (["--seqlen", "0"], "--seqlen"),
    (["--model", "no/such/folder"], "--model"),
    (["--device", "tpu"], "--device"), (["--scope", "column"], "--scope"), (["--out", ""], "--out"),
    (["--compressor", "magnitude", "--pattern", "2:5"], "--pattern"), (["--seqlen", "100000"], "--seqlen"),
    (["--compressor", "sparsegpt_gptq", "--pattern", "2:4", "--group-size", "6"], "--group-size"),
    (["--compressor", "rtn", "--sparsity", "0.5"], "--sparsity"), (["--bits", "3"], "--bits"),
    (["--sym"], "--sym"),
    (["--compressor", "gptq", "--pattern", "2:4"], "--pattern"),
    (["--sparsity", "0.5", "--pattern", "2:4"], "--sparsity"),
    (["--compressor", "rtn", "--act-order"], "--act-order"), (["--tasks", "toy_recall"], "--tasks"),
    (["--text", "nonsense"], "--text")])
def test_a_mistake_is_one_line(flags, word, capsys, tmp_path):
    """One line `error: ...` that names the flag, exit code 2, nothing written."""
    out = [] if not flags or "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: compress.main(out + flags))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and word in err[0]
    assert list(tmp_path.iterdir()) == []


QUICK = ["--compressor", "rtn", "--nsamples", "2", "--seqlen", "8"]


@pytest.mark.parametrize("flags", [[*QUICK], [*QUICK, "--packed"], ["--sparsity", "0.5"],
                                   ["--pattern", "2:4", "--packed"],
                                   ["--compressor", "gptq", "--act-order", "--nsamples", "2", "--packed"]],
                         ids=str)
def test_the_folder_loads_back_as_what_the_walk_left(flags, tmp_path, capsys):
    """In this process: the model that compress_model left in memory is the one that the folder holds."""
    compress.main([*flags, "--out", str(tmp_path / "m")])
    args = compress.parse([*flags, "--out", "x"])
    twin, tokenizer = models.load_model("toy")
    ids = compress.load_text("toy", tokenizer)
    calibration = compress.calibration_ids(ids, args.nsamples, args.seqlen)
    report = compress_model(twin, tokenizer, args.compression[0], calibration, **args.compression[1])
    loaded = models.load_model(str(tmp_path / "m"))[0]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in twin.state_dict().items())
    assert loaded.compression["mean_error"] == report["mean_error"]
    assert loaded.compression["base_model"] == "toy"
    assert loaded.compression["calibration"] == {"nsamples": args.nsamples, "seqlen": args.seqlen,
                                                 "text": "toy", "seed": 0}
    assert (tmp_path / "m" / packing.FILE).exists() == ("--packed" in flags)
    assert (tmp_path / "m" / packing.GRIDS).exists() == ("--packed" not in flags and "--compressor" in flags)
    assert f"{report['bits_per_weight']:.3f} bits per weight" in capsys.readouterr().out


def test_a_repeated_command_is_refused_and_nothing_is_lost(tmp_path):
    """Not even a file that was laid into the folder, or stands beside it."""
    neighbours(tmp_path)
    command = [*QUICK, "--out", str(tmp_path / "m")]
    compress.main(command)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(UserError, match="^--out .*holds .* already"):
        compress.main(command)
    assert listing(tmp_path) == before and before["m.tmp/n.txt"] == b"mine"


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compress.main([*QUICK, "--out", str(tmp_path / "link")])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "compression.json").exists()


def test_mistakes_about_out_come_before_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "load_model",
                        lambda *args: pytest.fail("work was done before --out was looked at"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / ".taken.lock").write_bytes(b"\xff mine")
    for out in ("file", "file/x", ".", "full", "taken", "/", "n" * 250, "a\0b", "/proc/x"):
        with pytest.raises(UserError, match="^--out"):
            compress.main([*QUICK, "--out", out])
    assert sorted(listing(tmp_path)) == [".taken.lock", "file", "full/thesis.tex"]


def test_of_two_runs_at_once_the_second_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "load_model", lambda *args: pytest.fail("work was done before the claim"))
    with output.claim(str(tmp_path / "m")):
        before = listing(tmp_path)
        with pytest.raises(UserError, match="^--out .*another run"):
            compress.main([*QUICK, "--out", str(tmp_path / "m")])
        code, text = run_forked(compress.main, [*QUICK, "--out", str(tmp_path / "m")])
        assert code == 2 and "another run is writing there" in text and listing(tmp_path) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_a_compressed_folder_is_not_compressed_again(packed, tmp_path):
    compress.main([*QUICK, *packed, "--out", str(tmp_path / "m")])
    with pytest.raises(UserError, match="^--model .*compressed already .*dense model, toy"):
        compress.main([*QUICK, "--model", str(tmp_path / "m"), "--text", "toy", "--out",
                       str(tmp_path / "again")])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("arch, positions", [("gpt2", "n_positions"), ("opt", "max_position_embeddings"),
                                             ("llama", "max_position_embeddings")])
def test_more_tokens_than_positions_are_refused_before_work(arch, positions, tmp_path, monkeypatch):
    folder = save_tiny(tiny_model(arch, **{positions: 80}), tmp_path / "base")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(300)))
    command = ["--model", str(folder), "--text", str(tmp_path / "text.txt"), "--compressor", "rtn",
               "--nsamples", "2"]
    compress.main([*command, "--seqlen", "80", "--out", str(tmp_path / "m")])
    monkeypatch.setattr(compress, "load_text", lambda *args: pytest.fail("the text was read first"))
    with pytest.raises(UserError, match="^--seqlen 81: .*80 tokens"):
        compress.main([*command, "--seqlen", "81", "--out", str(tmp_path / "n")])
    with pytest.raises(UserError, match="^--seqlen 512: "):
        compress.main([*command, "--out", str(tmp_path / "n")])
    assert not (tmp_path / "n").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("Mira Olsen was born in Alder.")
    with pytest.raises(UserError, match="^--seqlen 64: the text has only 7 tokens"):
        compress.main(["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "m")])


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_killed_at_every_file_operation(packed, tmp_path, monkeypatch):
    """What is there is the old state (nothing) or the whole folder; the next run works, and clears what was
    left."""
    small = tiny_model("llama", num_hidden_layers=1), tiny_tokenizer()
    small[0].compression = {}
    monkeypatch.setattr(compress, "load_model", lambda *args: small)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(300)))
    neighbours(tmp_path)
    before, out = listing(tmp_path), tmp_path / "m"
    command = [*QUICK, *packed, "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    names = {"config.json", "generation_config.json", "compression.json", "tokenizer.json",
             "tokenizer_config.json",
             *([packing.FILE] if packed else [packing.GRIDS, "model.safetensors"])}
    killed = 0
    for killed in kills(compress.main, command, lambda: shutil.rmtree(out, ignore_errors=True)):
        whole = out.exists()
        if whole:
            assert {path.name for path in out.iterdir()} == names, killed
            models.load_model(str(out))
        assert all(listing(tmp_path)[name] == data for name, data in before.items()), killed
        code, text = run_forked(compress.main, command)
        assert (code, "holds" in text) == ((2, True) if whole else (0, False)), text
        assert {path.name for path in out.iterdir()} == names
        assert {name for name in listing(tmp_path) if not name.startswith("m/")} == set(before), "leftovers"
    assert killed >= 15


def test_the_command_dense_and_packed(tmp_path):
    """compress.py in a process of its own, as dequantized weights and as true bits: the same model comes from
    both."""
    flags = ["--compressor", "gptq", "--act-order", "--nsamples", "4", "--seqlen", "32"]
    command = [sys.executable, str(ROOT / "compress.py"), *flags, "--packed", "--out",
               str(tmp_path / "packed")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "blocks:" not in run.stderr, "a progress bar without a terminal"
    compress.main([*flags, "--out", str(tmp_path / "dense")])
    dense, packed, toy = (models.load_model(name)[0].state_dict() for name in
                          (str(tmp_path / "dense"), str(tmp_path / "packed"), "toy"))
    assert all(torch.equal(value, packed[key]) for key, value in dense.items())
    assert sum(not torch.equal(value, toy[key]) for key, value in dense.items()) == 4 * 7
    reports = [json.loads((tmp_path / kind / "compression.json").read_text()) for kind in ("dense", "packed")]
    assert reports[1]["packed_bytes"] == (tmp_path / "packed" / "packed.safetensors").stat().st_size
    same = ("compressor", "settings", "base_model", "mean_error", "bits_per_weight", "weight_bytes")
    assert all(reports[0][key] == reports[1][key] for key in same)
    assert reports[0]["settings"]["act_order"] is True
    assert f"{reports[1]['bits_per_weight']:.3f} bits per weight" in run.stdout


def test_auto_dtype_is_that_of_the_device_that_works(tmp_path, monkeypatch):
    """The model lies on the CPU, but its blocks are worked on elsewhere: bfloat16 or float16 there."""
    asked = []
    def load(name, device, dtype):
        asked.append((device, dtype))
        raise UserError("enough")
    monkeypatch.setattr(compress, "load_model", load)
    monkeypatch.setattr(compress, "pick_device", lambda name: torch.device("mps"))
    monkeypatch.setattr(compress, "check_text", lambda name: None)
    for model in ("toy", "a/b"):
        with pytest.raises(UserError, match="enough"):
            compress.main(["--model", model, "--out", str(tmp_path / "m")])
    assert asked == [("cpu", torch.float32), ("cpu", torch.float16)]


def test_calibration_chunks():
    ids = torch.arange(30)
    chunks = compress.calibration_ids(ids, 200, 7)
    assert all(chunk.tolist() == list(range(chunk[0], chunk[0] + 7)) for chunk in chunks)
    assert chunks.min() == 0 and chunks.max() == 29
    assert torch.equal(chunks, compress.calibration_ids(ids, 200, 7))
    assert not torch.equal(chunks, compress.calibration_ids(ids, 200, 7, seed=1))


def test_mixed_windows_are_refused_beyond_the_window():
    """Blocks with a sliding window next to blocks without: within the window their masks agree, beyond it
    they do not."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=48,
                                         num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
                                         max_window_layers=1)).eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="at most 8"):
        compress_model(model, None, "rtn", ids)
    assert compress_model(model, None, "rtn", ids[:, :8])["compressor"] == "rtn"
