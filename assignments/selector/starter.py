"""A rule that finds the trigger. Grade it with: python -m pytest assignments/selector --submission FILE"""


def fit_selector(A, real, owner, best):
    """Learn from examples which prompt an input needs. -> selector(A, real, owner) -> scores (B, m).

    A (n, h, T, S): how much the tokens of n inputs attend to each prompt token, in the first layer, after one
    softmax over prompts and input (experiments/choosing.py: READING). real (n, T): False is padding.
    owner (S,): the prompt of each token, m in all. best (n,) long: the prompt under which each input does best.
    The selector gets other inputs' A, of another B and T, and gives each prompt a score; the largest wins.
    """
    raise NotImplementedError("write fit_selector")
