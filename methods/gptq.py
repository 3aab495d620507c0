"""GPTQ and SparseGPT: second-order compression, column by column. One loop for both.

    Q = gptq(W, H, bits=3, group_size=64)  # W (out, in), H (in, in): what the layer's inputs look like
    Q = sparsegpt(W, H, pattern="2:4")

Sources: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", Algorithm 1. Frantar and Alistarh 2023, "SparseGPT". The paper compresses with both: [§3.3],
3-bit GPTQ and 50 % SparseGPT.

Letters, as in GPTQ: W (out, in) weights, X (tokens, in) a layer's inputs, H (in, in) = mean of x x^T over
calibration tokens, U upper Cholesky factor of H^-1 (H^-1 = U^T U), Q the compressed W. The error that counts
is ||X (W - Q)^T||^2.

DEVIATES from the GPTQ authors' code: a group's grid is fitted on weights that carry every earlier error, so
the result does not depend on the block size; columns that no token excites are rounded rather than zeroed.
"""
import torch

from methods.pruning import check_share, magnitude, n_of_m_mask, smallest, split_pattern
from methods.rounding import Grid, check_weights, fit_grid, group_width, rtn, to_code, working
from support.cli import UserError, check_limits
from support.files import all_finite


def inverse_factor(H, percdamp):
    """U upper triangular with (H + damp mean(diag H) I)^-1 = U^T U. H (in, in) -> U (in, in), damp.

    damp is percdamp, raised tenfold up to three times while the factorisation fails; U is None if it always
    does.
    """
    mean = H.diagonal().mean()
    for damp in (percdamp * 10 ** attempt for attempt in range(4)):
        # Cholesky from the last row up: H = R R^T with R upper triangular, so H^-1 = R^-T R^-1 and U = R^-1.
        # That is half the work of Cholesky, inverse, Cholesky.
        damped = H.flip(0, 1)                              # a copy
        damped.diagonal().add_(damp * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
            if U.sum().isfinite():                         # one NaN or infinity anywhere shows in the sum
                return U, damp
    return None, damp


def block_edges(columns, block_size, unit, inner=1):
    """(start, end) of the lazy blocks: whole units (groups), or parts of one that are multiples of `inner`.

    So no group starts inside a block whose errors have not all been passed on.
    """
    if unit <= block_size:
        starts = range(0, columns, block_size // unit * unit)
    else:
        step = max(block_size // inner, 1) * inner
        starts = [b for u in range(0, columns, unit) for b in range(u, min(u + unit, columns), step)]
    return list(zip(starts, [*starts[1:], columns]))


def second_order(W, H, bits=None, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128,
                 sparsity=None, pattern=None, static_groups=False, mse=False, details=None):
    """GPTQ (bits), SparseGPT (sparsity or pattern) or both at once [GPTQ Alg. 1].

    W (out, in), H (in, in) -> Q (out, in). Columns are compressed one by one; the error of each, divided by
    its diagonal entry of U, is spread over the columns that are still to come. Zeros of W stay zeros. Returns
    None when H cannot be factorised, or the corrections overflow.
    """
    check_weights(W)
    if block_size < 1:
        raise UserError(f"block_size {block_size}: must be at least 1; use for example 128")
    columns = W.shape[1]
    m = split_pattern(pattern, columns, group_size if bits else -1)[1] if pattern else 1
    H, order, width = working(H).clone(), None, group_width(group_size, columns)
    grids = [fit_grid(w, bits, sym, mse) for w in working(W).split(width, dim=1)] if static_groups else []
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)                             # (in,)
        H, W = H[order][:, order], W[:, order]
    dead = H.diagonal() == 0  # no calibration token excites these inputs: nothing to correct
    H.diagonal()[dead] = H.diagonal().sum() / (~dead).sum()
    U, damp = inverse_factor(H, percdamp) if all_finite(H) else (None, percdamp)
    if U is None:
        return None
    if damp > percdamp:
        details["note"] = f"damping raised to {damp:g}"
    state = Columns(W, U, dead, bits, width, sym, mse, sparsity, pattern, m)
    if static_groups:
        place = torch.arange(columns) if order is None else order  # (in,), of each column in W
        state.grids, state.group_of = grids, place.div(width, rounding_mode="floor").tolist()
    for start, end in block_edges(columns, block_size, state.group if bits else m, m):
        state.compress(start, end)
    Q = (state.W.T if order is None else state.W.T[:, order.argsort()]).to(W.dtype)        # (out, in)
    if not all_finite(Q):  # inputs so uneven that the corrections overflow W's dtype
        return None
    if bits:
        details["grid"] = state.grid(order, static_groups)
    return Q.contiguous()


class Columns:
    """The columns of one matrix on their way through the loop, each a contiguous row of W (in, out), a copy.

    zeros (in, out) True where a weight is or becomes zero. Rows before the current one already hold Q.
    """

    def __init__(self, W, U, dead, bits, group, sym, mse, sparsity, pattern, m):
        self.W = working(W).T.clone(memory_format=torch.contiguous_format)                     # (in, out)
        self.U, self.U_diagonal, self.dead = U, U.diagonal().tolist(), dead
        self.bits, self.group, self.sym, self.mse = bits, group, sym, mse
        self.sparsity, self.pattern, self.m = sparsity, pattern, m
        self.zeros = self.W == 0
        self.code = torch.empty_like(self.W, dtype=torch.uint8) if bits else None
        self.grids = []                                    # (scale, zero) of each group
        self.group_of = [i // group for i in range(len(self.W))]

    def compress(self, start, end):
        """Columns start .. end: errors go to the rest of the block at once, to later columns together."""
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
        """Column i to its grid. q (out,) -> (out,).

        A group's grid is fitted when its first column comes up.
        """
        if self.group_of[i] == len(self.grids):            # every earlier error has reached these columns
            w = self.W[i:i + self.group]                   # (group, out)
            if self.mse:  # what becomes zero asks nothing of a grid: it must not narrow it
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
        else:  # counted from column 0, so that the whole matrix comes out exact
            wanted = round(self.sparsity * end * loss.shape[1])
            chosen = smallest(loss, wanted - int(self.zeros[:start].sum()))
        self.zeros[start:end] |= chosen

    def grid(self, order, static_groups=False):
        """The Grid of the finished matrix.

        Static groups stand as the columns of W do, so that no order is stored.
        """
        scales, zeros = zip(*self.grids)
        code = self.code.T if order is None or not static_groups else self.code.T[:, order.argsort()]
        return Grid(code.contiguous(), torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte(),
                    self.group, self.bits, self.sym, None if static_groups else order)


def gptq(W, H, bits=3, group_size=64, sym=False, act_order=False, percdamp=0.01, block_size=128,
         static_groups=False, mse=False, details=None):
    """GPTQ [GPTQ Alg. 1]. W (out, in), H (in, in) -> Q, same shape and dtype as W.

    act_order: columns in descending order of diag H; groups are then consecutive in that order, which has to
    be stored. static_groups: all grids are fitted to W beforehand instead of to the current weights; groups
    stay where they are in W, also under act_order. mse: see fit_grid. A singular H: damping is raised, then,
    as when H or the corrections overflow, RTN, and details["note"] says so.
    """
    check_limits(bits=bits, group_size=group_size, percdamp=percdamp)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, act_order, percdamp, block_size,
                     static_groups=static_groups, mse=mse, details=details)
    if Q is None:
        details["note"] = "unusable Hessian: RTN"
        Q = rtn(W, bits, group_size, sym, mse, details)
    return Q


def sparsegpt(W, H, sparsity=0.5, pattern=None, percdamp=0.01, block_size=128, bits=None, group_size=64,
              sym=False, mse=False, details=None):
    """SparseGPT: prune by w^2 / U_ii^2 block by block, correcting the rest; bits: quantize in the same pass.

    W (out, in), H (in, in) -> Q, same shape and dtype as W. pattern "2:4" keeps 2 of every 4 consecutive
    inputs and overrides sparsity. A singular H: damping is raised, then, as when H or the corrections
    overflow, magnitude (and RTN), and details["note"] says so.
    """
    check_limits(pattern=pattern, percdamp=percdamp, bits=bits, group_size=group_size)
    check_share(sparsity)
    details = {} if details is None else details
    Q = second_order(W, H, bits, group_size, sym, False, percdamp, block_size, None if pattern else sparsity,
                     pattern, mse=mse, details=details)
    if Q is None:
        details["note"] = "unusable Hessian: magnitude"
        Q = magnitude(W, sparsity, pattern)
        Q = rtn(Q, bits, group_size, sym, mse, details) if bits else Q
    return Q
