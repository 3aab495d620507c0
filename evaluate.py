"""Evaluate: perplexity, multiple choice, open answers, each with a 95 % interval; which differences are real; patterns.

    python evaluate.py --model toy                                         # the toy tasks, seconds on a CPU
    python evaluate.py --model smollm2 --tasks arc_easy,sciq --text wikitext2 --limit 200 --out runs/dense
    python evaluate.py --model runs/compressed --adapter runs/idp/adapter  # what recover.py wrote
    python evaluate.py --compare runs/A/results.json runs/B/results.json   # paired tests between any two rows
    python evaluate.py --patterns --adapter runs/idp/adapter --adapter runs/lora/adapter  # what they do inside (patterns.py)
    python evaluate.py --latency --shape smollm2-135m                      # what each remedy costs (latency.py)

The model is only ever called as model(input_ids, attention_mask, ...) -> logits of the real tokens, so a plain model, one
with LoRA, and one that chooses soft prompts (idp_minimal.py:attach_idp) are scored by the same lines.

Definitions, since several are in use:
  perplexity  GPTQ's: the text tokenized once, cut into chunks of seqlen, the tail dropped; exp of the mean over chunks of
              the mean loss of the seqlen - 1 targets of a chunk. Not comparable with word_ppl.
  word_ppl    the standard harness's word perplexity (--word-ppl): each document apart, each token predicted once from as
              much context as the model takes; exp of the loss per word of the text.
  acc         argmax over choices of log p(" " + choice | context), summed over tokens, as the standard harness does.
  acc_norm    the same, divided by the number of characters of the choice.
  open        a question (its last line is one word and a colon, as "Answer:"): the greedy completion's first line, or that
              line up to its first full stop or comma, normalised, equals an alias. Any other text is to be continued: an
              alias is the greedy continuation, as LAMBADA is scored.
"""
import contextlib
import copy
import math
import pathlib
import re
import shlex
import string
import sys
import time

import torch
from tqdm import tqdm

import loading
from idp_minimal import CACHE, IDP
from loading import UserError
from uncertainty import accuracy, bootstrap, compare, fingerprint


# --- 1. Perplexity ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def chunk_losses(model, ids, seqlen, batch_size=8, limit=None):
    """Mean next-token loss of each chunk. ids: (tokens,) long -> (chunks,) float32 on the CPU, nats per token.

    Non-overlapping chunks, the tail dropped; a text shorter than seqlen is one shorter chunk. Raises UserError below 2 tokens.
    """
    seqlen = min(seqlen, len(ids))
    if seqlen < 2:
        raise UserError(f"--eval-text: has {len(ids)} tokens; perplexity needs at least 2")
    chunks = ids[:len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]                        # (chunks, seqlen)
    losses = []
    for rows in tqdm(chunks.split(batch_size), desc="perplexity", disable=None, leave=False):
        rows = rows.to(model.device)
        keep = torch.arange(seqlen - 1, device=rows.device)
        logits = model(rows, use_cache=False, logits_to_keep=keep).logits                      # (B, seqlen-1, V)
        losses.append(-token_scores(logits, rows[:, 1:])[0].mean(1).cpu())
    return torch.cat(losses)


def perplexity(model, ids, seqlen, batch_size=8, limit=None):
    """exp(mean over chunks of the chunk's mean loss). ids: (tokens,) long -> float."""
    return math.exp(chunk_losses(model, ids, seqlen, batch_size, limit).mean().item())


# --- 2. Log-likelihoods of continuations, each context computed once ----------------------------------------------------------

