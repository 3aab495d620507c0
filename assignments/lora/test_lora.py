"""The grader of lora."""
import torch
import torch.nn as nn
import torch.nn.functional as F

import recover
from assignments.grading import check_close, check_tensor, compressed_toy, must, numbers, recall, toy_ids, unchanged
from methods.lora import LoRA, linears_in_blocks
from methods.pruning import magnitude

ASKED, FENCED = ["LoRALinear", "merged_weight"], ["methods.lora:LoRALinear"]
REACH, STEPS = 74.3, 100                                   # % recall of the pruned toy, merged and masked


def layer(submission, seed=0, **settings):
    """A base layer 10 -> 6 with a bias, and the student's LoRALinear around it."""
    base = nn.Linear(10, 6)
    with torch.no_grad():
        base.weight.copy_(numbers(seed, 6, 10))
        base.bias.copy_(numbers(seed + 1, 6))
    base.requires_grad_(False)
    return base, submission.LoRALinear(base, generator=torch.Generator().manual_seed(seed), **settings)


def test_shapes_and_parameters(submission):
    _, lora = layer(submission, r=3)
    check_tensor(lora.A, (3, 10), "A")
    check_tensor(lora.B, (6, 3), "B")
    check_tensor(lora(numbers(1, 2, 5, 10)), (2, 5, 6), "the output for x (2, 5, 10)")
    trained = sorted(name for name, p in lora.named_parameters() if p.requires_grad)
    must(trained == ["A", "B"], f"A and B, and nothing else, are trained; got {trained}")


def test_step_0_is_the_base_layer(submission):
    base, lora = layer(submission)
    x = numbers(2, 4, 10)
    must(torch.equal(lora(x), base(x)), "with B = 0 the output must be exactly the base layer's")
    must(lora.A.std() > 0, "A starts random: with A = B = 0 nothing could ever learn")
    again = layer(submission)[1]
    must(torch.equal(lora.A, again.A), "A must come from the generator: the same seed, the same A")


def test_equals_the_slow_version(submission):
    for r, alpha in ((3, 16), (8, 4)):
        base, lora = layer(submission, r=r, alpha=alpha)
        with torch.no_grad():
            lora.B.copy_(numbers(3, 6, r))
        x, right = numbers(4, 5, 10), torch.empty(5, 6)
        for t in range(5):                                 # one product at a time
            for i in range(6):
                delta = sum(lora.B[i, k] * (lora.A[k] @ x[t]) for k in range(r))
                right[t, i] = base.weight[i] @ x[t] + base.bias[i] + alpha / r * delta
        check_close(lora(x).detach(), right.detach(), f"the output at r {r}, alpha {alpha}")


def test_one_step_trains_A_and_B_and_leaves_W(submission):
    base, lora = layer(submission)
    x, y, optimizer = numbers(5, 64, 10), numbers(6, 64, 6), torch.optim.AdamW([lora.A, lora.B], lr=0.05)
    losses = []
    with unchanged(W=base.weight, bias=base.bias, x=x):
        for _ in range(20):
            losses.append(F.mse_loss(lora(x), y))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    must(losses[-1] < 0.9 * losses[0], f"20 steps bring the loss from {losses[0]:.3f} only to {losses[-1]:.3f}")


def test_merged_weight(submission):
    W, A, B, mask = numbers(7, 6, 10), numbers(8, 3, 10), numbers(9, 6, 3), numbers(10, 6, 10) > 0
    right = torch.stack([torch.stack([w + 2 * (B[i] @ A[:, j]) for j, w in enumerate(row)])
                         for i, row in enumerate(W)])
    with unchanged(W=W, A=A, B=B, mask=mask):
        check_close(submission.merged_weight(W, A, B, 2.0), right, "merged_weight without a mask")
        masked = submission.merged_weight(W, A, B, 2.0, mask)
    check_close(masked, torch.where(mask, right, torch.zeros(())), "merged_weight with a mask")


class Held(nn.Module):
    """The student's layer in the toy: as it is, or with its weight merged and masked, in training too."""

    def __init__(self, own, linear, merged_weight, under_mask):
        super().__init__()
        self.linear, self.own, self.A, self.B = linear, own, own.A, own.B
        self.merged_weight, self.under_mask, self.mask = merged_weight, under_mask, linear.weight != 0

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if not self.under_mask:
            return self.own(x)
        return F.linear(x, self.merged_weight(self.linear.weight, self.A, self.B, 2.0, self.mask))


def trained(submission, under_mask, seed):
    """Train on the pruned toy, under the mask or without. -> % recall as trained, % merged and masked."""
    model, tokenizer, _ = compressed_toy(lambda W: magnitude(W, 0.6), False)
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name, linear in linears_in_blocks(model).items():
        if name.endswith(("q_proj", "v_proj")):
            own = submission.LoRALinear(linear, r=8, alpha=16, generator=generator)
            layers[name] = Held(own, linear, submission.merged_weight, under_mask)
    method = LoRA(model, layers=layers)
    recover.train(method, toy_ids(tokenizer), STEPS, 16, 64, 1e-2, seed, quiet=True)
    with method.training():
        before = recall(model, tokenizer)
    for layer in layers.values():
        layer.under_mask = True
    with method.training():
        return before, recall(model, tokenizer)


def test_the_number(submission, seed, record_property):
    """Rank 8, 100 steps on shown people's facts. Control: trained without the mask, masked afterwards."""
    (_, reached), (unmerged, control) = trained(submission, True, seed), trained(submission, False, seed)
    record_property("toy_recall %", reached)
    record_property("toy_recall %, masked at the end", control)
    record_property("toy_recall %, never masked", unmerged)
    must(reached >= REACH, f"trained under the mask, toy_recall is {reached:.1f} %; it must reach {REACH} %")
    must(control < REACH, f"trained without the mask and then masked, recall is {control:.1f} %, as high")
