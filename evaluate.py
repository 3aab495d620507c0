"""Evaluate: perplexity, multiple choice, open answers, each with a 95 % interval; which differences between
rows are real.

    python evaluate.py --model toy                                         # the toy tasks, seconds on a CPU
    python evaluate.py --model smollm2 --tasks arc_easy,sciq --text wikitext2 --limit 200 --out runs/dense
    python evaluate.py --model runs/compressed --adapter runs/idp/adapter  # what recover.py wrote
    python evaluate.py --compare runs/A/results.json runs/B/results.json   # paired tests between any two rows

The model is only ever called as model(input_ids, attention_mask, ...) -> logits of the real tokens, so a
plain model, one with LoRA, and one that chooses soft prompts (idp_minimal.py:attach_idp) are scored by the
same lines.

Definitions, since several are in use:
  perplexity  the text tokenized once, cut into chunks of seqlen, the tail dropped; exp of the mean over
              chunks of the mean loss of a chunk's scored tokens. The first quarter of a chunk is read and not
              scored (--eval-context), for every row alike: an IDP model chooses its prompt by it, and may not
              choose by what it is scored on. --eval-context 0 scores all that follow another, which is GPTQ's
              perplexity. Not comparable with word_ppl.
  word_ppl    the standard harness's word perplexity (--word-ppl): each document apart, each token predicted
              once from as much context as the model takes; exp of the loss per word of the text.
  acc         argmax over choices of log p(" " + choice | context), summed over tokens, as the harness does.
  acc_norm    the same, divided by the number of characters of the choice.
  open        a question (its last line is one word and a colon, as "Answer:"): the greedy completion's first
              line, or that line up to its first full stop or comma, normalised, equals an alias. Any other
              text is to be continued: an alias is the greedy continuation, as LAMBADA is scored. Greedy means
              greedy: of a model's generation_config only the special tokens count.
"""
import contextlib
import math
import pathlib
import re
import shlex
import string
import sys
import time

import torch

from idp_minimal import CACHE, IDP
from methods.registry import load_adapter
from support.cli import UserError, fill_in, parse_flags, refuse_given, run
from support.data import check_text, detokenize, encode, first_token, load_documents, load_tasks, load_text
from support.files import finite
from support.output import claim, json_text
from support.architectures import check_room, device_name, pick_device, room, versions
from support.models import load_model, only_tokens
from support.progress import progress
from support.recipe import digest, recipe_of
from support.scoring import TOKENS, batches, pad, scores_of_pairs, token_scores, word_perplexity
from support.tables import markdown
from support.uncertainty import accuracy, compare, perplexity_ci95, shown


# --- 1. Perplexity ------------------------------------------------------------------------------------------

