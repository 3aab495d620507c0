"""The grader of wanda."""
import torch

from assignments.grading import check_close, check_tensor, compressed_toy, hessian, must, numbers, recall, unchanged

ASKED, FENCED = ["wanda"], ["methods.wanda"]
REACH = 0.260                                              # relative error of the toy's layers at 60 %


def slow_wanda(W, H, sparsity):
    """Row by row, by sorting pairs. W (out, in), H (in, in) -> (out, in)."""
    Q = W.clone()
    for i, row in enumerate(W.tolist()):
        scores = [(abs(w) * H[j, j].item() ** 0.5, j) for j, w in enumerate(row)]
        for _, j in sorted(scores)[:round(sparsity * len(row))]:
            Q[i, j] = 0
    return Q


def test_shape_and_dtype(submission):
    for dtype in (torch.float32, torch.float16):
        Q = submission.wanda(numbers(0, 6, 20).to(dtype), hessian(1, 20), 0.5)
        check_tensor(Q, (6, 20), "Q")
        must(Q.dtype == dtype, f"W is {dtype}, Q must be too, got {Q.dtype}")


def test_every_row_has_the_same_number_of_zeros(submission):
    W = numbers(1, 7, 20) * torch.linspace(0.1, 3, 7)[:, None]
    for sparsity in (0, 0.35, 0.5, 1):
        zeros = (submission.wanda(W, hessian(2, 20), sparsity) == 0).sum(1).tolist()
        wanted = round(sparsity * 20)
        must(zeros == [wanted] * 7, f"at sparsity {sparsity} each row of 20 must have {wanted} zeros, got {zeros}")


def test_equals_the_slow_version(submission):
    for seed, sparsity in ((3, 0.5), (4, 0.25), (5, 0.6)):
        W, H = numbers(seed, 6, 24), hessian(seed, 24)
        check_close(submission.wanda(W, H, sparsity), slow_wanda(W, H, sparsity), f"Q at sparsity {sparsity}")


def test_ties_and_inputs_that_are_always_zero(submission):
    W, H = torch.ones(3, 8), torch.eye(8)
    check_close(submission.wanda(W, H, 0.5), slow_wanda(W, H, 0.5), "Q of equal weights")
    H[5, 5] = 0
    check_close(submission.wanda(W, H, 0.25), slow_wanda(W, H, 0.25), "Q with input 5 always zero")


def test_inputs_are_left_alone(submission):
    W, H = numbers(6, 4, 16), hessian(6, 16)
    with unchanged(W=W, H=H):
        submission.wanda(W, H, 0.5)


def test_the_number(submission, seed, record_property):
    """On the toy, with H; and, as a control, with H = I, which is magnitude row by row: not enough."""
    model, tokenizer, report = compressed_toy(submission.wanda, True, seed, sparsity=0.6)
    error = report["mean_error"]
    record_property("error", error)
    record_property("toy_recall %", recall(model, tokenizer))
    must(error <= REACH, f"relative error of the toy's layers is {error:.3f}; it must be at most {REACH}")
    blind = lambda W, H, sparsity: submission.wanda(W, torch.eye(len(H)), sparsity)
    control = compressed_toy(blind, True, seed, sparsity=0.6)[2]["mean_error"]
    record_property("error, H = I", control)
    must(control > REACH, f"with H = I the error is {control:.3f}, as low: then H is not used")
