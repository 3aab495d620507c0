"""Every prompt scored once on every item: what each rule of choosing.py would get is then looked up.

    scores = Scores(rows, [score(model, tokenizer, rows, chunks, bank, k) for k in range(bank.m)])
    scores.accuracy(chosen)                                # as if a rule that chooses (n,) so had run

Looking a choice up is the same as running it: the law of idp_minimal.py, and tests/test_choosing.py.
"""
import contextlib
import math

import torch

import evaluate
from idp_minimal import attach_idp


@torch.no_grad()
def second_half(model, chunks, batch_size=8):
    """Log-probability of each token in the second half of each chunk. chunks (C, T) -> (C, T - T//2)."""
    half, logp = chunks.shape[1] // 2, []
    for rows in chunks.split(batch_size):
        rows = rows.to(model.device)
        keep = torch.arange(half - 1, rows.shape[1] - 1, device=rows.device)
        logits = model(rows, use_cache=False, logits_to_keep=keep).logits                     # (B, T-half, V)
        logp.append(evaluate.token_scores(logits, rows[:, half:])[0].cpu())
    return torch.cat(logp)


def score(model, tokenizer, rows, chunks, bank=None, k=0):
    """Answers and text under one prompt, or under none. -> (log p of choices, of tokens (C, T'))."""
    with attach_idp(model, bank, "fixed", k=k) if bank else contextlib.nullcontext():
        answers = evaluate.multiple_choice(model, tokenizer, rows)["logp"]
        return [torch.tensor(a) for a in answers], None if chunks is None else second_half(model, chunks)


class Scores:
    """Answers and text under each of several prompts. answers: n tensors (m, choices); text: (m, C, T')."""

    def __init__(self, rows, scored):
        self.gold = torch.tensor([row["answer"] for row in rows])                              # (n,)
        self.answers = [torch.stack(per_prompt) for per_prompt in zip(*(answers for answers, _ in scored))]
        texts = [text for _, text in scored]
        self.text = None if texts[0] is None else torch.stack(texts)                           # (m, C, T')

    def accuracy(self, items):
        """Accuracy when item i is answered by prompt items[i]."""
        right = [a[k].argmax() == gold for a, k, gold in zip(self.answers, items, self.gold)]
        return torch.stack(right).float().mean().item()

    def perplexity(self, texts):
        """Perplexity of the second halves when chunk j is read under prompt texts[j]."""
        return math.exp(-self.text[texts, torch.arange(len(texts))].mean())

    def oracle(self):
        """The prompt with the lowest loss on the right answer, on the second half itself. -> (n,), (C,)."""
        items = torch.stack([a[:, gold].argmax() for a, gold in zip(self.answers, self.gold)])
        return items, self.text.mean(2).argmax(0)

    def averaged(self):
        """All prompts' probabilities averaged, at m times the cost [§3.1]. -> accuracy, perplexity."""
        right = [a.logsumexp(0).argmax() == gold for a, gold in zip(self.answers, self.gold)]
        logp = self.text.logsumexp(0) - math.log(len(self.text))                               # (C, T')
        return torch.stack(right).float().mean().item(), math.exp(-logp.mean())
