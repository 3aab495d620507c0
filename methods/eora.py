"""EoRA: a low-rank correction of a compressed layer, computed and not trained. [EoRA: Liu et al. 2024]

    B, A = eora(W - Q, H, r)                               # W - Q ~ B A where the layer's inputs are
    method = EoRA(model, r=8)                              # of the dense model; every layer is corrected by 0
    compress_model(..., observe=method.observe)            # now each by B A
    with method.inference(): model(ids)

Source: "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", arXiv
2410.21271; written from its formula. It sees calibration inputs and the weights that compression changed,
nothing of what the model should answer: what comes back with it was an error of weights.

Letters: r rank, W (out, in) dense, Q (out, in) compressed, E = W - Q, H (in, in) = mean of x x^T over
calibration tokens, A (r, in), B (out, r), X (tokens, in) the layer's inputs.
"""
import math

import torch
import torch.nn.functional as F

from methods.lora import LoRA, last_name, linears_in_blocks
from methods.rounding import working


def roots(H):
    """S and its pseudo-inverse, with H = S S^T. H (in, in) symmetric, eigenvalues >= 0 -> two (in, in).

    An eigenvalue that is zero but for rounding counts as zero, in S and in the pseudo-inverse: no calibration
    token has a part in that direction, so an error there costs nothing, and nothing is divided by zero.
    """
    H = working(H)
    # H = U diag(lambda) U^T
    # MPS has no eigh
    eigenvalues, U = (part.to(H.device) for part in torch.linalg.eigh(H.cpu() if H.is_mps else H))
    kept = eigenvalues > eigenvalues.amax() * len(H) * torch.finfo(H.dtype).eps                # (in,)
    # S = U diag(sqrt(lambda)),  S^+ = diag(1 / sqrt(lambda)) U^T, which is 0 where lambda is
    root, inverse = eigenvalues.where(kept, 0).sqrt(), eigenvalues.where(kept, math.inf).rsqrt()
    return U * root, inverse[:, None] * U.T


@torch.no_grad()
def eora(E, H, r):
    """The matrix of rank r that is nearest to E on the layer's inputs. -> B (out, r), A (r, in), float32.

    E (out, in), H (in, in). What is minimised over all B and A is the error of the layer's outputs,

        ||X (E - B A)^T||_F^2 = tokens trace((E - B A) H (E - B A)^T) = tokens ||E S - B A S||_F^2,

    with H = S S^T, so B A S is the truncated SVD of E S (Eckart and Young). Above the rank that a matrix of
    this shape can have, B and A are filled up with zeros.
    """
    S, inverse = roots(H)
    # E' = E U diag(sqrt(lambda)) = P diag(sigma) V^T ;  B = P_r diag(sigma_r),  A = V_r^T S^+
    P, sigma, V = torch.linalg.svd(E.to(S.dtype) @ S, full_matrices=False)
    B, A = P[:, :r] * sigma[:r], V[:r] @ inverse
    missing = r - len(A)
    return F.pad(B, (0, max(missing, 0))).float(), F.pad(A, (0, 0, 0, max(missing, 0))).float()


class EoRA(LoRA):
    """`eora`: LoRA whose A and B are computed while the model is compressed, by observe(); scaling is 1.

    targets: names of layers; every linear layer of every block when absent, as every one is compressed.
    Nothing is trained. Until it has observed, it is LoRA at its start: the model as it is.
    """

    def __init__(self, model, r=8, targets=None, seed=0):
        targets = targets or sorted({last_name(name) for name in linears_in_blocks(model)})
        super().__init__(model, r, alpha=r, targets=targets, seed=seed)

    @torch.no_grad()
    def observe(self, path, W, Q, H):
        """A and B of one layer, if it is a target. path: its name. W, Q (out, in), H (in, in).

        compress_model calls it for each layer. H is of the inputs that the walk meets: from the calibration
        text, through blocks that are compressed already and not corrected, as GPTQ's.
        """
        if path in self.layers:
            layer = self.layers[path]
            B, A = eora(W.float() - Q.float(), H, layer.r)
            layer.B.copy_(B)
            layer.A.copy_(A)

    @torch.no_grad()
    def at_rank(self, r):
        """The correction of a smaller rank: the first columns of B and rows of A, as of any truncated SVD."""
        smaller = EoRA(self.model, r, sorted({last_name(path) for path in self.layers}))
        for path, layer in smaller.layers.items():
            layer.B.copy_(self.layers[path].B[:, :r])
            layer.A.copy_(self.layers[path].A[:r])
        return smaller
