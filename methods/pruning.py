"""Pruning: zero the smallest weights, by their size alone, over a layer or N of every M.

    Q = magnitude(W, sparsity=0.5)  # W (out, in), any floating dtype -> Q, same shape and dtype
    Q = magnitude(W, pattern="2:4")                        # 2 of every 4 consecutive inputs are kept
"""
import torch

from methods.rounding import check_weights, group_width
from support.cli import UserError, check_limits


def smallest(score, k):
    """True at exactly k smallest entries; among equals the first in memory order. score (...) -> bool."""
    flat = score.reshape(-1)
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(k).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[:k - int(mask.sum()), 0]
    mask[ties] = True
    return mask.view(score.shape)


def split_pattern(pattern, columns, group_size=-1):
    """"2:4" -> (2, 4): 2 of every 4 consecutive inputs are kept.

    Raises UserError when M does not divide the columns or the group.
    """
    n, m = (int(part) for part in pattern.split(":"))
    if columns % m:
        raise UserError(f"--pattern {pattern}: {m} must divide a layer's {columns} inputs; try 2:4")
    if group_width(group_size, columns) % m:
        raise UserError(f"--group-size {group_size}: {m} of --pattern {pattern} must divide it; try {16 * m}")
    return n, m


def n_of_m_mask(score, pattern):
    """True at the M - N smallest of every M consecutive columns. score (out, in) -> (out, in) bool."""
    n, m = split_pattern(pattern, score.shape[1])
    groups = score.reshape(-1, m)
    pruned = groups.argsort(dim=1, stable=True)[:, :m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, pruned, True).view(score.shape)


def magnitude(W, sparsity=0.5, pattern=None, details=None):
    """Zero the smallest |w|. W (out, in) -> Q, same shape and dtype.

    Exactly round(sparsity * count) zeros, ties included.
    pattern: "2:4" keeps 2 of every 4 consecutive inputs and overrides sparsity.
    """
    check_share(sparsity)
    check_limits(pattern=pattern)
    check_weights(W)
    mask = n_of_m_mask(W.abs(), pattern) if pattern else smallest(W.abs(), round(sparsity * W.numel()))
    return W.masked_fill(mask, 0)


def check_share(sparsity):
    """Raise UserError for a share of zeros outside 0 .. 1. (1 is all: a function may, a command may not.)"""
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise UserError(f"--sparsity {sparsity}: must be a number from 0 to 1; use for example 0.5")
