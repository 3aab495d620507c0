"""Is a difference real? Grade it with: python -m pytest assignments/standard_error --submission FILE"""


def standard_error(accuracies, sizes):
    """Of the plain mean of several tasks' accuracies, in percentage points. Both lists have one entry a task.

    A task of n questions and accuracy p has the binomial variance p (1 - p) / n; tasks are independent.
    """
    raise NotImplementedError("write standard_error")


def paired_standard_error(only_a, only_b, sizes):
    """Of the mean over tasks of (accuracy of b - accuracy of a), same questions, in percentage points.

    only_a, only_b: how many questions of each task only a, only b got right. One question gives -1, 0 or 1.
    The variance of its mean over n questions is (mean of squares - square of mean) / n.
    """
    raise NotImplementedError("write paired_standard_error")


def p_value(difference, error, rows=1):
    """Two-sided p of a difference, both in points, by the normal distribution; 1 at most.

    rows: the difference is the largest of so many that were looked at [Bonferroni: multiply].
    """
    raise NotImplementedError("write p_value")
