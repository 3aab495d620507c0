"""GPTQ with two blanks. Grade it with: python -m pytest assignments/gptq --submission FILE"""
from methods.rounding import fit_grid, to_code             # or your own, from assignment rtn


def upper_factor(H, percdamp):
    """U (in, in), upper triangular, with (H + percdamp mean(diag H) I)^-1 = U^T U. H (in, in)."""
    raise NotImplementedError("blank 1: write upper_factor")


def pass_on(W, q, U, i):
    """Spread the error of column i over the later columns of W (out, in), in place. q (out,), U (in, in).

        error = (W_i - q) / U_ii            W_j <- W_j - error U_ij for every j > i
    """
    raise NotImplementedError("blank 2: write pass_on")


def gptq(W, H, bits=3, group_size=64, percdamp=0.01):
    """GPTQ [Frantar et al. 2022, Algorithm 1]. W (out, in), H (in, in) = mean of x x^T -> Q (out, in)."""
    dtype, columns = W.dtype, W.shape[1]
    W = W.double().clone()                                 # ours to change
    U, width = upper_factor(H.double(), percdamp), columns if group_size == -1 else group_size
    for i in range(columns):
        if i % width == 0:                                 # the grid is fitted on weights with all errors in
            scale, zero = fit_grid(W[:, i:i + width], bits, sym=False)     # (out,), (out,)
        q = (to_code(W[:, i], scale, zero, bits) - zero) * scale           # (out,)
        pass_on(W, q, U, i)
        W[:, i] = q
    return W.to(dtype)
