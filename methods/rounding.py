"""Rounding: grids for weights, and round-to-nearest, the simplest quantizer.

    Q = rtn(W, bits=3, group_size=64)  # W (out, in), any floating dtype -> Q, same shape and dtype

Letters: W (out, in) weights, w a group of their columns, Q the compressed W. A grid of 2^bits points spans
the weights of one group of one row: q = scale (code - zero), with whole numbers code and zero from 0 to
2^bits - 1. So 0 lies on every grid.

DEVIATES from the GPTQ authors' code: scales are rounded to float16 before use, so that what is stored is what
was used; the mse search tries ten shares of the range by squared error, where the authors try 80 by
|error|^2.4.
"""
import dataclasses

import torch

from support.cli import UserError, check_limits
from support.files import all_finite
from support.packing import dequantize


# --- 1. Grids: where quantized weights may lie --------------------------------------------------------------

@dataclasses.dataclass
class Grid:
    """A quantized W: W[:, order[j]] = scale[:, j // group_size] * (code[:, j] - zero[:, j // group_size]).

    code (out, in) uint8, scale (out, groups) float16, zero (out, groups) uint8; order (in,) long or None (as
    they stand).
    """
    code: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int
    bits: int
    sym: bool
    order: torch.Tensor = None

    def dequantize(self, dtype=torch.float32):
        """-> W (out, in). Exact in float32: it holds a float16 times a whole number below 256."""
        return dequantize(self.code, self.scale, self.zero, self.group_size, self.order, dtype)

    def round(self, W):
        """Other weights to the nearest points of this grid. W (out, in) -> (out, in), same dtype."""
        columns = W.float() if self.order is None else W.float()[:, self.order]
        group = torch.arange(W.shape[1], device=W.device) // self.group_size                   # (in,)
        code = to_code(columns, self.scale.float()[:, group], self.zero.float()[:, group], self.bits)
        return dataclasses.replace(self, code=code.byte()).dequantize(W.dtype)

    def to(self, device):
        """The same grid on another device."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{key: tensor.to(device) for key, tensor in tensors.items()})


SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)  # of the range, that mse tries besides the whole


def fit_grid(w, bits, sym, mse=False):
    """Scale and zero point of each row of a group. w (out, group) -> scale (out,), zero (out,), in w's dtype.

    The grid spans min <= 0 <= max, so that 0 lies on it. mse: or that share of it which leaves the least
    squared error; the few weights beyond are clipped so that all others lie closer.
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
            pairs = zip((error, *narrower), (least, scale, zero))
            least, scale, zero = (torch.where(better, *pair) for pair in pairs)
    return scale, zero


def grid_between(low, high, bits, sym):
    """scale = (high - low) / (2^bits - 1), zero = round(-low / scale). low, high (out,) -> both (out,)."""
    top, flat = 2 ** bits - 1, low == high                 # flat: an all-zero row, which any grid holds
    scale = ((high - low) / top).masked_fill(flat, 1)
    # as stored; the clamp keeps it from 0 and infinity
    scale = scale.half().clamp(2 ** -24, 65504).to(low.dtype)
    zero = torch.full_like(scale, (top + 1) / 2) if sym else (-low / scale).round().clamp(0, top)
    return scale, zero


def squared_error(w, scale, zero, bits):
    """Of rounding each row to its grid. w (out, group), scale, zero (out,) -> (out,)."""
    scale, zero = scale[:, None], zero[:, None]
    return to_code(w, scale, zero, bits).sub_(zero).mul_(scale).sub_(w).square_().sum(1)


def to_code(w, scale, zero, bits):
    """Index of the nearest grid point. w, scale, zero (...) -> (...), whole numbers from 0 in w's dtype."""
    return (w / scale).round_().add_(zero).clamp_(0, 2 ** bits - 1)


def group_width(group_size, columns):
    """-1 or None: one group a row. -> columns per group; the last group may be shorter."""
    return columns if group_size in (-1, None) else min(group_size, columns)


def working(W):
    """Float32, or float64 if W is: half precision is for storing, not for solving."""
    return W if W.dtype == torch.float64 else W.float()


def check_weights(W, what="W"):
    """Raise UserError (a ValueError) for weights that are not all finite: their grids would be NaN."""
    if not all_finite(W):
        raise UserError(f"{what} holds numbers that are not finite; use another copy of the model")


# --- 2. Round to nearest ------------------------------------------------------------------------------------

def rtn(W, bits=3, group_size=64, sym=False, mse=False, details=None):
    """Each weight goes to the nearest point of its group's grid. W (out, in) -> Q, same shape and dtype.

    group_size: columns that share a grid, -1 for the whole row. mse: see fit_grid. details: a dict that
    receives the Grid.
    """
    check_limits(bits=bits, group_size=group_size)
    check_weights(W)
    width, codes, scales, zeros = group_width(group_size, W.shape[1]), [], [], []
    for w in working(W).split(width, dim=1):               # (out, width), the last one shorter
        scale, zero = fit_grid(w, bits, sym, mse)
        codes.append(to_code(w, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    grid = Grid(torch.cat(codes, 1).byte(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte(),
                width, bits, sym)
    if details is not None:
        details["grid"] = grid
    return grid.dequantize(W.dtype)
