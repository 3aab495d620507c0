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
import json
import math
import pathlib
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import loading
from loading import UserError


# --- 1. Grids: where quantized weights may lie -----------------------------------------------------------------------------

@dataclass
class Grid:
    """A quantized matrix: W[:, order[j]] = scale[:, j // group] * (code[:, j] - zero[:, j // group]).

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
        """-> W (out, in) float32."""
        group = torch.arange(self.code.shape[1], device=self.code.device) // self.group_size   # (in,)
        W = self.scale.float()[:, group] * (self.code.float() - self.zero.float()[:, group])
        return W if self.order is None else W[:, self.order.argsort()]


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
    scale = scale.half().clamp(min=2 ** -24).to(w.dtype)   # as stored; the smallest float16 above zero
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


# --- 2. Round to nearest --------------------------------------------------------------------------------------------------

def rtn(W, bits=3, group_size=64, sym=False, details=None):
    """Each weight goes to the nearest point of its group's grid. W (out, in) -> Q, same shape and dtype.

    group_size: columns that share a grid, -1 for the whole row. details: a dict that receives the Grid.
    """
    out, columns = W.shape
    width, codes, scales, zeros = group_width(group_size, columns), [], [], []
    for w in working(W).split(width, dim=1):               # (out, width), the last one shorter
        scale, zero = fit_grid(w, bits, sym)
        codes.append(to_code(w, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    grid = Grid(torch.cat(codes, 1).byte(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte(), width, bits, sym)
    if details is not None:
        details["grid"] = grid
    return grid.dequantize().to(W.dtype)


# --- 3. Second-order compression: one loop for GPTQ and SparseGPT ----------------------------------------------------------------

def inverse_factor(H, percdamp):
    """U with (H + damping)^-1 = U^T U, upper triangular, or None if H stays singular. -> (U, damping used, relative).

    damping = percdamp * mean(diag H), raised tenfold up to three times when the factorisation fails.
    """
    diagonal, identity = H.diagonal().mean(), torch.eye(len(H), dtype=H.dtype, device=H.device)
    for attempt in range(4):
        damp = percdamp * 10 ** attempt
        L, failed = torch.linalg.cholesky_ex(H + damp * diagonal * identity)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and U.isfinite().all():
                return U, damp
    return None, damp


def block_edges(columns, block_size, group):
    """(start, end) of the lazy blocks. A group never starts inside a block whose errors have not all been passed on."""
    if group <= block_size:
        size = block_size // group * group                 # whole groups
        starts = range(0, columns, size)
    else:
        starts = [b for g in range(0, columns, group) for b in range(g, min(g + group, columns), block_size)]
    return list(zip(starts, [*starts[1:], columns]))


def second_order(W, H, bits=None, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128, sparsity=None,
                 pattern=None, details=None):
    """GPTQ (bits), SparseGPT (sparsity or pattern) or both at once. [GPTQ Alg. 1]

    Columns are compressed one by one; the error of each, divided by its diagonal entry of U, is spread over the columns that
    are still to come. Zeros of W stay zeros. Returns Q, or None when H cannot be factorised.
    """
    H, details = working(H).clone(), {} if details is None else details
    dead = H.diagonal() == 0                               # no calibration token excites these inputs: nothing to correct
    H.diagonal()[dead] = 1
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else None
    if act_order:
        H, dead = H[order][:, order], dead[order]
    U, damp = inverse_factor(H, percdamp)
    if U is None:
        return None
    if damp > percdamp:
        details["note"] = f"damping raised to {damp:g}"
    Wt = working(W).T.contiguous() if order is None else working(W).T[order].contiguous()      # (in, out), row = column of W
    state = Columns(Wt, U, dead, bits, group_width(group_size, len(Wt)), sym, sparsity, pattern)
    for start, end in block_edges(len(Wt), block_size, state.group if bits else 1):
        state.block(start, end)
    Q = state.Q.T if order is None else state.Q.T[:, order.argsort()]                          # (out, in)
    if bits:
        details["grid"] = state.grid(order)
        Q = details["grid"].dequantize()
        Q = Q.double() if W.dtype == torch.float64 else Q
    return Q.to(W.dtype).contiguous()


class Columns:
    """The columns of one matrix on their way through the loop. Wt (in, out), U (in, in), dead (in,) bool."""

    def __init__(self, Wt, U, dead, bits, group, sym, sparsity, pattern):
        self.Wt, self.U, self.dead, self.bits, self.group, self.sym = Wt, U, dead, bits, group, sym
        self.sparsity, self.pattern, self.pruned = sparsity, pattern, 0
        self.Q, self.code = torch.empty_like(Wt), torch.empty_like(Wt, dtype=torch.uint8) if bits else None
        self.scales, self.zeros = [], []
        zeros = Wt == 0
        self.zeros_kept = zeros if zeros.any() else None   # (in, out): pruned before; they stay zero

    def block(self, start, end):
        """Compress columns start .. end, passing errors on within the block, then to the rest in one product."""
        Wt, U, errors = self.Wt, self.U, torch.empty_like(self.Wt[start:end])                  # (block, out)
        mask = self.prune_mask(start, end)
        for i in range(start, end):
            w = Wt[i]                                      # (out,)
            if self.bits and i % self.group == 0:          # every earlier error has reached these columns: fit now
                scale, zero = fit_grid(Wt[i:i + self.group].T, self.bits, self.sym)
                self.scales.append(scale)
                self.zeros.append(zero)
            q = w.clone()
            if mask is not None:
                q.masked_fill_(mask[i - start], 0)
            if self.bits:
                code = to_code(q, self.scales[-1], self.zeros[-1], self.bits)
                self.code[i] = code
                q = code.sub_(self.zeros[-1]).mul_(self.scales[-1])
            self.Q[i] = q
            # error_i = (w_i - q_i) / U_ii ;  w_j <- w_j - error_i U_ij for j > i
            error = torch.sub(w, q, out=errors[i - start]).div_(U[i, i])
            Wt[i + 1:end].addr_(U[i, i + 1:end], error, alpha=-1)
        # the lazy update: the same for all columns after the block, as one matrix product
        Wt[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)

    def prune_mask(self, start, end):
        """(block, out) True where a weight becomes zero. [SparseGPT: mask selection]

        The loss of zeroing w_i alone is w_i^2 / U_ii^2; the smallest go. Earlier zeros count as pruned.
        """
        if self.sparsity is None and self.pattern is None:
            return None if self.zeros_kept is None else self.zeros_kept[start:end]
        loss = (self.Wt[start:end] / self.U.diagonal()[start:end, None]) ** 2                  # (block, out)
        loss[self.dead[start:end]] = 0
        if self.pattern:
            return n_of_m_mask(loss.T, self.pattern).T
        wanted = round(self.sparsity * end * loss.shape[1])    # so that the whole matrix comes out exact
        mask = smallest(loss, wanted - self.pruned)
        self.pruned = wanted
        return mask

    def grid(self, order):
        """The Grid of the finished matrix."""
        return Grid(self.code.T.contiguous(), torch.stack(self.scales, 1).half(), torch.stack(self.zeros, 1).byte(),
                    self.group, self.bits, self.sym, order)


def gptq(W, H, bits=3, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128, details=None):
    """GPTQ [GPTQ Alg. 1]. W (out, in), H (in, in) -> Q, same shape and dtype as W.

    act_order: columns in descending order of diag H; groups are then consecutive in that order (their grids see current
    weights, which fixed groups could not), at the price of storing the order. A singular H: damping is raised, then RTN, and
    details["note"] says so.
    """
    Q = second_order(W, H, bits, group_size, sym, act_order, percdamp, block_size, details=details)
    if Q is None:
        details = {} if details is None else details
        details["note"] = "singular Hessian: RTN"
        Q = rtn(W, bits, group_size, sym, details)
    return Q


def sparsegpt(W, H, sparsity=0.5, pattern=None, percdamp=0.01, block_size=128, bits=None, group_size=64, sym=False, details=None):
    """SparseGPT: prune by w^2 / U_ii^2 block by block, correcting the rest; with bits, quantize in the same pass.

    pattern "2:4" keeps 2 of every 4 consecutive inputs and overrides sparsity. A singular H: magnitude (then RTN) instead.
    """
    columns = W.shape[1]
    block = block_size if not pattern else max(block_size // split_pattern(pattern, columns)[1], 1) * split_pattern(pattern, columns)[1]
    Q = second_order(W, H, bits, group_size, sym, False, percdamp, block, None if pattern else sparsity, pattern, details)
    if Q is None:
        details = {} if details is None else details
        Q = magnitude(W, sparsity, pattern)
        Q = rtn(Q, bits, group_size, sym, details) if bits else Q
        details["note"] = "singular Hessian: magnitude"
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


def split_pattern(pattern, columns):
    """"2:4" -> (2, 4): 2 of every 4 consecutive inputs are kept. Raises ValueError when it does not fit."""
    n, m = (int(part) for part in pattern.split(":"))
    if not 0 < n < m or columns % m:
        raise ValueError(f"pattern {pattern}: needs 0 < N < M and M dividing the {columns} columns")
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
    "gptq": (gptq, True, QUANT + ("act_order", "percdamp")),
    "magnitude": (magnitude, False, SPARSE + ("scope",)),
    "sparsegpt": (sparsegpt, True, SPARSE + ("percdamp",)),
    "sparsegpt_gptq": (sparsegpt, True, SPARSE + QUANT + ("percdamp",)),
}
# EXERCISE: add a compressor. One function W (, H) -> Q, one line above; tests/test_compress.py grades it.


# --- 5. The walk over the blocks ---------------------------------------------------------------------------------------------

class Captured(Exception):
    """Raised by the capturing hook to stop the forward pass before the first block runs."""


@torch.no_grad()
def first_block_inputs(model, calibration, device):
    """What the first block is called with. calibration (nsamples, seqlen) -> [hidden (1, T, d), ...], kwargs."""
    hidden, kwargs = [], {}

    def capture(block, args, given):
        hidden.append((args[0] if args else given.pop("hidden_states")).to(device))
        kwargs.update({name: to_device(value, device) for name, value in given.items()
                       if name not in ("cache", "past_key_values", "layer_past")}, use_cache=False)
        raise Captured

    handle = loading.blocks_of(model)[0].register_forward_pre_hook(capture, with_kwargs=True)
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


@torch.no_grad()
def hessians(block, hidden, kwargs):
    """H (in, in) float32 of every linear layer of a block, over all calibration tokens. -> {name: H}.

    Layers that read the same tensor (q, k and v; gate and up) share one H.
    """
    total, tokens, reader, handles = {}, {}, {}, []

    def accumulate(name):
        def hook(module, args):
            x = args[0].detach()
            leader = reader.setdefault((x.data_ptr(), x.shape), name)     # first layer of this pass to read x
            if leader == name:
                x = x.reshape(-1, x.shape[-1]).float()                     # (tokens, in)
                total[name] = x.T @ x if name not in total else total[name].addmm_(x.T, x)
                tokens[name] = tokens.get(name, 0) + len(x)
            else:
                total[name] = total[leader]
                tokens[name] = -1
        return hook

    for name, layer in linears_of(block).items():
        handles.append(layer.register_forward_pre_hook(accumulate(name)))
    for x in hidden:
        reader.clear()
        block(x, **kwargs)
    for handle in handles:
        handle.remove()
    count = max(tokens.values())
    means = {id(H): H / count for H in {id(H): H for H in total.values()}.values()}
    return {name: means[id(H)] for name, H in total.items()}


def relative_error(W, Q, H):
    """||X (W - Q)^T|| / ||X W^T|| from H alone: ||X D^T||^2 = tokens * trace(D H D^T)."""
    norm = lambda D: ((D @ H) * D).sum().clamp(min=0).sqrt().item()
    return norm(W.float() - Q.float()) / max(norm(W.float()), 1e-12)


@torch.no_grad()
def compress_model(model, tokenizer, name, calibration, device=None, grids=None, **settings):
    """Compress every linear layer of every block, in place; each block sees what the compressed ones before it give out.

    calibration: (nsamples, seqlen) token ids. device: where blocks are worked on, one at a time; the model itself may stay on
    the CPU. grids: a dict that receives {layer name: Grid} for packing. Returns the report. tokenizer: unused, kept so that a
    compressor that needs text can have it. Raises UserError for a name or settings that do not exist.
    """
    if name not in COMPRESSORS:
        raise UserError(f"--compressor {name}: unknown; use one of: {' '.join(sorted(COMPRESSORS))}")
    settings = {key: settings[key] for key in COMPRESSORS[name][2] if key in settings}
    blocks, prefix, home = loading.blocks_of(model), loading.arch_of(model).blocks, model.device
    device, start, layers = torch.device(device or home), time.time(), {}
    hidden, kwargs = first_block_inputs(model, calibration, device)
    for i, block in enumerate(tqdm(blocks, desc=f"{name}, blocks", disable=None)):
        block.to(device)
        H = hessians(block, hidden, kwargs)
        for layer_name, layer in linears_of(block).items():
            path = f"{prefix}.{i}.{layer_name}"
            layers[path] = compress_layer(layer, H[layer_name], name, settings, path, grids)
        hidden = [block_output(block, x, kwargs) for x in hidden]
        block.to(home)
    return make_report(model, name, settings, calibration, layers, time.time() - start)


def compress_layer(layer, H, name, settings, path, grids):
    """Compress one linear layer in place. -> its lines of the report."""
    function, takes_H, _ = COMPRESSORS[name]
    transposed, details, start = isinstance(layer, Conv1D), {}, time.time()
    W = layer.weight.data.T if transposed else layer.weight.data                               # (out, in)
    try:
        Q = function(W, H, **settings, details=details) if takes_H else function(W, **settings, details=details)
    except ValueError as error:
        raise UserError(f"--compressor {name}: {path}: {error}") from error
    row = {"error": relative_error(W, Q, H), "sparsity": (Q == 0).float().mean().item(), "weights": Q.numel(),
           "bits": stored_bits(Q, details.get("grid"), name), "seconds": round(time.time() - start, 3)}
    if "note" in details:
        row["note"] = details["note"]
    if grids is not None:
        grids[path] = details.get("grid")
    layer.weight.data = Q.T.contiguous() if transposed else Q
    return row


def stored_bits(Q, grid, name):
    """Bits that the matrix takes when packed, scales, zero points, masks and order included."""
    dense_bits = 8 * Q.element_size()
    zeros = int((Q == 0).sum()) if "sparsity" in COMPRESSORS[name][2] else 0
    mask = Q.numel() if "sparsity" in COMPRESSORS[name][2] else 0                              # one bit a weight
    if grid is None:
        return mask + (Q.numel() - zeros) * dense_bits
    per_group = 16 + (0 if grid.sym else grid.bits)
    order = 0 if grid.order is None else 32 * len(grid.order)
    return mask + (Q.numel() - zeros) * grid.bits + grid.scale.numel() * per_group + order


def make_report(model, name, settings, calibration, layers, seconds):
    """compression.json: settings, every layer, totals."""
    weights, bits = sum(r["weights"] for r in layers.values()), sum(r["bits"] for r in layers.values())
    mean = lambda key: sum(r[key] * r["weights"] for r in layers.values()) / weights
    parameters = {id(p): p for p in model.parameters()}.values()
    inside = sum(loading.blocks_of(model).get_submodule(path[len(loading.arch_of(model).blocks) + 1:]).weight.numel()
                 * model.dtype.itemsize for path in layers)
    rest = sum(p.numel() * p.element_size() for p in parameters) - inside
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
    parser.add_argument("--compressor", default="gptq", choices=sorted(COMPRESSORS), help="how to compress")
    parser.add_argument("--bits", type=int, default=3, help="bits per weight, 2 to 8")
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a grid; -1: the whole row")
    parser.add_argument("--sym", action="store_true", help="symmetric grids, without zero points")
    parser.add_argument("--act-order", action="store_true", help="gptq: columns in descending order of diag H")
    parser.add_argument("--percdamp", type=float, default=0.01, help="damping, relative to the mean of diag H")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros, 0 to below 1")
    parser.add_argument("--pattern", default=None, help="N:M, keep N of every M inputs, for example 2:4; overrides --sparsity")
    parser.add_argument("--scope", default="layer", choices=["layer", "row"], help="magnitude: what the share is counted over")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration chunks")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens per calibration chunk")


def settings_from(args):
    """-> (compressor name, its settings). Raises UserError for values outside their range."""
    if not 2 <= args.bits <= 8:
        raise UserError(f"--bits {args.bits}: must be 2 to 8; use for example --bits 3")
    if not 0 <= args.sparsity < 1:
        raise UserError(f"--sparsity {args.sparsity}: must be at least 0 and below 1; use for example --sparsity 0.5")
    if args.group_size != -1 and args.group_size < 1:
        raise UserError(f"--group-size {args.group_size}: must be positive, or -1 for one group a row; use for example 64")
    if args.percdamp <= 0:
        raise UserError(f"--percdamp {args.percdamp}: must be above 0; use for example 0.01")
    for flag, value in (("--nsamples", args.nsamples), ("--seqlen", args.seqlen)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if args.pattern is not None:
        n, _, m = args.pattern.partition(":")
        if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
            raise UserError(f"--pattern {args.pattern}: must be N:M with 0 < N < M; use for example 2:4")
    return args.compressor, {key: getattr(args, key) for key in COMPRESSORS[args.compressor][2]}


def calibration_ids(ids, nsamples, seqlen, seed=0):
    """Random chunks of a text. ids (tokens,) -> (nsamples, seqlen) long. Raises UserError when the text is too short."""
    if len(ids) < seqlen:
        raise UserError(f"--seqlen {seqlen}: the text has only {len(ids)} tokens; use a longer --text or a smaller --seqlen")
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(seqlen)]


def main(argv=None):
    """Compress a model and write a folder that any Hugging Face program loads."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    add_compression_flags(parser)
    parser.add_argument("--packed", action="store_true", help="write true bits instead of dequantized weights")
    args = parser.parse_args(argv)
    name, settings = settings_from(args)
    if not args.out:
        raise UserError("--out: missing; name the folder to write, for example --out runs/compressed")
    loading.check_out(args.out, "compression.json")
    device = loading.pick_device(args.device)
    model, tokenizer = loading.load_model(args.model, "cpu", args.dtype)
    ids = loading.load_text(args.text or ("toy" if args.model == "toy" else "wikitext2"), tokenizer, "train")
    grids = {} if args.packed else None
    report = compress_model(model, tokenizer, name, calibration_ids(ids, args.nsamples, args.seqlen, args.seed), device, grids, **settings)
    report["calibration"].update(text=args.text, seed=args.seed)
    for path, row in report["layers"].items():
        print(f"{path}: error {row['error']:.4f}, {row['bits'] / row['weights']:.3f} bits, {100 * row['sparsity']:.2f} % zeros "
              + row.get("note", ""))
    print(summary(report))
    with loading.whole_folder(args.out) as folder:
        if args.packed:
            import packing                                 # only this flag needs it
            report["packed_bytes"] = packing.save_packed(model, grids, report, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loading.write_json(folder / "compression.json", report)
    print(f"wrote {args.out}: {sum(f.stat().st_size for f in pathlib.Path(args.out).glob('*.safetensors')) / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    loading.run(main)
