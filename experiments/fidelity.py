"""Fidelity: how like the dense model another one is, beyond accuracy. Three measures, a few lines each.

  KL      mean over scored tokens of KL(p || q), p the dense model's next-token distribution, q the other's;
          nats per token
  flips   questions that the dense model got right and the other one wrong, and the other way round
  cosine  per layer, of attention and of the hidden states after the block, with the dense model's [Fig. 6]

Accuracy hides what cancels: a model that loses ten answers and guesses ten others has lost none. NOT IN
PAPER: KL and flips ("Accuracy is not all you need", NeurIPS 2024), and over what Fig. 6 takes its cosines.
Here: attention of one query over the real tokens, prompt columns cut out; the hidden state of one token;
means over heads, tokens and chunks. The first token is left out, as in patterns.py: it sees only itself.

    reference = Reference(model, ids, seqlen, context, limit)      # while the model is dense
    reference.compare(model, attached)                             # {"kl", "kl_ci95", "kl_chunks", "cosine"}

What the dense model said is kept on the CPU as it came, in the model's own dtype, so that nothing is lost and
no second model is ever in memory; of as many chunks as fit KL_BYTES.
Letters: B chunks, T tokens, S scored tokens, V words, h heads, N prompt columns, L layers, A attention, X
hidden states.
"""
import torch
import torch.nn.functional as F

from evaluate import scored_part
from experiments.patterns import look, look_at_dense, visible_attention
from support.scoring import TOKENS
from support.uncertainty import discordant, mean_ci95

COSINES = ("attention", "activations")
KL_BYTES = 2**30                                           # of dense logits that are kept
LOOK_CHUNKS, LOOK_TOKENS = 8, 128                          # looked into: 4 L h T^2 bytes of attention a chunk


def token_kl(dense, logits, tokens=1024):
    """KL(p || q) of each token, p = softmax of `dense`. dense, logits (B, S, V) -> (B, S) float32.

    Some tokens at a time, or float32 copies of (B, S, V) would take more memory than the model.
    """
    result = []
    for d, z in zip(dense.flatten(0, 1).split(tokens), logits.flatten(0, 1).split(tokens)):
        log_p, log_q = d.float().log_softmax(1), z.float().log_softmax(1)                      # (tokens, V)
        # KL(p || q) = sum_v p_v (log p_v - log q_v)
        result.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(result).view(logits.shape[:2])


def cosines(A, X, A_dense, X_dense):
    """One layer's likeness. A (B, h, T, N+T), X (B, T, d), A_dense (B, h, T, T) -> two floats in [-1, 1]."""
    real = A[..., A.shape[3] - A.shape[2]:]                # (B, h, T, T)
    # a cosine asks for no length, so what is left beside the prompt need not sum to one
    attention = F.cosine_similarity(real[..., 1:, :], A_dense[..., 1:, :], dim=-1)             # (B, h, T-1)
    return attention.mean().item(), F.cosine_similarity(X[:, 1:], X_dense[:, 1:], dim=-1).mean().item()


def flips(dense, other):
    """Two lists of right or wrong on the same questions. -> (right to wrong, wrong to right)."""
    return discordant(dense, other)


class Reference:
    """What the dense model gives on the evaluation text: logits of scored tokens, attention, hidden states.

    ids (tokens,), cut as evaluate.chunk_losses cuts it. Made while the model is dense.
    """

    def __init__(self, model, ids, seqlen, context, limit=None):
        seqlen = min(seqlen, len(ids))
        self.context = min(context, seqlen - 1)
        chunks = ids[:len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]                    # (chunks, T)
        chunk_bytes = (seqlen - max(1, self.context)) * model.config.vocab_size * model.dtype.itemsize
        self.parts = chunks[:max(1, KL_BYTES // chunk_bytes)].split(max(1, min(8, TOKENS // seqlen)))
        self.logits = [self.read(model, rows).cpu() for rows in self.parts]                    # of (B, S, V)
        T = min(seqlen, LOOK_TOKENS)
        self.seen = ids[:len(ids) // T * T].view(-1, T)[:LOOK_CHUNKS]                  # (LOOK_CHUNKS, T)
        self.looks = look_at_dense(model, self.seen)

    @torch.no_grad()
    def read(self, model, rows):
        """Logits of the scored tokens. rows (B, T) -> (B, S, V) on the device."""
        return scored_part(model, rows.to(model.device), self.context)[0]

    def mean_kl(self, model):
        """KL to the dense model, the mean over each chunk's scored tokens. -> (chunks,) nats per token."""
        means = []
        for rows, dense in zip(self.parts, self.logits):
            logits = self.read(model, rows)                # (B, S, V)
            means.append(token_kl(dense.to(logits.device), logits).mean(1).cpu())
        return torch.cat(means)

    def likeness(self, model, attached=None):
        """[Fig. 6] Cosines with the dense model. -> (LOOK_CHUNKS, L, 2): of attention, of hidden states."""
        table = []
        with visible_attention(model, attached):
            for ids, dense in zip(self.seen, self.looks):
                layers, _ = look(model, ids[None].to(model.device))
                pairs = zip(layers, dense)                 # L pairs of (A, X)
                table.append([cosines(*new, *(t.to(model.device) for t in old)) for new, old in pairs])
        return torch.tensor(table)

    def compare(self, model, attached=None):
        """All that a row of results holds. attached: the IDP in use, if any."""
        kl, table = self.mean_kl(model), self.likeness(model, attached)
        cosine = {name: {"layers": values.mean(0).tolist(), "mean": values.mean().item(),
                         "ci95": mean_ci95(values.mean(1).tolist())}
                  for name, values in zip(COSINES, table.unbind(-1))}                       # (LOOK_CHUNKS, L)
        return {"kl": kl.mean().item(), "kl_ci95": mean_ci95(kl.tolist()), "kl_chunks": len(kl),
                "cosine": {"chunks": len(self.seen), **cosine}}
