"""Scoring: the log-likelihood of continuations, each context computed once, whatever the batch.

    scores = scores_of_pairs(model, tokenizer, [[(context, " baker"), (context, " sailor")], ...])

A model is called as model(input_ids, attention_mask, ...) -> logits of the real tokens and nothing else is
known of it, so a plain model, one with LoRA and one that chooses soft prompts are scored by the same lines.
"""
import copy
import math
import re

import torch
from torch.nn.utils.rnn import pad_sequence

from idp_minimal import CACHE
from support.cli import UserError
from support.data import encode, first_token
from support.files import finite
from support.architectures import room
from support.progress import progress

TOKENS = 4096    # of one batch, padding and shared contexts included: what bounds memory is tokens, not rows


def encode_pair(tokenizer, context, continuation, limit):
    """-> (context ids, continuation ids), tokenized jointly and cut where the context alone ends.

    Trailing blanks of the context go to the continuation. When one token spans the join and nothing is left
    of the continuation, it is encoded alone; an empty context becomes the BOS (or EOS) token. A context that
    does not fit is cut from the left: `limit` tokens are read, and the last token of the continuation is
    never read. Raises UserError when the continuation has no token, or alone exceeds the limit.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if stripped:
        left, whole = encode(tokenizer, stripped), encode(tokenizer, stripped + continuation)
        right = whole[len(left):] or encode(tokenizer, continuation, start=False)
    else:
        left, right = [first_token(tokenizer)], encode(tokenizer, continuation, start=False)
    if not right:
        raise UserError(f"--tasks: {continuation!r} after {context[-30:]!r} has no tokens, and nothing would "
                        "always be likeliest; give every choice a text")
    if len(right) > limit:
        raise UserError(f"--tasks: {continuation[:30]!r} has {len(right)} tokens, and the model reads "
                        f"{limit}; shorten it")
    return left[-(limit - len(right) + 1):], right


def pad(rows, value, left, device):
    """Lists of ints -> (B, T) long, padded on one side, and its mask (B, T) long."""
    side = "left" if left else "right"
    ids = pad_sequence([torch.tensor(row) for row in rows], True, value, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)
    return torch.stack([ids, mask]).to(device).unbind()    # one copy for both: each waits for the device


@torch.no_grad()
def continuation_scores(model, groups, batch_size=16, max_length=None, desc="score"):
    """Log-likelihood of every continuation of every context.

    groups: [(context ids, [continuation ids, ...]), ...] -> the same nesting of (sum of log p in float32, is
    it the greedy continuation). A context runs once and its cache is shared by its continuations, so an IDP
    model chooses its prompt by the context alone, as when it generates. Batches are sorted by length; no
    result depends on them.
    """
    limit, results = max_length or room(model), [None] * len(groups)
    for part in progress(batches(groups, batch_size, limit), desc=desc):
        for i, scores in zip(part, score_batch(model, [groups[i] for i in part], batch_size)):
            results[i] = scores
    finite(sum(score for scores in results for score, _ in scores), "the log-likelihood of an answer")
    return results


def batches(groups, batch_size, limit):
    """Indices of groups, longest contexts first, in batches that fit `limit` columns and TOKENS."""
    parts, longest = [], 0
    for i in sorted(range(len(groups)), key=lambda i: len(groups[i][0]), reverse=True):
        rest = max(map(len, groups[i][1]))
        columns = len(groups[parts[-1][0]][0]) + max(longest, rest) - 1 if parts else 0
        full = parts and (len(parts[-1]) == batch_size or (len(parts[-1]) + 1) * columns > TOKENS)
        if not parts or full or columns > limit:
            parts.append([])
            longest = 0
        parts[-1].append(i)
        longest = max(longest, rest)
    return parts


def score_batch(model, groups, batch_size):
    """One batch of contexts, then their continuations, a few at a time. One read from the device."""
    rows = [(i, j) for i, (_, rest) in enumerate(groups) for j in range(len(rest))]
    rows.sort(key=lambda row: len(groups[row[0]][1][row[1]]))
    lengths = [len(groups[i][1][j]) for i, j in rows]
    # All that a batch needs is copied before the model runs: a copy in between would wait for the device.
    ids, mask = pad([context for context, _ in groups], 0, left=True, device=model.device)     # (B, T)
    target, real = pad([groups[i][1][j] for i, j in rows], 0, left=False, device=model.device)      # (R, C)
    owner = torch.tensor([i for i, _ in rows], device=model.device)                 # (R,) the context of each
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    most, parts = max(1, min(batch_size, TOKENS // (ids.shape[1] + lengths[-1]))), []
    for start in range(0, len(rows), most):
        part, columns = slice(start, start + most), max(lengths[start:start + most])
        parts.append(score_rows(model, out, owner[part], mask, positions, target[part, :columns],
                                real[part, :columns]))                                         # (2, R)
    results = [[None] * len(rest) for _, rest in groups]
    for (i, j), logp, greedy in zip(rows, *torch.cat(parts, dim=1).tolist()):
        results[i][j] = (logp, bool(greedy))
    return results


def score_rows(model, out, owner, mask, positions, target, real):
    """Continuations `target` (R, C) of the contexts `owner` (R,) in `out`. -> (2, R): log p, greedy."""
    logp, greedy = token_scores(out.logits[owner, -1:], target[:, :1])                         # (R, 1)
    if target.shape[1] > 1:                                # continuations of one token are scored already
        position = positions[owner, -1:] + 1 + torch.arange(target.shape[1] - 1, device=target.device)
        logits = model(input_ids=target[:, :-1], attention_mask=torch.cat([mask[owner], real[:, :-1]], dim=1),
                       position_ids=position, **{CACHE: rows_of(out[CACHE], owner)}, use_cache=True).logits
        rest = token_scores(logits, target[:, 1:])                                             # (R, C-1)
        logp, greedy = torch.cat([logp, rest[0]], 1), torch.cat([greedy, rest[1]], 1)          # (R, C)
    return torch.stack([(logp * real).sum(1), (greedy | (real == 0)).all(1).float()])


def rows_of(cache, owner):
    """A cache holding rows `owner` (R,) of another, which stays as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(owner)
    return part