@torch.no_grad()
def chunk_losses(model, ids, seqlen, batch_size=8, limit=None, context=0):
    """Mean next-token loss of each chunk. ids: (tokens,) long -> (chunks,) float32 on the CPU, nats per
    token.

    Non-overlapping chunks, the tail dropped; a text shorter than seqlen is one shorter chunk. context: tokens
    at the start of each chunk that are read and not scored. Raises UserError below 2 tokens, and for a loss
    that is not a number.
    """
    seqlen = min(seqlen, len(ids))
    if seqlen < 2:
        raise UserError(f"--eval-text: has {len(ids)} tokens; perplexity needs at least 2")
    context = min(context, seqlen - 1)
    chunks = ids[:len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit].to(model.device)    # (chunks, seqlen)
    losses = []
    for rows in progress(chunks.split(max(1, min(batch_size, TOKENS // seqlen))), desc="perplexity"):
        logits, targets = scored_part(model, rows, context)
        losses.append(-token_scores(logits, targets)[0].mean(1))
    losses = torch.cat(losses).cpu()
    finite(losses.sum().item(), "the loss of the text")
    return losses


def scored_part(model, rows, context):
    """Logits of the scored tokens of each chunk, and those tokens. rows (B, T) -> (B, S, V), (B, S).

    S is T - context, or T - 1 without a context. The context runs first, alone: nothing that is scored can
    move a choice.
    """
    if not context:
        keep = torch.arange(rows.shape[1] - 1, device=rows.device)
        return model(rows, use_cache=False, logits_to_keep=keep).logits, rows[:, 1:]           # (B, T-1, V)
    out = model(rows[:, :context], use_cache=True, logits_to_keep=1)
    if context == rows.shape[1] - 1:
        return out.logits, rows[:, context:]
    rest = model(rows[:, context:-1], use_cache=True, **{CACHE: out[CACHE]}).logits      # (B, T-context-1, V)
    return torch.cat([out.logits, rest], dim=1), rows[:, context:]


def perplexity(model, ids, seqlen, batch_size=8, limit=None, context=0):
    """exp(mean over chunks of the chunk's mean loss). ids: (tokens,) long -> float."""
    return math.exp(chunk_losses(model, ids, seqlen, batch_size, limit, context).mean().item())


# --- 2. Tasks -----------------------------------------------------------------------------------------------

def choice_pairs(row):
    """(context, continuation) of every choice. WinoGrande's options go into the context (partial scoring)."""
    if "suffix" in row:
        return [(f"{row['context']} {option}".strip(), " " + row["suffix"]) for option in row["options"]]
    return [(row["context"], " " + choice) for choice in row["choices"]]


def multiple_choice(model, tokenizer, rows, batch_size=16, max_length=None):
    """-> {"acc", "acc_norm", "n", "ci95", "acc_norm_ci95", "correct", "correct_norm", "logp"}."""
    pairs = [choice_pairs(row) for row in rows]
    scores = scores_of_pairs(model, tokenizer, pairs, batch_size, max_length, "choices")
    logp = [[score for score, _ in row] for row in scores]
    per_character = [[s / max(1, len(choice)) for s, choice in zip(scores, row["choices"])]
                     for scores, row in zip(logp, rows)]
    best = lambda values: max(range(len(values)), key=values.__getitem__)
    correct, correct_norm = ([best(scores) == row["answer"] for scores, row in zip(kind, rows)]
                             for kind in (logp, per_character))
    norm = accuracy(correct_norm)
    return {**accuracy(correct), "acc_norm": norm["acc"], "acc_norm_ci95": norm["ci95"],
            "correct": correct, "correct_norm": correct_norm, "logp": logp}


def normalise(answer):
    """Lower case, no punctuation, no articles, single spaces: the usual exact match of open answers.

    An answer of which nothing would be left keeps its articles ("The" -> "the"), or its punctuation when it
    has nothing else ("?" -> "?"), so that only an empty text gives "".
    """
    lower = " ".join(answer.lower().split())
    words = " ".join(lower.translate(str.maketrans("", "", string.punctuation)).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split()) or words or lower


def is_question(row):
    """Whether a row asks for an answer (its last line is one word and a colon) or for the text to go on."""
    return re.fullmatch(r"\w+:", row["context"].rstrip().rsplit("\n", 1)[-1].strip()) is not None


def aliases_of(row):
    """Every accepted answer."""
    return list(dict.fromkeys([row["target"], *row.get("aliases", [])]))


def answer_matches(completion, aliases):
    """Whether the first line, or that line up to its first full stop or comma, is an alias, all normalised.

    No answer ("") matches nothing, not even an empty alias.
    """
    line = completion.strip().split("\n")[0]
    said = {normalise(line), normalise(re.split(r"[.,]", line)[0])} - {""}
    return bool(said & {normalise(alias) for alias in aliases})


def open_answer(model, tokenizer, rows, batch_size=16, max_length=None, new_tokens=16):
    """Open answers and last words. -> {"acc", "n", "ci95", "correct": [bool]}."""
    correct, asked = [False] * len(rows), [is_question(row) for row in rows]
    going_on = [i for i, question in enumerate(asked) if not question]
    pairs = [[(rows[i]["context"], " " + alias) for alias in aliases_of(rows[i])] for i in going_on]
    scored = scores_of_pairs(model, tokenizer, pairs, batch_size, max_length, "last words")
    for i, scores in zip(going_on, scored):
        correct[i] = any(greedy for _, greedy in scores)
    questions = [i for i, question in enumerate(asked) if question]
    contexts = [rows[i]["context"] for i in questions]
    texts = completions(model, tokenizer, contexts, batch_size, max_length, new_tokens)
    for i, text in zip(questions, texts):
        correct[i] = answer_matches(text, aliases_of(rows[i]))
    return {**accuracy(correct), "correct": correct}


def completions(model, tokenizer, contexts, batch_size=16, max_length=None, new_tokens=16):
    """Greedy completions of texts, cut from the left to leave room for new_tokens. -> list of str."""
    limit = max(1, (max_length or room(model)) - new_tokens)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    encoded = [encode(tokenizer, text)[-limit:] or [first_token(tokenizer)] for text in contexts]
    results, before = [None] * len(contexts), model.generation_config
    model.generation_config = only_tokens(before)
    groups = [(ids, [[0] * (new_tokens + 1)]) for ids in encoded]          # as long as they will become
    for part in progress(batches(groups, batch_size, limit + new_tokens), desc="answers"):
        ids, mask = pad([encoded[i] for i in part], fill, left=True, device=model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                             pad_token_id=fill)
        for i, text in zip(part, tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)):
            results[i] = text
    model.generation_config = before
    return results


def evaluate_model(model, tokenizer, eval_ids, tasks, seqlen, batch_size=16, limit=None, prompt_columns=0,
                   context=None):
    """Everything about one model. tasks: {name: rows}; prompt_columns: positions that a prompt takes;
    context: tokens of a chunk that are read and not scored, a quarter when None.

    -> {"ppl", "ppl_ci95", "ppl_seqlen", "ppl_context", "ppl_chunks", "tasks": {name: {...}}, "items": {...}};
    items hold what each chunk and each row gave, and a digest of what was asked, for paired tests.
    """
    check_room(model, "--eval-seqlen", seqlen, prompt_columns)
    context = seqlen // 4 if context is None else context
    losses = chunk_losses(model, eval_ids, seqlen, max(1, batch_size // 2), limit, context)
    result = {"ppl": math.exp(losses.mean()), "ppl_ci95": perplexity_ci95(losses.tolist()),
              "ppl_seqlen": seqlen, "ppl_context": context, "ppl_chunks": len(losses), "tasks": {},
              "items": {"loss": {"data": digest([seqlen, context, eval_ids.tolist()]),
                                 "values": losses.tolist()}}}
    for name, rows in tasks.items():
        score = multiple_choice if "choices" in rows[0] else open_answer
        scores = score(model, tokenizer, rows, batch_size, room(model, prompt_columns))
        result["items"][name] = {"data": digest(rows), "values": scores["correct"]}
        result["tasks"][name] = {k: v for k, v in scores.items() if not k.startswith(("correct", "logp"))}
    return result


# --- 3. Results ---------------------------------------------------------------------------------------------

def load_scored_text(name, tokenizer):
    """The text for perplexity. -> (tokens,) long. Raises UserError when it has nothing to score."""
    ids = load_text(name, tokenizer, "test", "--eval-text")
    if len(ids) < 2:
        raise UserError(f"--eval-text: has {len(ids)} tokens; perplexity needs at least 2")
    return ids


def weight_bytes(model):
    """Bytes of all parameters as they are in memory, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def row_cells(row, word_ppl):
    """One row of results.json as the cells of a table: accuracy in percent with its 95 % interval."""
    cells = [row["row"], f"{row['ppl']:.2f} {shown(row['ppl_ci95'], '{:.2f}'.format, row['ppl_chunks'])}"]
    if word_ppl:
        cells.append(f"{row['word_ppl']:.2f}")
    for task in row["tasks"].values():
        cells.append(f"{100 * task['acc']:.1f} {shown(task['ci95'], lambda end: f'{100 * end:.1f}')}")
    return cells + [f"{row['trainable_params']:,}", f"{row['extra_bytes']:,}",
                    f"{row['weight_bytes'] / 1e6:.3g}"]


def format_table(rows):
    """results.json rows as a Markdown table."""
    first = rows[0]
    head = ["row", f"ppl (chunks of {first['ppl_seqlen']})"] + ["word ppl"] * ("word_ppl" in first)
    head += [f"{name} %" for name in first["tasks"]] + ["trainable", "extra bytes", "weights MB"]
    counts = [f"{first['ppl_chunks']} chunks, the first {first['ppl_context']} tokens of each read and not "
              "scored"]
    counts += [f"{name} {task['n']}" for name, task in first["tasks"].items()]
    table = markdown(head, [row_cells(row, "word_ppl" in first) for row in rows])
    return table + f"\n\nn: {', '.join(counts)}; [95 % intervals]"


def result_files(settings, device, start, rows, recipe):
    """{name: text} of a run: items.json (each chunk and question), results.md, last results.json."""
    kept = [{key: value for key, value in row.items() if key != "items"} for row in rows]
    return {"items.json": json_text({row["row"]: row["items"] for row in rows}),
            "results.md": format_table(rows) + "\n", "results.json": json_text({
                "command": command_line(), "settings": settings, "recipe": recipe, "versions": versions(),
                "device": device_name(device), "seconds": round(time.time() - start, 1), "rows": kept})}


def command_line():
    """The command as typed, without the folder of the script."""
    return "python " + shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


# --- 4. The command -----------------------------------------------------------------------------------------

TAKES = ["model", "device", "dtype", "seed", "text", "tasks", "limit", "adapter", "eval_text", "eval_seqlen",
         "eval_context", "batch_size", "word_ppl", "out"]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for what cannot work."""
    words = "two results.json, or one twice: which differences are real"
    compare_flag = lambda parser: parser.add_argument("--compare", nargs=2, metavar="RESULTS", help=words)
    args = parse_flags(__doc__, TAKES, argv, add=compare_flag)
    if args.compare:
        refuse_given(args, TAKES, "--compare reads two runs and takes no other flag; leave it out")
        return args
    fill_in(args, {"eval_text": args.text, "eval_seqlen": 64 if args.toy else 512})
    check_context(args)
    check_text(args.eval_text, "--eval-text")
    return args


def check_context(args):
    """Fill in --eval-context. Raises UserError when nothing of a chunk is left to score."""
    args.eval_context = args.eval_seqlen // 4 if args.eval_context is None else args.eval_context
    if args.eval_context >= args.eval_seqlen:
        raise UserError(f"--eval-context {args.eval_context}: leaves nothing to score of --eval-seqlen "
                        f"{args.eval_seqlen}; use less")


def main(argv=None):
    """Evaluate one model, or compare two runs."""
    args = parse(argv)
    if args.compare:
        print("\n".join(compare(*args.compare)))
    else:
        with claim(args.out) as out:
            evaluate_command(args, out)


def adapter_name(folder):
    """A short name: the folder's own, or its run's when it is called adapter."""
    path = pathlib.Path(folder).resolve()
    return path.parent.name if path.name == "adapter" else path.name


def prompt_columns(attached):
    """Positions that prompts take. attached: what `with method.inference() as attached` gave."""
    return attached.bank.N if isinstance(attached, IDP) else 0


def evaluate_command(args, out):
    """One model, with an adapter or without: one row."""
    device, start = pick_device(args.device), time.time()
    tasks = load_tasks(args.tasks, args.limit)
    documents = load_documents(args.eval_text, "test", "--eval-text") if args.word_ppl else []
    model, tokenizer = load_model(args.model, device, args.dtype)
    name, method = "model", None
    if args.adapter:
        method, name = load_adapter(model, args.adapter), f"model + {adapter_name(args.adapter)}"
    check_room(model, "--eval-seqlen", args.eval_seqlen)
    ids = load_scored_text(args.eval_text, tokenizer)
    with method.inference() if method else contextlib.nullcontext() as attached:
        columns = prompt_columns(attached)
        if columns and not args.eval_context and attached.bank.m > 1:
            raise UserError("--eval-context 0: these prompts are chosen by the context; use at least 1")
        scores = evaluate_model(model, tokenizer, ids, tasks, args.eval_seqlen, args.batch_size, args.limit,
                                columns, args.eval_context)
        if args.word_ppl:
            clean = detokenize if args.eval_text.startswith("wikitext2") else str
            scores["word_ppl"] = word_perplexity(model, tokenizer, documents[:args.limit],
                                                 room(model, columns), clean)
    size = sum(t.numel() for t in method.tensors().values()) if method else 0
    rows = [{"row": name, **scores, "trainable_params": size, "extra_bytes": 4 * size,
             "weight_bytes": weight_bytes(model)}]
    print(format_table(rows))
    if out:
        with out.folder() as folder:
            files = result_files(vars(args), device, start, rows, recipe_of(model))
            for file, text in files.items():
                (folder / file).write_text(text, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    run(main)
