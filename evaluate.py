"""Evaluate: perplexity, multiple choice, open answers, each with a 95 % interval; which differences are real; latency.

    python evaluate.py --model toy                                         # the toy tasks, seconds on a CPU
    python evaluate.py --model smollm2 --tasks arc_easy,sciq --text wikitext2 --limit 200 --out runs/dense
    python evaluate.py --model runs/compressed --adapter runs/idp/adapter  # what recover.py wrote
    python evaluate.py --compare runs/A/results.json runs/B/results.json   # paired tests between any two rows
    python evaluate.py --latency --shape smollm2-135m                      # what each remedy costs (latency.py)

The model is only ever called as model(input_ids, attention_mask, ...) -> logits of the real tokens, so a plain model, one
with LoRA, and one that chooses soft prompts (idp_minimal.py:attach_idp) are scored by the same lines.

Definitions, since several are in use:
  perplexity  GPTQ's: the text tokenized once, cut into chunks of seqlen, the tail dropped; exp of the mean over chunks of
              the mean loss of the seqlen - 1 targets of a chunk. Not comparable with the harness's word perplexity.
  acc         argmax over choices of log p(" " + choice | context), summed over tokens, as the standard harness does.
  acc_norm    the same, divided by the number of characters of the choice.
  open        a question: the greedy completion up to a line break, normalised, equals an alias. A text to be continued
              (its context does not end in a colon): the target is the greedy continuation, as LAMBADA is scored.
"""
import contextlib
import json
import math
import pathlib
import re
import shlex
import string
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import loading
from idp_minimal import CACHE
from loading import UserError


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
        logits = model(rows, use_cache=False).logits[:, :-1].float()                           # (B, seqlen-1, V)
        losses.append(F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1).cpu())
    return torch.cat(losses)


def perplexity(model, ids, seqlen, batch_size=8, limit=None):
    """exp(mean over chunks of the chunk's mean loss). ids: (tokens,) long -> float."""
    return math.exp(chunk_losses(model, ids, seqlen, batch_size, limit).mean().item())


# --- 2. Log-likelihoods of continuations, each context computed once -----------------------------------------------------------

def encode_pair(tokenizer, context, continuation):
    """-> (context ids, continuation ids), tokenized jointly and cut where the context alone ends.

    Trailing blanks of the context go to the continuation. When one token spans the join and nothing is left of the
    continuation, it is encoded alone; an empty context becomes the BOS (or EOS) token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    encode = lambda text, special: tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if not stripped:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first], encode(continuation, False)
    left, whole = encode(stripped, True), encode(stripped + continuation, True)
    return left, whole[len(left):] or encode(continuation, False)


def pad(rows, value, left, device):
    """Lists of ints -> (B, T) long, padded on one side, and its mask (B, T) long."""
    T = max(map(len, rows))
    fill = [[0] * (T - len(row)) for row in rows]
    join = (lambda row, gap: gap + row) if left else (lambda row, gap: row + gap)
    ids = torch.tensor([join(row, [value] * len(gap)) for row, gap in zip(rows, fill)], dtype=torch.long)
    mask = torch.tensor([join([1] * len(row), gap) for row, gap in zip(rows, fill)], dtype=torch.long)
    return ids.to(device), mask.to(device)                                                     # (B, T), (B, T)


@torch.no_grad()
def continuation_scores(model, groups, batch_size=16, max_length=None, progress=None):
    """Log-likelihood of every continuation of every context.

    groups: [(context ids, [continuation ids, ...]), ...] -> the same nesting of (sum of log p in float32, is it the greedy
    continuation). A context runs once and its cache is shared by its continuations, so an IDP model chooses its prompt by
    the context alone, as when it generates. Contexts that do not fit max_length are cut from the left. Batches are sorted by
    length; no result depends on them.
    """
    limit = max_length or model.config.max_position_embeddings
    groups = [(context[-max(1, limit - max(map(len, rest)) + 1):], rest) for context, rest in groups]
    order = sorted(range(len(groups)), key=lambda i: len(groups[i][0]), reverse=True)
    results = [None] * len(groups)
    for start in tqdm(range(0, len(order), batch_size), desc=progress or "score", disable=None, leave=False):
        part = order[start:start + batch_size]
        for i, scores in zip(part, score_batch(model, [groups[i] for i in part])):
            results[i] = scores
    return results


def score_batch(model, groups):
    """One batch of continuation_scores."""
    device, counts = model.device, [len(rest) for _, rest in groups]
    ids, mask = pad([context for context, _ in groups], 0, left=True, device=device)           # (B, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(counts)).to(device)  # (R,) context of each
    target, target_mask = pad([row for _, rest in groups for row in rest], 0, left=False, device=device)  # (R, C)
    logp = out.logits[:, -1:].float().log_softmax(-1)[owner]                                   # (R, 1, V)
    if target.shape[1] > 1:                                # continuations of one token are scored already
        cache = out[CACHE]
        cache.batch_select_indices(owner)
        position = positions[owner, -1:] + 1 + torch.arange(target.shape[1] - 1, device=device)
        rest = model(input_ids=target[:, :-1], attention_mask=torch.cat([mask[owner], target_mask[:, :-1]], dim=1),
                     position_ids=position, **{CACHE: cache}, use_cache=True).logits            # (R, C-1, V)
        logp = torch.cat([logp, rest.float().log_softmax(-1)], dim=1)                          # (R, C, V)
    token = logp.gather(2, target[..., None])[..., 0] * target_mask                            # (R, C)
    greedy = ((logp.argmax(-1) == target) | (target_mask == 0)).all(1)                         # (R,)
    scores = list(zip(token.sum(1).tolist(), greedy.tolist()))
    return [[scores.pop(0) for _ in range(count)] for count in counts]


# --- 3. Tasks ------------------------------------------------------------------------------------------------------------------

def choice_pairs(row):
    """(context, continuation) of every choice. WinoGrande's rows put the option into the context (partial scoring)."""
    if "suffix" in row:
        return [(f"{row['context']} {option}".strip(), " " + row["suffix"]) for option in row["options"]]
    return [(row["context"], " " + choice) for choice in row["choices"]]


