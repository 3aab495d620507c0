"""The training losses of every remedy: a mean over the next tokens of a row, without holding its logits.

    row_losses(model, ids)                         # (B,), text: cross entropy of the token that comes next
    row_losses(model, ids, teacher=dense)          # (B,), distill: KL divergence from the dense model's guess

From text a remedy can learn what the text says. The dense model's distributions say what the model itself did
before it was compressed: its function. Only the first is the paper's.
"""
import torch
from transformers import DynamicCache

from idp_minimal import CACHE


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
        product = (gradient * given[:, None]).to(gradient.dtype)             # the product in float32
        return product, *[None] * (len(ctx.needs_input_grad) - 1)


class TokenDivergences(TokenLosses):
    """KL(dense || student) of every token's next-token distribution, a few tokens at a time as well."""

    @staticmethod
    def forward(ctx, hidden, dense, head, dense_head):
        """hidden (tokens, d), head: the student's. dense (tokens, d'), dense_head: the teacher's, constants.
        -> (tokens,) float32, in nats.
        """
        losses, gradient = [], torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), TokenLosses.CHUNK):
            rows = slice(i, i + TokenLosses.CHUNK)
            logp = dense_head(dense[rows]).float().log_softmax(1)                              # (chunk, V)
            logq = head(hidden[rows]).float().log_softmax(1)                                   # (chunk, V)
            # KL(p || q) = sum of p (log p - log q) over the vocabulary
            p = logp.exp()
            losses.append((p * logp.sub_(logq)).sum(1))
            if gradient is not None:
                # d KL / d logits = softmax(logits) - p
                gradient[rows] = logq.exp_().sub_(p).to(head.weight.dtype) @ head.weight       # (chunk, d)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)


@torch.no_grad()
def dense_states(teacher, ids, counted, copies):
    """The teacher's last hidden states. ids (copies B, T), B rows over and over -> (copies B, counted, d)."""
    rows = ids[:len(ids) // copies, :-1]                                                       # (B, T-1)
    hidden = teacher.base_model(rows, use_cache=False, **{CACHE: NoCache()}).last_hidden_state
    return hidden[:, counted].repeat(copies, 1, 1)


def row_losses(model, ids, counted=slice(None), teacher=None, copies=1, **kwargs):
    """Mean next-token loss of each row of ids (B, T). -> (B,). counted: which of the T-1 later tokens.

    The first token is not scored: without a prompt nothing predicts it, so with one it must not count either.
    The last predicts nothing, so it does not run. teacher: the dense model, a frozen model of its own, which
    runs without prompt or adapter; the loss is then KL(teacher || model) of the same tokens. copies: ids hold
    the same rows so many times over, so the teacher reads them once. kwargs: mask, positions and cache of the
    first T-1. Raises ValueError when the head is to be trained: its gradient is what TokenLosses leaves out.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("row_losses gives lm_head no gradient: freeze it, or use F.cross_entropy on logits")
    hidden = model.base_model(ids[:, :-1], **kwargs).last_hidden_state[:, counted]      # (B, counted, d)
    targets = ids[:, 1:][:, counted]
    if teacher is None:
        losses = TokenLosses.apply(hidden.flatten(0, 1), targets.flatten(), head)
    else:
        dense = dense_states(teacher, ids, counted, copies)                             # (B, counted, d)
        losses = TokenDivergences.apply(
            hidden.flatten(0, 1), dense.flatten(0, 1), head, teacher.get_output_embeddings())
    return losses.view(targets.shape).mean(1)
