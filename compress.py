"""Compress: round-to-nearest, GPTQ, magnitude pruning and SparseGPT, one walk over the decoder blocks.

    python compress.py --model toy --compressor gptq --bits 3 --out runs/toy-gptq3           # seconds, CPU
    python compress.py --model facebook/opt-125m --compressor gptq --bits 3 --group-size -1 --text c4 --nsamples 128 \\
        --seqlen 2048 --device cuda --packed --out runs/opt-gptq3                            # one block on the GPU at a time

Sources: GPTQ: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
Algorithm 1. SparseGPT: Frantar and Alistarh 2023. Magnitude: the usual baseline. The paper compresses with 3-bit GPTQ and
with SparseGPT. lm_head and embeddings stay as they are.

Letters, as in GPTQ: W (out, in) weights, X (tokens, in) a layer's inputs, H (in, in) = mean of x x^T over calibration tokens,
U upper Cholesky factor of H^-1 (H^-1 = U^T U), Q the compressed W. The error that counts is ||X (W - Q)^T||^2.

DEVIATES from the GPTQ authors' code: a group's grid is fitted on weights that carry every earlier error, so the result does
not depend on the block size; columns that no token excites are rounded rather than zeroed; scales are rounded to float16
before use, so that what is stored is what was used.
"""
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import pathlib
import re
import sys
import time

import torch
import torch.nn as nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import loading
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


def fit_grid(w, bits, sym):
    """Scale and zero point of each row of a group. w: (out, group) -> scale (out,), zero (out,), as w's dtype.

    scale = (max - min) / (2^bits - 1), zero = round(-min / scale), with min <= 0 <= max so that 0 lies on the grid.
    """
    top, low, high = 2 ** bits - 1, w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    flat = low == high                                     # an all-zero row: any grid holds it
    scale = ((high - low) / top).masked_fill(flat, 1)
    scale = scale.half().clamp(2 ** -24, 65504).to(w.dtype)    # as stored; the clamp keeps float16 from 0 and infinity
    zero = torch.full_like(scale, (top + 1) / 2) if sym else (-low / scale).round().clamp(0, top)
    return scale, zero


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

def rtn(W, bits=3, group_size=64, sym=False, details=None):
    """Each weight goes to the nearest point of its group's grid. W (out, in) -> Q, same shape and dtype.

    group_size: columns that share a grid, -1 for the whole row. details: a dict that receives the Grid.
    """
    check(bits=bits, group_size=group_size)
    width, codes, scales, zeros = group_width(group_size, W.shape[1]), [], [], []
    for w in working(W).split(width, dim=1):               # (out, width), the last one shorter
        scale, zero = fit_grid(w, bits, sym)
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
                 pattern=None, static_groups=False, details=None):
    """GPTQ (bits), SparseGPT (sparsity or pattern) or both at once. [GPTQ Alg. 1] W (out, in), H (in, in) -> Q (out, in).

    Columns are compressed one by one; the error of each, divided by its diagonal entry of U, is spread over the columns that
    are still to come. Zeros of W stay zeros. Returns None when H cannot be factorised.
    """
    columns = W.shape[1]
    m = split_pattern(pattern, columns, group_size if bits else -1)[1] if pattern else 1
    H, order, width = working(H).clone(), None, group_width(group_size, columns)
    grids = [fit_grid(w, bits, sym) for w in working(W).split(width, dim=1)] if static_groups else []
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
    state = Columns(W, U, dead, bits, width, sym, sparsity, pattern, m)
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

    def __init__(self, W, U, dead, bits, group, sym, sparsity, pattern, m):
        self.W = working(W).T.clone(memory_format=torch.contiguous_format)                     # (in, out)
        self.U, self.U_diagonal, self.dead = U, U.diagonal().tolist(), dead
        self.bits, self.group, self.sym, self.sparsity, self.pattern, self.m = bits, group, sym, sparsity, pattern, m
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
            self.grids.append(fit_grid(self.W[i:i + self.group].T, self.bits, self.sym))
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
         details=None):
    """GPTQ [GPTQ Alg. 1]. W (out, in), H (in, in) -> Q, same shape and dtype as W.

    act_order: columns in descending order of diag H; groups are then consecutive in that order, which has to be stored.
    static_groups: all grids are fitted to W beforehand instead of to the current weights; groups stay where they are in W,
    also under act_order. A singular H: damping is raised, then RTN, and details["note"] says so.
    """
    check(bits=bits, group_size=group_size, percdamp=percdamp, block_size=block_size)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, act_order, percdamp, block_size, static_groups=static_groups, details=details)
    if Q is None:
        details["note"] = "singular Hessian: RTN"
        Q = rtn(W, bits, group_size, sym, details)
    return Q