def first_token(tokenizer):
    """What stands before a text that nothing precedes: the BOS, else the EOS token. -> int."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode_pair(tokenizer, context, continuation, limit):
    """-> (context ids, continuation ids), tokenized jointly and cut where the context alone ends.

    Trailing blanks of the context go to the continuation. When one token spans the join and nothing is left of the
    continuation, it is encoded alone; an empty context becomes the BOS (or EOS) token. A context that does not fit is cut
    from the left: `limit` tokens are read, and the last token of the continuation is never read.
    Raises UserError when the continuation alone exceeds the limit.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    encode = lambda text, special: tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if stripped:
        left, whole = encode(stripped, True), encode(stripped + continuation, True)
        right = whole[len(left):] or encode(continuation, False)
    else:
        left, right = [first_token(tokenizer)], encode(continuation, False)
    if len(right) > limit:
        raise UserError(f"--tasks: {continuation[:30]!r}... has {len(right)} tokens, and the model reads {limit}; shorten it")
    return left[-(limit - len(right) + 1):], right


def pad(rows, value, left, device):
    """Lists of ints -> (B, T) long, padded on one side, and its mask (B, T) long."""
    T = max(map(len, rows))
    fill = [[0] * (T - len(row)) for row in rows]
    join = (lambda row, gap: gap + row) if left else (lambda row, gap: row + gap)
    ids = torch.tensor([join(row, [value] * len(gap)) for row, gap in zip(rows, fill)], dtype=torch.long)
    mask = torch.tensor([join([1] * len(row), gap) for row, gap in zip(rows, fill)], dtype=torch.long)
    return ids.to(device), mask.to(device)                                                     # (B, T), (B, T)


@torch.no_grad()
def continuation_scores(model, groups, batch_size=16, max_length=None, progress="score"):
    """Log-likelihood of every continuation of every context.

    groups: [(context ids, [continuation ids, ...]), ...] -> the same nesting of (sum of log p in float32, is it the greedy
    continuation). A context runs once and its cache is shared by its continuations, so an IDP model chooses its prompt by
    the context alone, as when it generates. Batches are sorted by length; no result depends on them.
    """
    limit, results = max_length or model.config.max_position_embeddings, [None] * len(groups)
    for part in tqdm(batches(groups, batch_size, limit), desc=progress, disable=None, leave=False):
        for i, scores in zip(part, score_batch(model, [groups[i] for i in part], batch_size)):
            results[i] = scores
    return results


def batches(groups, batch_size, limit):
    """Indices of groups, longest contexts first, in batches that fit `limit` columns with their padding. -> list of lists."""
    parts, longest = [], 0
    for i in sorted(range(len(groups)), key=lambda i: len(groups[i][0]), reverse=True):
        rest = max(map(len, groups[i][1]))
        if not parts or len(parts[-1]) == batch_size or len(groups[parts[-1][0]][0]) + max(longest, rest) - 1 > limit:
            parts.append([])
            longest = 0
        parts[-1].append(i)
        longest = max(longest, rest)
    return parts


def score_batch(model, groups, batch_size):
    """One batch of contexts, then their continuations sorted by length, batch_size at a time."""
    ids, mask = pad([context for context, _ in groups], 0, left=True, device=model.device)     # (B, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    rows = [(i, j) for i, (_, rest) in enumerate(groups) for j in range(len(rest))]
    rows.sort(key=lambda row: len(groups[row[0]][1][row[1]]))
    results = [[None] * len(rest) for _, rest in groups]
    for start in range(0, len(rows), batch_size):
        part = rows[start:start + batch_size]
        owner = torch.tensor([i for i, _ in part], device=model.device)                        # (R,) the context of each
        target, real = pad([groups[i][1][j] for i, j in part], 0, left=False, device=model.device)  # (R, C)
        logp, greedy = token_scores(out.logits[owner, -1:], target[:, :1])                     # (R, 1)
        if target.shape[1] > 1:                            # continuations of one token are scored already
            position = positions[owner, -1:] + 1 + torch.arange(target.shape[1] - 1, device=model.device)
            logits = model(input_ids=target[:, :-1], attention_mask=torch.cat([mask[owner], real[:, :-1]], dim=1),
                           position_ids=position, **{CACHE: rows_of(out[CACHE], owner)}, use_cache=True).logits
            rest = token_scores(logits, target[:, 1:])                                         # (R, C-1)
            logp, greedy = torch.cat([logp, rest[0]], 1), torch.cat([greedy, rest[1]], 1)      # (R, C)
        scores = zip((logp * real).sum(1).tolist(), (greedy | (real == 0)).all(1).tolist())
        for (i, j), score in zip(part, scores):
            results[i][j] = score
    return results


