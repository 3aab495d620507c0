"""LoRA, and LoRA under a mask. Grade it with: python -m pytest assignments/lora --submission FILE"""
import torch.nn as nn


class LoRALinear(nn.Module):
    """y = x W^T + (alpha / r) x A^T B^T, with W frozen. [Hu et al. 2021]

    linear: an nn.Linear (in, out), used and never changed. A (r, in) starts random (the generator's), B
    (out, r) at zero, so that step 0 is exactly the base layer; both are nn.Parameters of these names.
    """

    def __init__(self, linear, r=8, alpha=16, generator=None):
        super().__init__()
        raise NotImplementedError("write LoRALinear.__init__")

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        raise NotImplementedError("write LoRALinear.forward")


def merged_weight(W, A, B, scaling, mask=None):
    """W + scaling B A as one weight (out, in). mask (out, in), True where a weight may be other than zero.

    With a mask the sum stays pruned: zero where the mask is False. Gradients must flow to A and B, so that one
    can train under the mask.
    """
    raise NotImplementedError("write merged_weight")
