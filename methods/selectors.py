"""Selectors: rules to choose by other than the paper's, and controls, which join idp_minimal.SELECTORS.

All have one signature:  A (B, h, T, S), real (B, T) bool, owner (S,) -> (B, m); the largest score wins. A is
what layers= and scores= of attach_idp say.
EXERCISE: add a rule. One function, one line in the update below; the tests of the law pick it up.
"""
import torch
import torch.nn.functional as F

from idp_minimal import SELECTORS, mean_attention


def total_attention(A, real, owner):
    """s_k = n_k times the mean: the sum over the prompt's tokens."""
    return mean_attention(A, real, owner) * torch.bincount(owner).to(A.device, non_blocking=True)


def max_attention(A, real, owner):
    """s_k = max of A over heads, real input tokens and the tokens of prompt k."""
    a = A.masked_fill(~real[:, None, :, None], -torch.inf).amax((1, 2))                        # (B, S)
    return torch.stack([part.amax(1) for part in a.split(torch.bincount(owner).tolist(), dim=1)], dim=1)


def last_token(A, real, owner):
    """s_k = mean of A over heads and prompt tokens, for the last real input token alone."""
    t = torch.arange(real.shape[1], device=real.device)    # (T,)
    return mean_attention(A, t == (t * real).argmax(1, keepdim=True), owner)


def fixed_choice(A, real, owner, k=0):
    """Control: prompt k for every sequence, a single soft prompt."""
    return F.one_hot(torch.full((len(A),), k, device=A.device), int(owner[-1]) + 1).to(A)


def random_choice(A, real, owner, generator=None):
    """Control: a random prompt for each sequence."""
    return torch.rand(len(A), int(owner[-1]) + 1, generator=generator).to(A, non_blocking=True)


def oracle_choice(A, real, owner, loss=None):
    """Upper bound, for analysis: the lowest loss (B, m) on the answer itself."""
    return -loss.to(A)


SELECTORS.update(total_attention=total_attention, max_attention=max_attention, last_token=last_token,
                 fixed=fixed_choice, random=random_choice, oracle=oracle_choice)