def rows_of(cache, owner):
    """A cache holding rows `owner` (R,) of another, which stays as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(owner)
    return part


def token_scores(logits, target, tokens=1024):
    """log p of each target token, and whether it is the most likely. logits (R, C, V), target (R, C) -> two (R, C).

    Some tokens at a time: float32 copies of (R, C, V) would take more memory than the model.
    """
    logp, greedy = [], []
    for z, t in zip(logits.flatten(0, 1).split(tokens), target.flatten().split(tokens)):
        z = z.float()                                                                          # (tokens, V)
        # log p_t = z_t - log sum_v exp z_v
        logp.append(z.gather(1, t[:, None])[:, 0] - z.logsumexp(1))
        greedy.append(z.argmax(1) == t)
    return torch.cat(logp).view(target.shape), torch.cat(greedy).view(target.shape)


def scores_of_pairs(model, tokenizer, rows, batch_size, max_length, progress):
    """rows: one list of (context, continuation) texts per item -> the same nesting of (sum of log p, is greedy).

    The pairs of an item that share a context are scored from one pass over it.
    """
    limit = max_length or model.config.max_position_embeddings
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
    for (i, places), scores in zip(where, continuation_scores(model, groups, batch_size, limit, progress)):
        for j, score in zip(places, scores):
            results[i][j] = score
    return results


def rolling_windows(ids, first, limit):
    """[(context ids, continuation ids)] that predict every token of ids once, from as much context as `limit` allows.

    The first window follows the token `first`; only the last one overlaps what was predicted already.
    """
    ends = [min(start + limit, len(ids)) for start in range(0, len(ids), limit)]
    windows = [([first], ids[:limit])]
    return windows + [(ids[end - limit - 1:start], ids[start:end]) for start, end in zip(ends, ends[1:])]


def word_perplexity(model, tokenizer, documents, max_length=None, clean=lambda text: text):
    """The standard harness's word perplexity: exp(- sum of log p of all documents / words). -> float.

    clean: applied to a document before it is scored (loading.detokenize for WikiText); its words are counted before.
    Raises UserError when there is no word.
    """
    limit, words, windows = max_length or model.config.max_position_embeddings, 0, []
    for text in filter(str.strip, documents):
        words += len(re.split(r"\s+", text))
        windows += rolling_windows(tokenizer(clean(text), verbose=False).input_ids, first_token(tokenizer), limit)
    if not words:
        raise UserError("--eval-text: has no words; word perplexity needs at least one")
    # Each window is one context token (or the overlap) and up to `limit` continuation tokens, so one at a time fills a device.
    scores = continuation_scores(model, [(left, [right]) for left, right in windows], 1, limit, "word perplexity")
    return math.exp(-sum(score for [(score, _)] in scores) / words)


# --- 3. Tasks -----------------------------------------------------------------------------------------------------------------

def choice_pairs(row):
    """(context, continuation) of every choice. WinoGrande's rows put the option into the context (partial scoring)."""
    if "suffix" in row:
        return [(f"{row['context']} {option}".strip(), " " + row["suffix"]) for option in row["options"]]
    return [(row["context"], " " + choice) for choice in row["choices"]]


def multiple_choice(model, tokenizer, rows, batch_size=16, max_length=None):
    """-> {"acc", "acc_norm", "n", "ci95", "acc_norm_ci95", "correct": [bool], "correct_norm": [bool], "logp": [[float]]}."""
    pairs = [choice_pairs(row) for row in rows]
    scores = scores_of_pairs(model, tokenizer, pairs, batch_size, max_length, "choices")
    logp = [[score for score, _ in row] for row in scores]
    best = lambda values: max(range(len(values)), key=values.__getitem__)
    correct = [best(scores) == row["answer"] for scores, row in zip(logp, rows)]
    correct_norm = [best([s / max(1, len(choice)) for s, choice in zip(scores, row["choices"])]) == row["answer"]
                    for scores, row in zip(logp, rows)]
    norm = accuracy(correct_norm)
    return {**accuracy(correct), "acc_norm": norm["acc"], "acc_norm_ci95": norm["ci95"],
            "correct": correct, "correct_norm": correct_norm, "logp": logp}