def multiple_choice(model, tokenizer, rows, batch_size=16, max_length=None):
    """-> {"acc", "acc_norm", "n", "ci95", "acc_norm_ci95", "correct": [bool], "correct_norm": [bool], "logp": [[float]]}."""
    groups, where = [], []                                 # one group per different context of a row
    for i, row in enumerate(rows):
        contexts = {}
        for c, pair in enumerate(choice_pairs(row)):
            left, right = encode_pair(tokenizer, *pair)
            contexts.setdefault(tuple(left), []).append((c, right))
        for left, items in contexts.items():
            groups.append((list(left), [right for _, right in items]))
            where.append((i, [c for c, _ in items]))
    logp = [[0.0] * len(row["choices"]) for row in rows]
    for (i, choices), scores in zip(where, continuation_scores(model, groups, batch_size, max_length, "choices")):
        for c, (score, _) in zip(choices, scores):
            logp[i][c] = score
    best = lambda values: max(range(len(values)), key=values.__getitem__)
    correct = [best(scores) == row["answer"] for scores, row in zip(logp, rows)]
    correct_norm = [best([s / len(choice) for s, choice in zip(scores, row["choices"])]) == row["answer"]
                    for scores, row in zip(logp, rows)]
    return {**accuracy(correct), "acc_norm": accuracy(correct_norm)["acc"], "acc_norm_ci95": accuracy(correct_norm)["ci95"],
            "correct": correct, "correct_norm": correct_norm, "logp": logp}


def normalise(answer):
    """Lower case, no punctuation, no articles, single spaces: the usual exact match of open answers."""
    answer = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


@torch.no_grad()
def open_answer(model, tokenizer, rows, batch_size=16, max_length=None, new_tokens=16):
    """Open answers and last words. -> {"acc", "n", "ci95", "correct": [bool]}."""
    correct = [False] * len(rows)
    continued = [i for i, row in enumerate(rows) if not row["context"].rstrip().endswith(":")]
    groups = []
    for i in continued:
        left, right = encode_pair(tokenizer, rows[i]["context"], " " + rows[i]["target"])
        groups.append((left, [right]))
    for i, [(_, greedy)] in zip(continued, continuation_scores(model, groups, batch_size, max_length, "last words")):
        correct[i] = greedy
    asked = sorted(set(range(len(rows))) - set(continued), key=lambda i: len(rows[i]["context"]))
    limit = (max_length or model.config.max_position_embeddings) - new_tokens
    for start in tqdm(range(0, len(asked), batch_size), desc="answers", disable=None, leave=False):
        part = asked[start:start + batch_size]
        contexts = [tokenizer(rows[i]["context"], verbose=False).input_ids[-limit:] for i in part]
        ids, mask = pad(contexts, tokenizer.pad_token_id or 0, left=True, device=model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        for i, text in zip(part, tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)):
            answer = normalise(text.strip().split("\n")[0])
            correct[i] = answer in {normalise(alias) for alias in [rows[i]["target"], *rows[i].get("aliases", [])]}
    return {**accuracy(correct), "correct": correct}


