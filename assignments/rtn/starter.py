"""Round to nearest: fill in rtn. Grade it with: python -m pytest assignments/rtn --submission FILE"""


def rtn(W, bits=3, group_size=64):
    """Each weight goes to the nearest point of its group's grid. W (out, in) -> Q (out, in), same dtype.

    A group is `group_size` consecutive columns of ONE row; the last group of a row may be shorter;
    group_size -1: the whole row is one group. W itself must stay as it is. For each group w:

        low = min(w, 0), high = max(w, 0)                         so that 0 lies on the grid
        scale = (high - low) / (2^bits - 1), rounded to float16   (it is stored so); 1 if low = high
        zero = round(-low / scale), between 0 and 2^bits - 1
        code = round(w / scale) + zero, between 0 and 2^bits - 1
        q = scale (code - zero)
    """
    raise NotImplementedError("write rtn")