def token_scores(logits, target, tokens=1024):
    """log p of each target token, and whether it is the most likely. logits (R, C, V), target (R, C) -> two
    (R, C).

    Some tokens at a time: float32 copies of (R, C, V) would take more memory than the model.
    """
    logp, greedy = [], []
    for z, t in zip(logits.flatten(0, 1).split(tokens), target.flatten().split(tokens)):
        z = z.float()                                                                          # (tokens, V)
        # log p_t = z_t - log sum_v exp z_v
        logp.append(z.gather(1, t[:, None])[:, 0] - z.logsumexp(1))
        greedy.append(z.argmax(1) == t)
    return torch.cat(logp).view(target.shape), torch.cat(greedy).view(target.shape)


def scores_of_pairs(model, tokenizer, rows, batch_size, max_length, desc):
    """rows: one list of (context, continuation) texts per item -> the same nesting of (sum of log p, is
    greedy).

    The pairs of an item that share a context are scored from one pass over it.
    """
    limit = max_length or room(model)
    groups, where = [], []                                 # one group per different context of an item
    for i, pairs in enumerate(rows):
        contexts = {}
        for j, pair in enumerate(pairs):
            left, right = encode_pair(tokenizer, *pair, limit)
            contexts.setdefault(tuple(left), []).append((j, right))
        for left, items in contexts.items():
            groups.append((list(left), [right for _, right in items]))
            where.append((i, [j for j, _ in items]))
    results = [[None] * len(pairs) for pairs in rows]
    for (i, places), scores in zip(where, continuation_scores(model, groups, batch_size, limit, desc)):
        for j, score in zip(places, scores):
            results[i][j] = score
    return results


def rolling_windows(ids, first, limit):
    """[(context ids, continuation ids)] that predict every token of ids once, from as much context as `limit`
    allows.

    The first window follows the token `first`; only the last one overlaps what was predicted already.
    """
    ends = [min(start + limit, len(ids)) for start in range(0, len(ids), limit)]
    windows = [([first], ids[:limit])]
    return windows + [(ids[end - limit - 1:start], ids[start:end]) for start, end in zip(ends, ends[1:])]


def word_perplexity(model, tokenizer, documents, max_length=None, clean=lambda text: text):
    """The standard harness's word perplexity: exp(- sum of log p of all documents / words). -> float.

    clean: applied to a document before it is scored (data.detokenize for WikiText); its words are counted
    before. Raises UserError when there is no word.
    """
    limit, words, windows = max_length or room(model), 0, []
    for text in filter(str.strip, documents):
        words += len(re.split(r"\s+", text))
        windows += rolling_windows(encode(tokenizer, clean(text)), first_token(tokenizer), limit)
    if not words:
        raise UserError("--eval-text: has no words; word perplexity needs at least one")
    # Each window is one context token (or the overlap) and up to `limit` continuation tokens, so one at a
    # time fills a device.
    groups = [(left, [right]) for left, right in windows]
    scores = continuation_scores(model, groups, 1, limit, "word perplexity")
    return math.exp(-sum(score for [(score, _)] in scores) / words)
