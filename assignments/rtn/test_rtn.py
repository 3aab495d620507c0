"""The grader of rtn."""
import torch

from assignments.grading import check_close, check_tensor, compressed_toy, must, numbers, recall, unchanged

ASKED, FENCED = ["rtn"], ["methods.rounding"]
REACH = 69.0                                               # % recall of the toy at 2 bits, groups of 16


def slow_rtn(W, bits, group_size):
    """One weight at a time. W (out, in) -> (out, in)."""
    Q, top = torch.empty_like(W), 2 ** bits - 1
    width = W.shape[1] if group_size == -1 else group_size
    for i, row in enumerate(W):
        for start in range(0, len(row), width):
            w = row[start:start + width]
            low, high = min(w.min().item(), 0), max(w.max().item(), 0)
            scale = torch.tensor((high - low) / top if high > low else 1.0).half().item()
            zero = min(max(round(-low / scale), 0), top)
            for j, value in enumerate(w.tolist()):
                code = min(max(round(value / scale) + zero, 0), top)
                Q[i, start + j] = scale * (code - zero)
    return Q


def test_shape_and_dtype(submission):
    for dtype in (torch.float32, torch.float16):
        Q = submission.rtn(numbers(0, 6, 20).to(dtype), 3, 8)
        check_tensor(Q, (6, 20), "Q")
        must(Q.dtype == dtype, f"W is {dtype}, Q must be too, got {Q.dtype}")


def test_equals_the_slow_version(submission):
    for seed, bits, group_size in ((1, 3, 8), (2, 2, 5), (3, 4, -1), (4, 3, 64), (5, 3, 6)):
        W = numbers(seed, 5, 20) + 0.3
        Q = submission.rtn(W, bits, group_size)
        check_close(Q, slow_rtn(W, bits, group_size), f"Q at {bits} bits, group_size {group_size}")


def test_groups_that_are_zero_or_all_on_one_side(submission):
    W = numbers(6, 4, 16).abs() + 1
    W[0], W[1] = 0, -W[1]
    check_close(submission.rtn(W, 3, 8), slow_rtn(W, 3, 8), "Q of rows of zeros, of one sign")


def test_a_row_decides_its_own_grid(submission):
    W = numbers(7, 4, 16)
    before = submission.rtn(W, 3, 8)[:3]
    W[3] *= 100
    check_close(submission.rtn(W, 3, 8)[:3], before, "Q of other rows, after one row was made larger,")


def test_W_is_left_alone(submission):
    W = numbers(8, 4, 16)
    with unchanged(W=W):
        submission.rtn(W, 3, 8)


def test_the_number(submission, record_property):
    """The toy at 2 bits in groups of 16; and, as a control, with one grid a row: not enough."""
    recalls = []
    for group_size in (16, -1):
        model, tokenizer, _ = compressed_toy(submission.rtn, False, bits=2, group_size=group_size)
        recalls.append(recall(model, tokenizer))
        record_property(f"toy_recall %, groups of {group_size}", recalls[-1])
    must(recalls[0] >= REACH, f"toy_recall at 2 bits is {recalls[0]:.1f} %; it must reach {REACH} %")
    must(recalls[1] < REACH, f"with one grid a row recall is {recalls[1]:.1f} %: then groups are not used")
