"""Wanda: fill it in. Grade it with: python -m pytest assignments/wanda --submission FILE"""


def wanda(W, H, sparsity=0.5):
    """Prune by weight times size of input, row by row. [Sun et al. 2023] W (out, in), H (in, in) -> Q.

    score_ij = |W_ij| ||x_j||, and ||x_j|| is the norm of input j over all tokens. H = mean over tokens of
    x x^T: its diagonal holds what you need, up to a factor that no comparison within a row can see.
    In EACH row exactly round(sparsity * in) weights become zero, those with the lowest scores; of equal ones
    the leftmost. The others stay as they are. W and H may not be changed.
    """
    raise NotImplementedError("write wanda")