def normalise(answer):
    """Lower case, no punctuation, no articles, single spaces: the usual exact match of open answers."""
    answer = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def is_question(row):
    """Whether a row asks for an answer (its last line is one word and a colon) or for the text to go on."""
    return re.fullmatch(r"\w+:", row["context"].rstrip().rsplit("\n", 1)[-1].strip()) is not None


def aliases_of(row):
    """Every accepted answer."""
    return list(dict.fromkeys([row["target"], *row.get("aliases", [])]))


def answer_matches(completion, aliases):
    """Whether the first line, or what stands before its first full stop or comma, is an alias once both are normalised."""
    line = completion.strip().split("\n")[0]
    return bool({normalise(line), normalise(re.split(r"[.,]", line)[0])} & {normalise(alias) for alias in aliases})


def open_answer(model, tokenizer, rows, batch_size=16, max_length=None, new_tokens=16):
    """Open answers and last words. -> {"acc", "n", "ci95", "correct": [bool]}."""
    correct, asked = [False] * len(rows), [is_question(row) for row in rows]
    going_on = [i for i, question in enumerate(asked) if not question]
    pairs = [[(rows[i]["context"], " " + alias) for alias in aliases_of(rows[i])] for i in going_on]
    for i, scores in zip(going_on, scores_of_pairs(model, tokenizer, pairs, batch_size, max_length, "last words")):
        correct[i] = any(greedy for _, greedy in scores)
    questions = [i for i, question in enumerate(asked) if question]
    texts = completions(model, tokenizer, [rows[i]["context"] for i in questions], batch_size, max_length, new_tokens)
    for i, text in zip(questions, texts):
        correct[i] = answer_matches(text, aliases_of(rows[i]))
    return {**accuracy(correct), "correct": correct}


def completions(model, tokenizer, contexts, batch_size=16, max_length=None, new_tokens=16):
    """Greedy completions of texts, cut from the left where they leave no room for new_tokens. -> list of str."""
    limit = max(1, (max_length or model.config.max_position_embeddings) - new_tokens)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    encoded = [tokenizer(text, verbose=False).input_ids[-limit:] or [first_token(tokenizer)] for text in contexts]
    order, results = sorted(range(len(contexts)), key=lambda i: len(encoded[i]), reverse=True), [None] * len(contexts)
    for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=None, leave=False):
        part = order[start:start + batch_size]
        ids, mask = pad([encoded[i] for i in part], fill, left=True, device=model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=fill)
        for i, text in zip(part, tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)):
            results[i] = text
    return results


def evaluate_task(model, tokenizer, rows, batch_size=16, max_length=None):
    """Multiple choice or open answers, by the rows' schema."""
    score = multiple_choice if "choices" in rows[0] else open_answer
    return score(model, tokenizer, rows, batch_size, max_length)


