"""Compressors: pure functions from one weight matrix to another: round-to-nearest, GPTQ, magnitude pruning, SparseGPT.

    Q = rtn(W, bits=3, group_size=64)                      # W (out, in), any floating dtype -> Q, same shape and dtype
    Q = gptq(W, H, bits=3, group_size=64)                  # H (in, in): what the layer's inputs look like
    Q = sparsegpt(W, H, pattern="2:4")

compress.py walks a model with them. Sources: GPTQ: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", Algorithm 1. SparseGPT: Frantar and Alistarh 2023. Magnitude: the usual baseline.

Letters, as in GPTQ: W (out, in) weights, X (tokens, in) a layer's inputs, H (in, in) = mean of x x^T over calibration tokens,
U upper Cholesky factor of H^-1 (H^-1 = U^T U), Q the compressed W. The error that counts is ||X (W - Q)^T||^2.

DEVIATES from the GPTQ authors' code: a group's grid is fitted on weights that carry every earlier error, so the result does
not depend on the block size; columns that no token excites are rounded rather than zeroed; scales are rounded to float16
before use, so that what is stored is what was used; the mse search tries ten shares of the range by squared error, where the
authors try 80 by |error|^2.4.
"""
import dataclasses
import functools
import re

import torch

from loading import UserError


# --- 1. Grids: where quantized weights may lie -----------------------------------------------------------------------------

@dataclasses.dataclass
class Grid:
    """A quantized matrix: W[:, order[j]] = scale[:, j // group_size] * (code[:, j] - zero[:, j // group_size]).

    code (out, in) uint8, scale (out, groups) float16, zero (out, groups) uint8; order (in,) long or None (as they stand).
    """
    code: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int
    bits: int
    sym: bool
    order: torch.Tensor = None

    def dequantize(self):
        """-> W (out, in) float32. Exact: a float16 times a whole number below 256 fits into float32."""
        group = torch.arange(self.code.shape[1], device=self.code.device) // self.group_size   # (in,)
        W = self.scale.float()[:, group] * (self.code.float() - self.zero.float()[:, group])
        return W if self.order is None else W[:, self.order.argsort()]

    def cpu(self):
        """The same grid on the CPU."""
        return dataclasses.replace(self, **{k: v.cpu() for k, v in vars(self).items() if isinstance(v, torch.Tensor)})


SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)    # of the range, that mse tries besides the whole


def fit_grid(w, bits, sym, mse=False):
    """Scale and zero point of each row of a group. w: (out, group) -> scale (out,), zero (out,), as w's dtype.

    The grid spans min <= 0 <= max, so that 0 lies on it. mse: or that share of it which leaves the least squared error; the
    few weights beyond are clipped so that all others lie closer.
    """
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)                                 # (out,)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = grid_between(low, high, bits, sym)
    if mse:
        least = squared_error(w, scale, zero, bits)
        for share in SHARES:
            narrower = grid_between(share * low, share * high, bits, sym)
            error = squared_error(w, *narrower, bits)
            better = error < least
            least, scale, zero = (torch.where(better, *pair) for pair in zip((error, *narrower), (least, scale, zero)))
    return scale, zero


def grid_between(low, high, bits, sym):
    """scale = (high - low) / (2^bits - 1), zero = round(-low / scale). low, high (out,) -> scale, zero (out,)."""
    top, flat = 2 ** bits - 1, low == high                 # flat: an all-zero row, which any grid holds
    scale = ((high - low) / top).masked_fill(flat, 1)
    scale = scale.half().clamp(2 ** -24, 65504).to(low.dtype)  # as stored; the clamp keeps float16 from 0 and infinity
    zero = torch.full_like(scale, (top + 1) / 2) if sym else (-low / scale).round().clamp(0, top)
    return scale, zero


def squared_error(w, scale, zero, bits):
    """Of rounding each row to its grid. w (out, group), scale, zero (out,) -> (out,)."""
    scale, zero = scale[:, None], zero[:, None]
    return to_code(w, scale, zero, bits).sub_(zero).mul_(scale).sub_(w).square_().sum(1)


def to_code(w, scale, zero, bits):
    """Index of the nearest grid point. w, scale, zero (...) -> (...), whole numbers 0 .. 2^bits - 1 as w's dtype."""
    return (w / scale).round_().add_(zero).clamp_(0, 2 ** bits - 1)


def group_width(group_size, columns):
    """-1 or None: one group a row. -> columns per group; the last group may be shorter."""
    return columns if group_size in (-1, None) else min(group_size, columns)