def evaluate_task(model, tokenizer, rows, batch_size=16, max_length=None):
    """Multiple choice or open answers, by the rows' schema."""
    score = multiple_choice if "choices" in rows[0] else open_answer
    return score(model, tokenizer, rows, batch_size, max_length)


def evaluate_model(model, tokenizer, eval_ids, tasks, seqlen, batch_size=16, limit=None, prompt_columns=0):
    """Everything about one model. tasks: {name: rows}; prompt_columns: positions that a prompt takes.

    -> {"ppl", "ppl_ci95", "ppl_seqlen", "ppl_chunks", "tasks": {name: {...}}, "items": {...}}; items hold what each chunk
    and each row gave, for paired tests.
    """
    max_length = model.config.max_position_embeddings - prompt_columns
    if seqlen > max_length:
        raise UserError(f"--eval-seqlen {seqlen}: the model has room for {max_length} tokens; use a smaller number")
    losses = chunk_losses(model, eval_ids, seqlen, max(1, batch_size // 2), limit)
    low, high = bootstrap(losses)
    result = {"ppl": math.exp(losses.mean()), "ppl_ci95": [math.exp(low), math.exp(high)], "ppl_seqlen": seqlen,
              "ppl_chunks": len(losses), "tasks": {}, "items": {"loss": losses.tolist()}}
    for name, rows in tasks.items():
        scores = evaluate_task(model, tokenizer, rows, batch_size, max_length)
        result["items"][name] = scores["correct"]
        result["tasks"][name] = {k: v for k, v in scores.items() if not k.startswith(("correct", "logp"))}
    return result


# --- 4. Uncertainty -------------------------------------------------------------------------------------------------------------

def bootstrap(values, samples=2000, seed=0):
    """95 % percentile interval of the mean, resampling items. values: (n,) -> (low, high)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def accuracy(correct):
    """-> {"acc", "n", "ci95"}."""
    return {"acc": sum(correct) / len(correct), "n": len(correct), "ci95": list(bootstrap(correct))}


def mcnemar(a, b):
    """Exact McNemar test of two lists of outcomes on the same items: two-sided p of the discordant pairs.

    p = 2 P(X <= min(n01, n10)), X ~ Binomial(n01 + n10, 1/2)
    """
    only_a, only_b = sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n
    return min(1.0, 2 * tail)


def compare(path_a, path_b):
    """Every pair of rows of two results.json (their items.json beside them) on what both measured. -> Markdown lines.

    Accuracy: exact McNemar. Perplexity: paired bootstrap of the difference of log-perplexity over chunks.
    """
    runs = [read_run(path) for path in (path_a, path_b)]
    lines = ["| A | B | on | n | A | B | B - A | 95 % of the difference | p | real at 5 % |", "|---|---|---|---|---|---|---|---|---|---|"]
    pairs = [(a, b) for a in runs[0] for b in runs[1]]
    if pathlib.Path(path_a).resolve() == pathlib.Path(path_b).resolve():
        names = list(runs[0])
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    for a, b in pairs:
        for name in runs[0][a]:
            x, y = runs[0][a][name], runs[1][b].get(name)
            if y is None or len(x) != len(y):
                continue
            n, difference = len(x), torch.tensor(y, dtype=torch.float64) - torch.tensor(x, dtype=torch.float64)
            low, high = bootstrap(difference)
            if name == "loss":
                real, p, shown = low > 0 or high < 0, "-", [math.exp(sum(v) / n) for v in (x, y)]
                name, ends = "ppl (log difference)", f"{difference.mean():+.3f} | {low:+.3f} .. {high:+.3f}"
            else:
                p, shown = mcnemar(x, y), [sum(v) / n for v in (x, y)]
                real, p = p < 0.05, f"{p:.3g}"
                ends = f"{difference.mean():+.3f} | {low:+.3f} .. {high:+.3f}"
            lines.append(f"| {a} | {b} | {name} | {n} | {shown[0]:.3f} | {shown[1]:.3f} | {ends} | {p} | {'yes' if real else 'no'} |")
    return lines


def read_run(path):
    """{row name: items} of a results.json. Raises UserError when it or its items.json is missing."""
    path = pathlib.Path(path)
    items = path.with_name("items.json")
    if not path.is_file() or not items.is_file():
        raise UserError(f"--compare {path}: needs results.json and items.json, as recover.py --out and evaluate.py --out write them")
    return json.loads(items.read_text())


# --- 5. Results ---------------------------------------------------------------------------------------------------------------------

def weight_bytes(model):
    """Bytes of all parameters as they are in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())


def format_table(rows):
    """results.json rows as a Markdown table: accuracy in percent with its 95 % interval."""
    names = list(rows[0]["tasks"])
    head = ["row", f"ppl (chunks of {rows[0]['ppl_seqlen']})"] + [f"{name} %" for name in names] + ["trainable", "extra bytes", "weights MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["ppl_ci95"]
        cells = [row["row"], f"{row['ppl']:.2f} [{low:.2f}, {high:.2f}]"]
        for name in names:
            task = row["tasks"][name]
            cells.append(f"{100 * task['acc']:.1f} [{100 * task['ci95'][0]:.1f}, {100 * task['ci95'][1]:.1f}]")
        cells += [f"{row['trainable_params']:,}", f"{row['extra_bytes']:,}", f"{row['weight_bytes'] / 1e6:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nn: " + ", ".join(
        [f"{rows[0]['ppl_chunks']} chunks"] + [f"{name} {rows[0]['tasks'][name]['n']}" for name in names]) + "; [95 % intervals]"


def write_results(out, command, settings, device, seconds, rows):
    """results.json, results.md and items.json (what each chunk and question gave), each whole or not at all."""
    out, items = pathlib.Path(out), {row["row"]: row.pop("items") for row in rows}
    loading.write_json(out / "items.json", items)
    loading.write_text(out / "results.md", format_table(rows) + "\n")
    loading.write_json(out / "results.json", {
        "command": command, "settings": settings, "versions": loading.versions(), "device": loading.device_name(device),
        "seconds": round(seconds, 1), "rows": rows})


def command_line():
    """The command as typed, without the folder of the script."""
    return "python " + shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


# --- 6. The command ------------------------------------------------------------------------------------------------------------------

def parse(argv=None):
    """The command line. -> argparse.Namespace."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    parser.add_argument("--adapter", default=None, help="an adapter/ folder of recover.py (or PEFT) to apply")
    parser.add_argument("--eval-text", default=None, help="text for perplexity; the test split of a named --text when absent")
    parser.add_argument("--eval-seqlen", type=int, default=None, help="tokens per perplexity chunk; 64 for the toy, 512 for others")
    parser.add_argument("--batch-size", type=int, default=16, help="contexts per batch (latency: sequences, 1 there when absent)")
    parser.add_argument("--compare", nargs=2, metavar="RESULTS", default=None, help="two results.json: which differences are real")
    parser.add_argument("--latency", action="store_true", help="measure what each remedy costs instead of what it gives")
    parser.add_argument("--shape", default=None, help="latency: random weights at this shape: llama-7b | opt-6.7b | smollm2-135m")
    parser.add_argument("--lengths", type=lambda text: [int(t) for t in text.split(",")], default=[128, 512], help="latency: input lengths")
    parser.add_argument("--prompt-length", type=int, default=16, help="latency: tokens of every prompt")
    parser.add_argument("--decode-tokens", type=int, default=8, help="latency: decoded tokens per repeat")
    parser.add_argument("--repeats", type=int, default=9, help="latency: counted repeats after one warm-up")
    args = parser.parse_args(argv)
    toy = args.model == "toy"
    args.text = args.text or ("toy" if toy else "wikitext2")
    args.eval_text = args.eval_text or args.text
    args.eval_seqlen = args.eval_seqlen or (64 if toy else 512)
    args.tasks = args.tasks if args.tasks is not None else (loading.TOY_TASKS if toy else "")
    for name in ("batch_size", "prompt_length", "decode_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def main(argv=None):
    """Evaluate one model, compare two runs, or measure latency."""
    args = parse(argv)
    if args.compare:
        print("\n".join(compare(*args.compare)))
        return
    if args.latency:
        import latency                                     # it measures recover.py's methods, which import this file
        latency.main(args)
        return
    device, start = loading.pick_device(args.device), time.time()
    tasks = loading.load_tasks(args.tasks, args.limit)
    model, tokenizer = loading.load_model(args.model, device, args.dtype)
    ids, name, method = loading.load_text(args.eval_text, tokenizer, "test"), "model", None
    if args.adapter:
        import recover
        method, name = recover.load_adapter(model, args.adapter), f"model + {pathlib.Path(args.adapter).name}"
    with method.inference() if method else contextlib.nullcontext():
        scores = evaluate_model(model, tokenizer, ids, tasks, args.eval_seqlen, args.batch_size, args.limit, getattr(method, "N", 0))
    size = sum(t.numel() for t in method.tensors().values()) if method else 0
    rows = [{"row": name, **scores, "trainable_params": size, "extra_bytes": 4 * size, "weight_bytes": weight_bytes(model)}]
    print(format_table(rows))
    if args.out:
        write_results(args.out, command_line(), vars(args), device, time.time() - start, rows)


if __name__ == "__main__":
    loading.run(main)