def evaluate_model(model, tokenizer, eval_ids, tasks, seqlen, batch_size=16, limit=None, prompt_columns=0):
    """Everything about one model. tasks: {name: rows}; prompt_columns: positions that a prompt takes.

    -> {"ppl", "ppl_ci95", "ppl_seqlen", "ppl_chunks", "tasks": {name: {...}}, "items": {...}}; items hold what each chunk
    and each row gave, and a fingerprint of what was asked, for paired tests.
    """
    max_length = model.config.max_position_embeddings - prompt_columns
    if seqlen > max_length:
        raise UserError(f"--eval-seqlen {seqlen}: the model has room for {max_length} tokens; use a smaller number")
    losses = chunk_losses(model, eval_ids, seqlen, max(1, batch_size // 2), limit)
    low, high = bootstrap(losses)
    result = {"ppl": math.exp(losses.mean()), "ppl_ci95": [math.exp(low), math.exp(high)], "ppl_seqlen": seqlen,
              "ppl_chunks": len(losses), "tasks": {},
              "items": {"loss": {"data": fingerprint([seqlen, eval_ids.tolist()]), "values": losses.tolist()}}}
    for name, rows in tasks.items():
        scores = evaluate_task(model, tokenizer, rows, batch_size, max_length)
        result["items"][name] = {"data": fingerprint(rows), "values": scores["correct"]}
        result["tasks"][name] = {k: v for k, v in scores.items() if not k.startswith(("correct", "logp"))}
    return result


# --- 4. Results ---------------------------------------------------------------------------------------------------------------

def weight_bytes(model):
    """Bytes of all parameters as they are in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


def format_table(rows):
    """results.json rows as a Markdown table: accuracy in percent with its 95 % interval."""
    names, first = list(rows[0]["tasks"]), rows[0]
    head = ["row", f"ppl (chunks of {first['ppl_seqlen']})"] + ["word ppl"] * ("word_ppl" in first)
    head += [f"{name} %" for name in names] + ["trainable", "extra bytes", "weights MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["ppl_ci95"]
        cells = [row["row"], f"{row['ppl']:.2f} [{low:.2f}, {high:.2f}]"]
        if "word_ppl" in first:
            cells.append(f"{row['word_ppl']:.2f}")
        for name in names:
            task = row["tasks"][name]
            cells.append(f"{100 * task['acc']:.1f} [{100 * task['ci95'][0]:.1f}, {100 * task['ci95'][1]:.1f}]")
        cells += [f"{row['trainable_params']:,}", f"{row['extra_bytes']:,}", f"{row['weight_bytes'] / 1e6:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nn: " + ", ".join(
        [f"{first['ppl_chunks']} chunks"] + [f"{name} {first['tasks'][name]['n']}" for name in names]) + "; [95 % intervals]"


def write_results(out, command, settings, device, seconds, rows):
    """results.json, results.md and items.json (what each chunk and question gave), each whole or not at all."""
    out = pathlib.Path(out)
    loading.write_json(out / "items.json", {row["row"]: row["items"] for row in rows})
    loading.write_text(out / "results.md", format_table(rows) + "\n")
    loading.write_json(out / "results.json", {
        "command": command, "settings": settings, "versions": loading.versions(), "device": loading.device_name(device),
        "seconds": round(seconds, 1), "rows": [{key: value for key, value in row.items() if key != "items"} for row in rows]})


def command_line():
    """The command as typed, without the folder of the script."""
    return "python " + shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


# --- 5. The command -----------------------------------------------------------------------------------------------------------

def parse(argv=None):
    """The command line. -> argparse.Namespace."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    parser.add_argument("--adapter", action="append", default=None,
                        help="an adapter/ folder of recover.py (or PEFT) to apply; patterns: give it several times")
    parser.add_argument("--eval-text", default=None, help="text for perplexity; the test split of a named --text when absent")
    parser.add_argument("--eval-seqlen", type=int, default=None,
                        help="tokens per chunk; 64 for the toy, 512 (patterns: 128) for others")
    parser.add_argument("--batch-size", type=int, default=None, help="contexts per batch, 16 (latency: sequences, 1) when absent")
    parser.add_argument("--word-ppl", action="store_true", help="the standard harness's word perplexity of --eval-text as well")
    parser.add_argument("--compare", nargs=2, metavar="RESULTS", default=None, help="two results.json: which differences are real")
    parser.add_argument("--patterns", action="store_true", help="what each --adapter does inside: attention, hidden states, figure")
    parser.add_argument("--latency", action="store_true", help="measure what each remedy costs instead of what it gives")
    parser.add_argument("--shape", default=None, help="latency: random weights at this shape: llama-7b | opt-6.7b | smollm2-135m")
    parser.add_argument("--lengths", type=lambda text: [int(t) for t in text.split(",")], default=[128, 256],
                        help="latency: input lengths")
    parser.add_argument("--prompt-length", type=int, default=16, help="latency: tokens of every prompt")
    parser.add_argument("--decode-tokens", type=int, default=8, help="latency: decoded tokens per repeat")
    parser.add_argument("--repeats", type=int, default=9, help="latency: counted repeats after one warm-up")
    args = parser.parse_args(argv)
    toy = args.model == "toy"
    loading.fill_defaults(args)
    args.eval_text = args.eval_text or args.text
    args.eval_seqlen = (64 if toy else 128 if args.patterns else 512) if args.eval_seqlen is None else args.eval_seqlen
    args.batch_size = (1 if args.latency else 16) if args.batch_size is None else args.batch_size
    return check(args)


def check(args):
    """Refuse impossible settings before any model loads. -> args."""
    for name in ("batch_size", "prompt_length", "decode_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    if args.eval_seqlen < 2:
        raise UserError(f"--eval-seqlen {args.eval_seqlen}: must be at least 2, since the first token of a chunk has no loss")
    modes = [flag for flag, on in (("--compare", args.compare), ("--patterns", args.patterns), ("--latency", args.latency)) if on]
    if len(modes) > 1:
        raise UserError(f"{' '.join(modes)}: each is a job of its own; give one of them")
    if len(args.adapter or []) > 1 and not args.patterns:
        raise UserError(f"--adapter {' '.join(args.adapter)}: one at a time, except with --patterns")
    if args.out and not modes:
        loading.check_out(args.out, "results.json")
    return args


def main(argv=None):
    """Evaluate one model, compare two runs, look inside some, or measure latency."""
    args = parse(argv)
    if args.compare:
        print("\n".join(compare(*args.compare)))
    elif args.patterns:
        import patterns                                    # these two know recover.py's methods, which import this file
        patterns.main(args)
    elif args.latency:
        import latency
        latency.main(args)
    else:
        evaluate_command(args)


def adapter_name(folder):
    """A short name: the folder's own, or its run's when it is called adapter."""
    path = pathlib.Path(folder).resolve()
    return path.parent.name if path.name == "adapter" else path.name


def prompt_columns(attached):
    """Positions that prompts take. attached: what `with method.inference() as attached` gave."""
    return attached.bank.N if isinstance(attached, IDP) else 0


def evaluate_command(args):
    """One model, with an adapter or without: one row."""
    device, start = loading.pick_device(args.device), time.time()
    tasks = loading.load_tasks(args.tasks, args.limit)
    documents = loading.load_documents(args.eval_text, "test") if args.word_ppl else []
    model, tokenizer = loading.load_model(args.model, device, args.dtype)
    ids, name, method = loading.load_text(args.eval_text, tokenizer, "test"), "model", None
    if args.adapter:
        import methods                                     # only --adapter needs them
        method, name = methods.load_adapter(model, args.adapter[0]), f"model + {adapter_name(args.adapter[0])}"
    with method.inference() if method else contextlib.nullcontext() as attached:
        columns = prompt_columns(attached)
        scores = evaluate_model(model, tokenizer, ids, tasks, args.eval_seqlen, args.batch_size, args.limit, columns)
        if args.word_ppl:
            clean = loading.detokenize if args.eval_text.startswith("wikitext2") else lambda text: text
            scores["word_ppl"] = word_perplexity(model, tokenizer, documents[:args.limit],
                                                 model.config.max_position_embeddings - columns, clean)
    size = sum(t.numel() for t in method.tensors().values()) if method else 0
    rows = [{"row": name, **scores, "trainable_params": size, "extra_bytes": 4 * size, "weight_bytes": weight_bytes(model)}]
    print(format_table(rows))
    if args.out:
        write_results(args.out, command_line(), vars(args), device, time.time() - start, rows)


if __name__ == "__main__":
    loading.run(main)