def working(W):
    """Float32, or float64 if W is: half precision is for storing, not for solving."""
    return W if W.dtype == torch.float64 else W.float()


LIMITS = {  # setting -> (is a value allowed, in words, an example)
    "bits": (lambda v: v in range(2, 9), "2 to 8", 3),
    "group_size": (lambda v: v in (-1, None) or v >= 1, "at least 1, or -1 for one group a row", 64),
    "percdamp": (lambda v: v > 0, "above 0", 0.01),
    "block_size": (lambda v: v >= 1, "at least 1", 128),
    "sparsity": (lambda v: 0 <= v <= 1, "0 to 1", 0.5),
    "pattern": (lambda v: v is None or (re.fullmatch(r"\d+:\d+", v) and 0 < int(v.split(":")[0]) < int(v.split(":")[1])),
                "N:M with 0 < N < M", "2:4"),
    "scope": (lambda v: v in ("layer", "row"), "layer or row", "layer"),
    "nsamples": (lambda v: v >= 1, "at least 1", 32),
    "seqlen": (lambda v: v >= 1, "at least 1", 128),
}


def check(**settings):
    """Raise UserError, naming the flag, for a value outside LIMITS."""
    for name, value in settings.items():
        allowed, words, example = LIMITS[name]
        if not allowed(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {words}; use for example {example}")


# --- 2. Round to nearest --------------------------------------------------------------------------------------------------

def rtn(W, bits=3, group_size=64, sym=False, mse=False, details=None):
    """Each weight goes to the nearest point of its group's grid. W (out, in) -> Q, same shape and dtype.

    group_size: columns that share a grid, -1 for the whole row. mse: see fit_grid. details: a dict that receives the Grid.
    """
    check(bits=bits, group_size=group_size)
    width, codes, scales, zeros = group_width(group_size, W.shape[1]), [], [], []
    for w in working(W).split(width, dim=1):               # (out, width), the last one shorter
        scale, zero = fit_grid(w, bits, sym, mse)
        codes.append(to_code(w, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    grid = Grid(torch.cat(codes, 1).byte(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte(), width, bits, sym)
    if details is not None:
        details["grid"] = grid
    return grid.dequantize().to(W.dtype)


# --- 3. Second-order compression: one loop for GPTQ and SparseGPT ---------------------------------------------------------

def inverse_factor(H, percdamp):
    """U upper triangular with (H + damp mean(diag H) I)^-1 = U^T U. H (in, in) -> U (in, in), damp.

    damp is percdamp, raised tenfold up to three times while the factorisation fails; U is None if it always does.
    """
    mean = H.diagonal().mean()
    for damp in (percdamp * 10 ** attempt for attempt in range(4)):
        # Cholesky from the last row up: H = R R^T with R upper triangular, so H^-1 = R^-T R^-1 and U = R^-1. That is half the
        # work of Cholesky, inverse, Cholesky.
        damped = H.flip(0, 1)                              # a copy
        damped.diagonal().add_(damp * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U = torch.linalg.solve_triangular(L, torch.eye(len(H), dtype=H.dtype, device=H.device), upper=False).flip(0, 1)
            if U.sum().isfinite():                         # one NaN or infinity anywhere shows in the sum
                return U, damp
    return None, damp


def block_edges(columns, block_size, unit, inner=1):
    """(start, end) of the lazy blocks: whole units (groups), or parts of one unit that are multiples of `inner`.

    So no group starts inside a block whose errors have not all been passed on.
    """
    if unit <= block_size:
        starts = range(0, columns, block_size // unit * unit)
    else:
        step = max(block_size // inner, 1) * inner
        starts = [b for u in range(0, columns, unit) for b in range(u, min(u + unit, columns), step)]
    return list(zip(starts, [*starts[1:], columns]))


def second_order(W, H, bits=None, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128, sparsity=None,
                 pattern=None, static_groups=False, mse=False, details=None):
    """GPTQ (bits), SparseGPT (sparsity or pattern) or both at once. [GPTQ Alg. 1] W (out, in), H (in, in) -> Q (out, in).

    Columns are compressed one by one; the error of each, divided by its diagonal entry of U, is spread over the columns that
    are still to come. Zeros of W stay zeros. Returns None when H cannot be factorised.
    """
    columns = W.shape[1]
    m = split_pattern(pattern, columns, group_size if bits else -1)[1] if pattern else 1
    H, order, width = working(H).clone(), None, group_width(group_size, columns)
    grids = [fit_grid(w, bits, sym, mse) for w in working(W).split(width, dim=1)] if static_groups else []
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)                             # (in,)
        H, W = H[order][:, order], W[:, order]
    dead = H.diagonal() == 0                               # no calibration token excites these inputs: nothing to correct
    H.diagonal()[dead] = H.diagonal().sum() / (~dead).sum()
    U, damp = inverse_factor(H, percdamp)
    if U is None:
        return None
    if damp > percdamp:
        details["note"] = f"damping raised to {damp:g}"
    state = Columns(W, U, dead, bits, width, sym, mse, sparsity, pattern, m)
    if static_groups:
        state.grids, state.group_of = grids, (torch.arange(columns) if order is None else order).div(width, rounding_mode="floor").tolist()
    for start, end in block_edges(columns, block_size, state.group if bits else m, m):
        state.compress(start, end)
    if bits:
        details["grid"] = state.grid(order, static_groups)
    Q = state.W.T if order is None else state.W.T[:, order.argsort()]                          # (out, in)
    return Q.to(W.dtype).contiguous()


class Columns:
    """The columns of one matrix on their way through the loop, each a contiguous row here: W (in, out), a copy.

    zeros (in, out) True where a weight is or becomes zero. Rows before the current one already hold Q.
    """

    def __init__(self, W, U, dead, bits, group, sym, mse, sparsity, pattern, m):
        self.W = working(W).T.clone(memory_format=torch.contiguous_format)                     # (in, out)
        self.U, self.U_diagonal, self.dead = U, U.diagonal().tolist(), dead
        self.bits, self.group, self.sym, self.mse = bits, group, sym, mse
        self.sparsity, self.pattern, self.m = sparsity, pattern, m
        self.zeros = self.W == 0
        self.code = torch.empty_like(self.W, dtype=torch.uint8) if bits else None
        self.grids, self.group_of = [], [i // group for i in range(len(self.W))]               # (scale, zero) of each group

    def compress(self, start, end):
        """Columns start .. end: the errors go to the rest of the block at once, to all later columns in one product."""
        W, U, errors = self.W, self.U, torch.empty_like(self.W[start:end])                     # (block, out)
        if self.sparsity is not None:
            self.choose_zeros(start, end)
        for i in range(start, end):
            if self.pattern and i % self.m == 0:
                self.choose_zeros(i, i + self.m)
            q = W[i].masked_fill(self.zeros[i], 0)         # (out,)
            if self.bits:
                q = self.quantize(i, q)
            # error_i = (w_i - q_i) / U_ii ;  w_j <- w_j - error_i U_ij for j > i
            error = torch.sub(W[i], q, out=errors[i - start]).div_(self.U_diagonal[i])
            W[i + 1:end].addr_(U[i, i + 1:end], error, alpha=-1)
            W[i] = q
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)                                 # (later, out)

    def quantize(self, i, q):
        """Column i to its grid. q (out,) -> (out,). A group's grid is fitted when its first column comes up."""
        if self.group_of[i] == len(self.grids):            # every earlier error has reached these columns
            w = self.W[i:i + self.group]                   # (group, out)
            if self.mse:                                   # what becomes zero has no error on any grid: it must not narrow this one
                w = w.masked_fill(self.zeros[i:i + self.group], 0)
            self.grids.append(fit_grid(w.T, self.bits, self.sym, self.mse))
        scale, zero = self.grids[self.group_of[i]]
        code = to_code(q, scale, zero, self.bits)
        self.code[i] = code
        return code.sub_(zero).mul_(scale)

    def choose_zeros(self, start, end):
        """Mark the weights of columns start .. end that become zero. [SparseGPT: mask selection]

        The loss of zeroing w_i alone is w_i^2 / U_ii^2; the smallest go, weights that are zero already first.
        """
        loss = (self.W[start:end] / self.U.diagonal()[start:end, None]) ** 2                   # (block, out)
        loss[self.dead[start:end]] = 0
        loss[self.zeros[start:end]] = -1
        if self.pattern:
            chosen = n_of_m_mask(loss.T, self.pattern).T
        else:                                              # counted from column 0, so that the whole matrix comes out exact
            chosen = smallest(loss, round(self.sparsity * end * loss.shape[1]) - int(self.zeros[:start].sum()))
        self.zeros[start:end] |= chosen

    def grid(self, order, static_groups=False):
        """The Grid of the finished matrix. Static groups stand as the columns of W do, so that no order is stored."""
        scales, zeros = zip(*self.grids)
        code = self.code.T if order is None or not static_groups else self.code.T[:, order.argsort()]
        return Grid(code.contiguous(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte(), self.group, self.bits,
                    self.sym, None if static_groups else order)


def gptq(W, H, bits=3, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128, static_groups=False,
         mse=False, details=None):
    """GPTQ [GPTQ Alg. 1]. W (out, in), H (in, in) -> Q, same shape and dtype as W.

    act_order: columns in descending order of diag H; groups are then consecutive in that order, which has to be stored.
    static_groups: all grids are fitted to W beforehand instead of to the current weights; groups stay where they are in W,
    also under act_order. mse: see fit_grid. A singular H: damping is raised, then RTN, and details["note"] says so.
    """
    check(bits=bits, group_size=group_size, percdamp=percdamp, block_size=block_size)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, act_order, percdamp, block_size, static_groups=static_groups, mse=mse,
                     details=details)
    if Q is None:
        details["note"] = "singular Hessian: RTN"
        Q = rtn(W, bits, group_size, sym, mse, details)
    return Q


def sparsegpt(W, H, sparsity=0.5, pattern=None, percdamp=0.01, block_size=128, bits=None, group_size=64, sym=False,
              mse=False, details=None):
    """SparseGPT: prune by w^2 / U_ii^2 block by block, correcting the rest; with bits, quantize in the same pass.

    W (out, in), H (in, in) -> Q, same shape and dtype as W. pattern "2:4" keeps 2 of every 4 consecutive inputs and overrides
    sparsity. A singular H: damping is raised, then magnitude (and RTN), and details["note"] says so.
    """
    check(sparsity=sparsity, pattern=pattern, percdamp=percdamp, block_size=block_size)
    if bits is not None:
        check(bits=bits, group_size=group_size)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, False, percdamp, block_size, None if pattern else sparsity, pattern,
                     mse=mse, details=details)
    if Q is None:
        details["note"] = "singular Hessian: magnitude"
        Q = magnitude(W, sparsity, pattern)
        Q = rtn(Q, bits, group_size, sym, mse, details) if bits else Q
    return Q


# --- 4. Pruning by size ---------------------------------------------------------------------------------------------------

def smallest(score, k):
    """True at exactly k smallest entries; among equals the first in memory order. score: any shape -> bool, same shape."""
    flat = score.reshape(-1)
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(k).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[:k - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view(score.shape)


def split_pattern(pattern, columns, group_size=-1):
    """"2:4" -> (2, 4): 2 of every 4 consecutive inputs are kept. Raises UserError when M does not divide the columns or the group."""
    n, m = (int(part) for part in pattern.split(":"))
    if columns % m:
        raise UserError(f"--pattern {pattern}: {m} must divide a layer's inputs, here {columns}; use for example 2:4")
    if group_width(group_size, columns) % m:
        raise UserError(f"--group-size {group_size}: {m} of --pattern {pattern} must divide it; use for example {16 * m}")
    return n, m


def n_of_m_mask(score, pattern):
    """True at the M - N smallest of every M consecutive columns. score (out, in) -> (out, in) bool."""
    n, m = split_pattern(pattern, score.shape[1])
    groups = score.reshape(-1, m)
    pruned = groups.argsort(dim=1, stable=True)[:, :m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, pruned, True).view(score.shape)


def magnitude(W, sparsity=0.5, pattern=None, scope="layer", details=None):
    """Zero the smallest |w|. W (out, in) -> Q, same shape and dtype. Exactly round(sparsity * count) zeros, ties included.

    scope: count over the whole "layer" or in each "row"; pattern "2:4" keeps 2 of every 4 and overrides both.
    """
    check(sparsity=sparsity, pattern=pattern, scope=scope)
    if pattern:
        mask = n_of_m_mask(W.abs(), pattern)
    elif scope == "row":
        order = W.abs().argsort(dim=1, stable=True)[:, :round(sparsity * W.shape[1])]
        mask = torch.zeros_like(W, dtype=torch.bool).scatter_(1, order, True)
    else:
        mask = smallest(W.abs(), round(sparsity * W.numel()))
    return W.masked_fill(mask, 0)


QUANT, SPARSE = ("bits", "group_size", "sym", "mse"), ("sparsity", "pattern")
COMPRESSORS = {  # name -> (function, does it take H, the command-line settings it takes)
    "rtn": (rtn, False, QUANT),
    "gptq": (gptq, True, QUANT + ("act_order", "static_groups", "percdamp")),
    "magnitude": (magnitude, False, SPARSE + ("scope",)),
    "sparsegpt": (sparsegpt, True, SPARSE + ("percdamp",)),
    "sparsegpt_gptq": (functools.partial(sparsegpt, bits=3), True, SPARSE + QUANT + ("percdamp",)),
}
# EXERCISE: add a compressor. One function W (, H) -> Q, one line above; tests/test_compress.py grades it.
