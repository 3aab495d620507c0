"""Another world: predict, then measure. Grade it with:
python -m pytest assignments/another_world --submission FILE
"""


def domain():
    """The words of a world of your own, as HARBOUR in support/toy_world.py.

    -> {"first": names, "family": names, "facts": {attribute: (16 values, [phrasings])}}

    24 first and 24 family names; 3 attributes or more; each with 16 values and 2 phrasings or more that hold {p}
    (the person) and, last, {v} (the value); the last phrasing is a question. Every name and value is one word.
    None of the words may be in the toy's own world.
    """
    raise NotImplementedError("write domain")


def predictions():
    """What you expect BEFORE you measure. -> {"small": (low, high), "large": (low, high)}

    Percentage points of toy_recall that pruning 60 % of the weights takes from a model that knows 10 people, and
    from one of the same size that knows 40. Each interval at most 25 points wide.
    """
    raise NotImplementedError("write predictions")
