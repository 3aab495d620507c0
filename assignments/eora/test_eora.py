"""The grader of eora."""
import torch

from assignments.grading import check_tensor, compressed_toy, hessian, must, numbers, recall, unchanged
from methods.pruning import magnitude

ASKED, FENCED = ["eora"], ["methods.eora"]
REACH = 0.200                                              # relative error of the toy's layers: 60 % pruned, rank 8


def loss(E, H, B, A):
    """trace((E - B A) H (E - B A)^T), in float64. -> float."""
    D = E.double() - B.double() @ A.double()
    return ((D @ H.double()) * D).sum().item()


def least(E, H, r):
    """What no matrix of rank r can go below: the squared singular values of E H^(1/2) beyond the first r."""
    lam, V = torch.linalg.eigh(H.double())
    root = V @ lam.clamp(min=0).sqrt().diag() @ V.T        # (in, in)
    return torch.linalg.svdvals(E.double() @ root)[r:].square().sum().item()


def check_optimum(submission, E, H, r, what):
    """The loss of B A is the least there is."""
    B, A = submission.eora(E, H, r)
    check_tensor(B, (len(E), r), f"B, {what},")
    check_tensor(A, (r, E.shape[1]), f"A, {what},")
    got, best, all_of_it = loss(E, H, B, A), least(E, H, r), least(E, H, 0)
    must(got <= best + 1e-4 * all_of_it, f"{what}: B A leaves {got / all_of_it:.4f} of the output error; the least "
                                         f"for rank {r} is {best / all_of_it:.4f}")


def test_shapes(submission):
    for out, columns, r in ((6, 10, 3), (10, 6, 1)):
        B, A = submission.eora(numbers(0, out, columns), hessian(0, columns), r)
        check_tensor(B, (out, r), "B")
        check_tensor(A, (r, columns), "A")


def test_the_error_is_the_least_there_is(submission):
    for seed, r in ((1, 1), (2, 4), (3, 12)):
        check_optimum(submission, numbers(seed, 12, 20), hessian(seed, 20), r, f"seed {seed}")


def test_full_rank_repairs_everything(submission):
    E, H = numbers(4, 8, 12, dtype=torch.float64), hessian(4, 12, dtype=torch.float64)
    B, A = submission.eora(E, H, 8)
    gap = (B.double() @ A.double() - E).abs().max().item()
    must(gap < 1e-4, f"at rank 8 of 8, B A must be E; it is off by {gap:.3g}")


def test_with_H_the_identity_it_is_plain_svd(submission):
    check_optimum(submission, numbers(5, 12, 16), torch.eye(16), 3, "H = I")


def test_an_input_that_is_always_zero(submission):
    H = hessian(6, 16)
    H[3], H[:, 3] = 0, 0
    check_optimum(submission, numbers(6, 12, 16), H, 3, "input 3 always zero")


def test_inputs_are_left_alone(submission):
    E, H = numbers(7, 6, 10), hessian(7, 10)
    with unchanged(E=E, H=H):
        submission.eora(E, H, 2)


def repaired(function):
    """A compressor: prune 60 % by magnitude, add what the function finds at rank 8."""
    def compressor(W, H):
        """W (out, in), H (in, in) -> (out, in)."""
        Q = magnitude(W, 0.6)
        B, A = function(W - Q, H, 8)
        return Q + B @ A
    return compressor


def test_the_number(submission, seed, record_property):
    """On the toy; and, as a control, with H = I, which is a plain SVD of the weights' error: not enough."""
    blind, errors = lambda E, H, r: submission.eora(E, torch.eye(len(H)), r), []
    for function, name in ((submission.eora, ""), (blind, ", H = I")):
        model, tokenizer, report = compressed_toy(repaired(function), True, seed)
        errors.append(report["mean_error"])
        record_property(f"error{name}", errors[-1])
        record_property(f"toy_recall %{name}", recall(model, tokenizer))
    error, control = errors
    must(error <= REACH, f"relative error of the toy's layers is {error:.3f}; it must be at most {REACH}")
    must(control > REACH, f"with H = I the error is {control:.3f}, as low: then H is not used")