def sparsegpt(W, H, sparsity=0.5, pattern=None, percdamp=0.01, block_size=128, bits=None, group_size=64, sym=False, details=None):
    """SparseGPT: prune by w^2 / U_ii^2 block by block, correcting the rest; with bits, quantize in the same pass.

    W (out, in), H (in, in) -> Q, same shape and dtype as W. pattern "2:4" keeps 2 of every 4 consecutive inputs and overrides
    sparsity. A singular H: damping is raised, then magnitude (and RTN), and details["note"] says so.
    """
    check(sparsity=sparsity, pattern=pattern, percdamp=percdamp, block_size=block_size)
    if bits is not None:
        check(bits=bits, group_size=group_size)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, False, percdamp, block_size, None if pattern else sparsity, pattern,
                     details=details)
    if Q is None:
        details["note"] = "singular Hessian: magnitude"
        Q = magnitude(W, sparsity, pattern)
        Q = rtn(Q, bits, group_size, sym, details) if bits else Q
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
    """"2:4" -> (2, 4): 2 of every 4 consecutive inputs are kept. Raises UserError when M divides not the columns or the group."""
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


QUANT, SPARSE = ("bits", "group_size", "sym"), ("sparsity", "pattern")
COMPRESSORS = {  # name -> (function, does it take H, the command-line settings it takes)
    "rtn": (rtn, False, QUANT),
    "gptq": (gptq, True, QUANT + ("act_order", "static_groups", "percdamp")),
    "magnitude": (magnitude, False, SPARSE + ("scope",)),
    "sparsegpt": (sparsegpt, True, SPARSE + ("percdamp",)),
    "sparsegpt_gptq": (functools.partial(sparsegpt, bits=3), True, SPARSE + QUANT + ("percdamp",)),
}
# EXERCISE: add a compressor. One function W (, H) -> Q, one line above; tests/test_compress.py grades it.


# --- 5. The walk over the blocks ---------------------------------------------------------------------------------------------

class Captured(Exception):
    """Raised by the capturing hook to stop the forward pass before the first block runs."""


@torch.no_grad()
def first_block_inputs(model, calibration, device):
    """What the first block is called with. calibration (nsamples, seqlen) -> [hidden (1, T, d), ...], keyword arguments.

    The other arguments (mask, positions) are those of one chunk: chunks are equally long and unpadded, so they are all alike.
    """
    block, hidden, kwargs = loading.blocks_of(model)[0], [], {}
    names = list(inspect.signature(block.forward).parameters)

    def capture(block, args, given):
        given = {**dict(zip(names, args)), **given}        # GPT-2 passes its mask by position
        hidden.append(given.pop(names[0]).to(device))
        kwargs.update({name: to_device(value, device) for name, value in given.items()})
        raise Captured

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    for row in calibration:
        with contextlib.suppress(Captured):
            model(row[None].to(model.device), use_cache=False)
    handle.remove()
    return hidden, kwargs


