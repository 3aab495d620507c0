"""The grader of gptq."""
import torch

from assignments.grading import check_close, check_tensor, compressed_toy, hessian, must, numbers, recall, unchanged
from methods.rounding import fit_grid, to_code

ASKED, FENCED = ["gptq"], ["methods.gptq"]
REACH = 0.28                                               # relative error of the toy's layers: 2 bits, groups of 64


def slow_gptq(W, H, bits, group_size, percdamp=0.01):
    """The same from the definition: a new inverse for the columns that are left, at every column.

    W (out, in), H (in, in) float64 -> (out, in).
    """
    W, columns = W.clone(), W.shape[1]
    width = columns if group_size == -1 else group_size
    H = H + percdamp * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    for i in range(columns):
        if i % width == 0:
            scale, zero = fit_grid(W[:, i:i + width], bits, False)
        q = (to_code(W[:, i], scale, zero, bits) - zero) * scale
        inverse = torch.linalg.inv(H[i:, i:])              # (left, left)
        W[:, i:] -= ((W[:, i] - q) / inverse[0, 0])[:, None] * inverse[0]
        W[:, i] = q
    return W


def test_shape_and_dtype(submission):
    for dtype in (torch.float32, torch.float64):
        Q = submission.gptq(numbers(0, 6, 20).to(dtype), hessian(1, 20, dtype=dtype), 3, 8)
        check_tensor(Q, (6, 20), "Q")
        must(Q.dtype == dtype, f"W is {dtype}, Q must be too, got {Q.dtype}")


def test_equals_the_slow_version(submission):
    for seed, bits, group_size in ((1, 3, 8), (2, 2, 5), (3, 4, -1)):
        W, H = numbers(seed, 5, 20, dtype=torch.float64), hessian(seed, 20, dtype=torch.float64)
        Q = submission.gptq(W, H, bits, group_size)
        check_close(Q, slow_gptq(W, H, bits, group_size), f"Q at {bits} bits, group_size {group_size}", 1e-9)


def test_damping_counts(submission):
    W, H = numbers(4, 5, 16, dtype=torch.float64), hessian(4, 16, dtype=torch.float64)
    for percdamp in (0.001, 1.0):
        check_close(submission.gptq(W, H, 3, 8, percdamp=percdamp), slow_gptq(W, H, 3, 8, percdamp),
                    f"Q at percdamp {percdamp}", 1e-9)


def test_on_the_grid(submission):
    """At most 2^bits values in a group of a row: the last step is rounding, not correcting."""
    Q = submission.gptq(numbers(5, 4, 32, dtype=torch.float64), hessian(5, 32, dtype=torch.float64), 2, 16)
    counts = [len(part.unique()) for row in Q for part in row.split(16)]
    must(max(counts) <= 4, f"a group of 2-bit weights holds {max(counts)} different values; at most 4 can be")


def test_inputs_are_left_alone(submission):
    W, H = numbers(6, 4, 16), hessian(6, 16)
    with unchanged(W=W, H=H):
        submission.gptq(W, H, 3, 8)


def test_the_number(submission, seed, record_property):
    """The toy at 2 bits; and, as a control, with H = I, which is rounding to nearest: not enough."""
    model, tokenizer, report = compressed_toy(submission.gptq, True, seed, bits=2, group_size=64)
    error = report["mean_error"]
    record_property("error", error)
    record_property("toy_recall %", recall(model, tokenizer))
    must(error <= REACH, f"relative error of the toy's layers is {error:.3f}; it must be at most {REACH}")
    blind = lambda W, H, **settings: submission.gptq(W, torch.eye(len(H)), **settings)
    control = compressed_toy(blind, True, seed, bits=2, group_size=64)[2]["mean_error"]
    record_property("error, H = I", control)
    must(control > REACH, f"with H = I the error is {control:.3f}, as low: then H is not used")
