"""The training loss of every remedy: mean next-token cross entropy of a row, without holding its logits.

    row_losses(model, ids)                         # (B,), what recover.py's training loop minimises
"""
import torch
from transformers import DynamicCache


class NoCache(DynamicCache):
    """A cache that keeps nothing. Without one transformers waits for the device at every step."""

    def update(self, keys, values, *args, **kwargs):
        """This pass's own keys and values."""
        return keys, values


class TokenLosses(torch.autograd.Function):
    """Cross entropy of every token, from the last hidden states, a few tokens at a time.

    (tokens, V) logits and their gradient would be the largest tensors of a step. The head is frozen, so a
    chunk's part of d loss / d hidden is known as soon as its logits are, and nothing else has to be kept.
    """
    CHUNK = 128                                            # tokens

    @staticmethod
    def forward(ctx, hidden, targets, head):
        """hidden (tokens, d), targets (tokens,), head: a frozen linear layer d -> V. -> (tokens,) float32."""
        losses, gradient = [], torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), TokenLosses.CHUNK):
            rows, target = slice(i, i + TokenLosses.CHUNK), targets[i:i + TokenLosses.CHUNK, None]
            logp = head(hidden[rows]).float().log_softmax(1)                                   # (chunk, V)
            losses.append(-logp.gather(1, target)[:, 0])
            if gradient is not None:
                # d loss / d logits = softmax(logits) - onehot(target)
                p = logp.exp_().scatter_add_(1, target, -torch.ones_like(losses[-1])[:, None])
                gradient[rows] = p.to(head.weight.dtype) @ head.weight                         # (chunk, d)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given):
        """given (tokens,): d result / d loss of each token."""
        gradient, = ctx.saved_tensors
        return (gradient * given[:, None]).to(gradient.dtype), None, None    # the product in float32


def row_losses(model, ids, counted=slice(None), **kwargs):
    """Mean next-token loss of each row of ids (B, T). -> (B,). counted: which of the T-1 later tokens.

    The first token is not scored: without a prompt nothing predicts it, so with one it must not count either.
    The last predicts nothing, so it does not run. kwargs: mask, positions and cache of the first T-1. Raises
    ValueError when the head is to be trained: its gradient is what TokenLosses leaves out.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("row_losses gives lm_head no gradient: freeze it, or use F.cross_entropy on logits")
    hidden = model.base_model(ids[:, :-1], **kwargs).last_hidden_state[:, counted]      # (B, counted, d)
    targets = ids[:, 1:][:, counted]
    losses = TokenLosses.apply(hidden.flatten(0, 1), targets.flatten(), head)
    return losses.view(targets.shape).mean(1)