def to_device(value, device):
    """Tensors, and tuples of them such as (cos, sin), to the device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(to_device(v, device) for v in value) if isinstance(value, tuple) else value


def block_output(block, hidden, kwargs):
    """A block's hidden states, whether this version of transformers returns a tensor or a tuple."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def linears_of(block):
    """{name: layer} of the linear layers in a block; GPT-2 calls them Conv1D and stores W^T."""
    return {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def weight_of(layer):
    """A view of a layer's weight as W (out, in)."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


@torch.no_grad()
def hessians(block, hidden, kwargs):
    """H (in, in) float32 of every linear layer of a block, over all calibration tokens. -> {name: H}.

    Layers that read the same tensor (q, k and v; gate and up) share one H.
    """
    total, seen, handles, tokens = {}, {}, [], 0

    def accumulate(name, layer, args):
        leader, x = seen.setdefault(id(args[0]), (name, args[0]))   # keeps x alive: its id cannot pass to another tensor
        if leader == name:
            x = x.reshape(-1, x.shape[-1]).float()         # (tokens, in)
            total[name] = total[name].addmm_(x.T, x) if name in total else x.T @ x
        total[name] = total[leader]

    for name, layer in linears_of(block).items():
        handles.append(layer.register_forward_pre_hook(functools.partial(accumulate, name)))
    for x in hidden:
        block(x, **kwargs)
        seen.clear()
        tokens += x.shape[:-1].numel()
    for handle in handles:
        handle.remove()
    for H in {id(H): H for H in total.values()}.values():
        H /= tokens
    return total


def relative_error(W, Q, H):
    """||X (W - Q)^T|| / ||X W^T|| from H alone: ||X D^T||^2 = tokens * trace(D H D^T). An H that is not finite counts as I."""
    W, D = W.float(), W.float() - Q.float()
    norm = lambda D: ((D @ H if H.isfinite().all() else D) * D).sum().clamp(min=0).sqrt().item()
    return norm(D) / max(norm(W), 1e-12)


def check_model(model, name, settings):
    """-> the settings of compressor `name`, defaults filled in. Raises UserError for what cannot work on this model."""
    if name not in COMPRESSORS:
        raise UserError(f"--compressor {name}: unknown; use one of: {' '.join(sorted(COMPRESSORS))}")
    function, _, takes = COMPRESSORS[name]
    unknown = set(settings).difference(*(entry[2] for entry in COMPRESSORS.values()))
    if unknown:
        raise UserError(f"--compressor {name}: unknown settings: {' '.join(sorted(unknown))}; it takes: {' '.join(takes)}")
    settings = {key: settings.get(key, inspect.signature(function).parameters[key].default) for key in takes}
    check(**{key: value for key, value in settings.items() if key in LIMITS})
    if settings.get("pattern"):
        settings = {key: value for key, value in settings.items() if key not in ("sparsity", "scope")}     # overridden
        for layer in linears_of(loading.blocks_of(model)).values():
            split_pattern(settings["pattern"], weight_of(layer).shape[1], settings.get("group_size", -1))
    return settings


@torch.no_grad()
def compress_model(model, tokenizer, name, calibration, device=None, grids=None, **settings):
    """Compress every linear layer of every block, in place; each block sees what the compressed ones before it give out.

    calibration: (nsamples, seqlen) token ids. device: where blocks are worked on, one at a time; the model itself may stay on
    the CPU. grids: a dict that receives {layer name: Grid or None} for packing. settings: those of other compressors are
    ignored, so that one set of flags serves all. Returns the report. tokenizer: unused, kept so that a compressor that needs
    text can have it. Raises UserError for a name or a setting that does not exist or cannot work.
    """
    settings, start, layers = check_model(model, name, settings), time.time(), {}
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or []
    if window and len(set(kinds)) > 1 and calibration.shape[1] > window:
        raise UserError(f"--seqlen {calibration.shape[1]}: this model has blocks with and without a sliding window, and the walk "
                        f"gives all the same mask; use at most {window}")
    blocks, prefix, home = loading.blocks_of(model), loading.arch_of(model).blocks, model.device
    device = torch.device(device or home)
    hidden, kwargs = first_block_inputs(model, calibration, device)
    for i, block in enumerate(tqdm(blocks, desc=f"{name}, blocks", disable=None)):             # None: quiet unless a terminal
        block.to(device)
        H = hessians(block, hidden, kwargs)
        for layer_name, layer in linears_of(block).items():
            path = f"{prefix}.{i}.{layer_name}"
            layers[path], grid = compress_layer(layer, H[layer_name], name, settings)
            if grids is not None:
                grids[path] = grid and grid.cpu()
        for j, x in enumerate(hidden):                     # one by one: old and new states never stand side by side
            hidden[j] = block_output(block, x, kwargs)
        block.to(home)
    return make_report(model, name, settings, calibration, layers, time.time() - start)


def compress_layer(layer, H, name, settings):
    """Compress one linear layer in place. -> its lines of the report, its Grid or None."""
    function, takes_H, takes = COMPRESSORS[name]
    W, details, start = weight_of(layer), {}, time.time()                                      # (out, in)
    Q = function(W, H, **settings, details=details) if takes_H else function(W, **settings, details=details)
    row = {"error": relative_error(W, Q, H), "sparsity": (Q == 0).float().mean().item(), "weights": Q.numel(),
           "bits": stored_bits(Q, details.get("grid"), "sparsity" in takes), "seconds": round(time.time() - start, 3)}
    if "note" in details:
        row["note"] = details["note"]
    layer.weight.data = Q.T.contiguous() if isinstance(layer, Conv1D) else Q
    return row, details.get("grid")


def mask_pays(Q, value_bits):
    """Is one bit a weight and value_bits a nonzero shorter than value_bits a weight?"""
    return Q.numel() + int((Q != 0).sum()) * value_bits < Q.numel() * value_bits


def stored_bits(Q, grid, prunes):
    """Bits that packing.py stores for a matrix: codes or values, scales, zero points, order; with a mask where that pays."""
    value_bits = grid.bits if grid else 8 * Q.element_size()
    masked = prunes and mask_pays(Q, value_bits)
    bits = Q.numel() + int((Q != 0).sum()) * value_bits if masked else Q.numel() * value_bits
    if grid:
        bits += grid.scale.numel() * (16 + (0 if grid.sym else grid.bits)) + (0 if grid.order is None else 32 * len(grid.order))
    return bits


def make_report(model, name, settings, calibration, layers, seconds):
    """compression.json: settings, every layer, totals."""
    weights, bits = sum(row["weights"] for row in layers.values()), sum(row["bits"] for row in layers.values())
    mean = lambda key: sum(row[key] * row["weights"] for row in layers.values()) / weights
    size = lambda parameter: parameter.numel() * parameter.element_size()
    rest = sum(map(size, model.parameters())) - sum(size(model.get_submodule(path).weight) for path in layers)
    return {"compressor": name, "settings": settings, "base_model": model.config.name_or_path,
            "calibration": {"nsamples": len(calibration), "seqlen": calibration.shape[1]}, "seconds": round(seconds, 2),
            "mean_error": mean("error"), "sparsity": mean("sparsity"), "bits_per_weight": bits / weights,
            "weight_bytes": math.ceil(rest + bits / 8), "versions": loading.versions(), "layers": layers}


def summary(report):
    """One line for people."""
    notes = sorted({row["note"] for row in report["layers"].values() if "note" in row})
    return (f"{report['compressor']} {json.dumps(report['settings'])}: relative output error {report['mean_error']:.4f}, "
            f"{report['bits_per_weight']:.3f} bits per weight, {100 * report['sparsity']:.2f} % zeros, "
            f"{report['seconds']:.1f} s" + (f"; {'; '.join(notes)}" if notes else ""))


# --- 6. The command ------------------------------------------------------------------------------------------------------------

def add_compression_flags(parser):
    """The flags that compress.py and recover.py share."""
    parser.add_argument("--compressor", default=None, choices=sorted(COMPRESSORS),
                        help="how to compress; magnitude for the toy model, gptq for others")
    parser.add_argument("--bits", type=int, default=3, help="bits per weight, 2 to 8")
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a grid; -1: the whole row")
    parser.add_argument("--sym", action="store_true", help="symmetric grids, without zero points")
    parser.add_argument("--act-order", action="store_true", help="gptq: columns in descending order of diag H")
    parser.add_argument("--static-groups", action="store_true", help="gptq: fit all grids to the original weights")
    parser.add_argument("--percdamp", type=float, default=0.01, help="damping, relative to the mean of diag H")
    parser.add_argument("--sparsity", type=float, default=None, help="share of zeros, 0 to below 1; 0.6 for the toy model, 0.5 for others")
    parser.add_argument("--pattern", default=None, help="N:M, keep N of every M inputs, for example 2:4; overrides --sparsity")
    parser.add_argument("--scope", default="layer", choices=["layer", "row"], help="magnitude: what the share is counted over")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration chunks")
    parser.add_argument("--seqlen", type=int, default=None, help="tokens per calibration chunk; 64 for the toy model, 512 for others")


def settings_from(args):
    """-> (compressor name, its settings). Raises UserError for values outside their range."""
    check(**{name: getattr(args, name) for name in LIMITS if name != "block_size"})
    if args.sparsity == 1:
        raise UserError(f"--sparsity {args.sparsity}: must be below 1, or nothing is left of the model; use for example 0.5")
    return args.compressor, {key: getattr(args, key) for key in COMPRESSORS[args.compressor][2]}


def calibration_ids(ids, nsamples, seqlen, seed=0):
    """Random chunks of a text. ids (tokens,) -> (nsamples, seqlen) long. Raises UserError when the text is too short."""
    if len(ids) < seqlen:
        raise UserError(f"--seqlen {seqlen}: the text has only {len(ids)} tokens; use a longer --text or a smaller --seqlen")
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(seqlen)]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    add_compression_flags(parser)
    parser.add_argument("--packed", action="store_true", help="write true bits, which only this project loads, instead of "
                        "dequantized weights")
    args = parser.parse_args(argv)
    loading.fill_defaults(args)
    args.compression = settings_from(args)
    if not args.out:
        raise UserError("--out: missing; name the folder to write, for example --out runs/compressed")
    loading.check_out(args.out, "compression.json")
    return args


def main(argv=None):
    """Compress a model and write a folder that any Hugging Face program loads."""
    args = parse(argv)
    name, settings = args.compression
    device = loading.pick_device(args.device)
    model, tokenizer = loading.load_model(args.model, "cpu", args.dtype)
    check_model(model, name, settings)                     # before the text is read and tokenized
    ids = loading.load_text(args.text, tokenizer, "train")
    calibration, grids = calibration_ids(ids, args.nsamples, args.seqlen, args.seed), {}
    report = compress_model(model, tokenizer, name, calibration, device, grids if args.packed else None, **settings)
    report["calibration"].update(text=args.text, seed=args.seed)
    for path, row in report["layers"].items():
        print(f"{path}: error {row['error']:.4f}, {row['bits'] / row['weights']:.3f} bits, {100 * row['sparsity']:.2f} % zeros "
              + row.get("note", ""))
    print(summary(report))
    write(args.out, model, tokenizer, report, grids)


def write(out, model, tokenizer, report, grids):
    """The folder `out`, whole or not at all: weights (packed if there are grids), tokenizer, compression.json."""
    with loading.whole_folder(out) as folder:
        if grids:
            import packing                                 # only --packed needs it
            report["packed_bytes"] = packing.save_packed(model, grids, report, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loading.write_json(folder / "compression.json", report)
    megabytes = sum(file.stat().st_size for file in pathlib.Path(out).glob("*.safetensors")) / 1e6
    print(f"wrote {out}: {megabytes:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    loading.run(main)
