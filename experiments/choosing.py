"""Choosing: does it pay to choose among prompts, by which rule, and how must the prompts have been learnt?

    rules     one set of prompts, every rule of idp_minimal.SELECTORS, against the best single prompt, all
              prompts concatenated, the average of their output probabilities, and the oracle (lowest loss on
              the answer itself)
    sets      ways to make a set worth choosing from, each with the same parameters and training tokens: deal
              (rows dealt out at random, as recover.py does), lengths (unequal prompts), shards (each prompt
              its own part of the data, for the toy its own domain), assigned (each row trains the prompt that
              now fits it best), single (one prompt as long as all of the set together)
    planted   a case in which the right prompt differs by construction: a trigger token decides which of two
              answers is right. If choosing works at all, it must win here. Toy model only.

    python -m experiments.choosing --seeds 5 --out runs/choosing     # toy, about 10 minutes on a CPU
    python -m experiments.choosing --model smollm2 --tables rules --tasks arc_easy --limit 100

Every prompt is scored once on every item; a rule's result is then looked up by what it chose, which the law
of idp_minimal.py makes exact. Text is chosen for by the first half of a chunk and scored on the second half,
so that no choice has seen what it is scored on. Intervals are over seeds: mean +- t_{0.975} s / sqrt(seeds).
"""
import json
import statistics
import time
import types

import torch

import compress
import evaluate
import recover
from experiments.prompt_scores import Scores, score, second_half
from idp_minimal import SELECTORS, PromptBank, attach_idp, mean_attention
from methods.prompts import SoftPrompts
from methods.registry import METHODS
from support import toy_world
from support.architectures import check_room, device_name, pick_device, versions
from support.cli import DEFAULTS, UserError, parse_flags, run
from support.data import check_text, encode, load_tasks, load_text
from support.models import load_model
from support.output import claim, write_json
from support.progress import progress
from support.tables import markdown
from support.uncertainty import mean_ci95

RULES = ["mean_attention", "total_attention", "max_attention", "last_token", "random"]
TABLES = ("rules", "sets", "planted")


# --- 1. Sets of prompts -------------------------------------------------------------------------------------

READING = {"layers": "first", "scores": "probabilities"}   # one choice a sequence, to be looked up


class DealtPrompts(SoftPrompts):
    """Rows are dealt out to the m prompts in turn, each its own share: equal tokens for every m."""

    def losses(self, ids, owner=None):
        """ids (B, T); row b trains prompt b mod m. -> (B,)."""
        if owner is None:
            owner = torch.arange(len(ids), device=ids.device) % len(self.prompts)
        return super().losses(ids, owner)


class AssignedPrompts(DealtPrompts):
    """Each row trains the prompt that now fits it best: hard expectation-maximisation over the set.

    It costs m forward passes more per step than dealing rows out; tokens that are trained on are the same.
    """

    def losses(self, ids, owner=None):
        """ids (B, T) -> (B,), each under its best prompt."""
        if owner is None:
            every = [torch.full((len(ids),), k, device=ids.device) for k in range(len(self.prompts))]
            with torch.no_grad():
                losses = torch.stack([super(AssignedPrompts, self).losses(ids, k) for k in every])  # (m, B)
            owner = losses.argmin(0)                                                           # (B,)
        return super().losses(ids, owner)


def shard_batches(shards):
    """A stand-in for recover.batch_at: row b comes from shard b mod m, which prompt b mod m learns."""
    def sample(ids, step, batch_size, seqlen, seed):
        size = batch_size // len(shards)
        parts = [recover.batch_at(shard, step, size, seqlen, seed) for shard in shards]
        return torch.stack(parts, dim=1).flatten(0, 1)                                         # (B, T)
    return sample


def unequal(total, m):
    """m lengths that sum to total, each about twice the one before: 32, 4 -> [2, 4, 9, 17]."""
    parts = [total * 2 ** k / (2 ** m - 1) for k in range(m)]
    lengths = [max(1, round(part)) for part in parts[:-1]]
    return lengths + [total - sum(lengths)]


def make_set(kind, model, data, args, seed):
    """Train one set of prompts with args.m * args.prompt_length tokens in all. -> SoftPrompts."""
    m, n = args.m, args.prompt_length
    lengths = {"lengths": unequal(m * n, m), "single": [m * n]}.get(kind, [n] * m)
    method = (AssignedPrompts if kind == "assigned" else DealtPrompts)(model, lengths, seed=seed)
    sample = shard_batches(data.shards) if kind == "shards" else recover.batch_at
    recover.train(method, data.ids, args.steps, args.batch_size, args.train_seqlen, args.lr, seed,
                  sample=sample)
    return method


SETS = ("deal", "lengths", "shards", "assigned", "single")


# --- 2. One set under every rule and control ----------------------------------------------------------------

def contexts_of(tokenizer, rows):
    """The tokens by which a question chooses. -> n lists of ids."""
    return [encode(tokenizer, row["context"]) for row in rows]


@torch.no_grad()
def choices_of(model, bank, contexts, batch_size=32, seed=0):
    """What each rule chooses for each context. contexts: n lists of ids -> {rule: (n,) long on the CPU}."""
    chosen, generator = {rule: [] for rule in RULES}, torch.Generator().manual_seed(seed)

    def record(A, real, owner):
        """A selector that notes what every rule would choose. A (B, h, T, S), as for any of SELECTORS."""
        for rule in RULES:
            options = {"generator": generator} if rule == "random" else {}
            chosen[rule].append(SELECTORS[rule](A, real, owner, **options).argmax(1).cpu())
        return mean_attention(A, real, owner)

    with attach_idp(model, bank, record, **READING):
        for start in range(0, len(contexts), batch_size):
            ids, mask = evaluate.pad(contexts[start:start + batch_size], 0, left=True, device=model.device)
            model(ids, attention_mask=mask, logits_to_keep=1)
    return {rule: torch.cat(parts) for rule, parts in chosen.items()}


@torch.no_grad()
def prompt_losses(model, bank, input_ids, attention_mask, labels=None, **options):
    """Mean next-token loss of every sequence under every prompt, for attach_idp(..., "oracle", loss=...).

    labels: (B, T), -100 where a token does not count; the real tokens themselves when absent. -> (B, m).
    """
    labels = input_ids.masked_fill(attention_mask == 0, -100) if labels is None else labels
    losses = []
    for k in range(bank.m):
        with attach_idp(model, bank, "fixed", k=k, **options):
            logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1]            # (B, T-1, V)
        counts = labels[:, 1:] != -100
        logp = evaluate.token_scores(logits, labels[:, 1:].clamp(min=0))[0] * counts           # (B, T-1)
        losses.append(-logp.sum(1) / counts.sum(1))
    return torch.stack(losses, dim=1)


def best_single(model, bank, validation):
    """The prompt with the lowest loss on text that is not the test. -> () long."""
    losses = []
    for k in range(bank.m):
        with attach_idp(model, bank, "fixed", k=k):
            losses.append(-second_half(model, validation).mean())
    return torch.stack(losses).argmin()


def measure_set(method, tokenizer, data, seed):
    """One set of prompts under every rule and control.

    -> {name: (accuracy, perplexity, agreement with the oracle, share of the most popular prompt)}.
    """
    model, rows, chunks, prompts = method.model, data.rows, data.chunks, [P.detach() for P in method.prompts]
    bank = PromptBank.from_prompts(model, prompts)
    scores = Scores(rows, [score(model, tokenizer, rows, chunks, bank, k) for k in range(bank.m)])
    items = choices_of(model, bank, contexts_of(tokenizer, rows), seed=seed)
    texts = choices_of(model, bank, chunks[:, :chunks.shape[1] // 2].tolist(), seed=seed)
    best_items, best_texts = scores.oracle()

    def row(chosen, read):
        """What the choices of items (n,) and of chunks (C,) lead to."""
        agree, popular = (chosen == best_items).float().mean().item(), chosen.bincount().max().item()
        return scores.accuracy(chosen), scores.perplexity(read), agree, popular / len(chosen)

    result = {rule: row(items[rule], texts[rule]) for rule in RULES}
    best = best_single(model, bank, data.validation)
    result["best single prompt"] = row(best.expand(len(rows)), best.expand(len(chunks)))
    joined = PromptBank.from_prompts(model, [torch.cat(prompts)])
    result["all concatenated"] = (*alone(model, tokenizer, rows, chunks, joined), None, None)
    result["probabilities averaged"] = (*scores.averaged(), None, None)
    result["oracle"] = row(best_items, best_texts)
    return result


def alone(model, tokenizer, rows, chunks, bank=None):
    """Accuracy and perplexity under the only prompt of a bank, or under none."""
    scores = Scores(rows, [score(model, tokenizer, rows, chunks, bank)])
    first = lambda count: torch.zeros(count, dtype=torch.long)
    return scores.accuracy(first(len(rows))), scores.perplexity(first(len(chunks)))


# --- 3. The planted case ------------------------------------------------------------------------------------
# Two triggers in front of the same questions "Where was p born?": after <s> the first town is always right,
# after </s> the second. Each prompt learns one trigger's rows, so the right prompt of each input is known.

TRIGGERS, PLANTED_LR = ("<s>", "</s>"), 0.1


class AnswerPrompts(DealtPrompts):
    """Soft prompts that learn from the last token of each row, the answer."""
    counted = slice(-1, None)


def planted_rows(task):
    """The questions about towns under both triggers. -> one list of rows per trigger."""
    rows = [row for row in toy_world.tasks()[task] if row["id"].endswith("/town")]
    return [[{**row, "context": f"{trigger} {row['context']}", "answer": k} for row in rows]
            for k, trigger in enumerate(TRIGGERS)]


def planted(model, tokenizer, args, seed):
    """Learn on shown people, ask about held-out ones. -> {name: (accuracy, share given its own prompt)}."""
    answered = lambda row: encode(tokenizer, f"{row['context']} {row['choices'][row['answer']]}")
    shards = [torch.tensor([answered(row) for row in rows]) for rows in planted_rows("toy_shown")]

    def sample(ids, step, batch_size, seqlen, seed):
        """-> (B, T): row b is of trigger b % 2."""
        starts = recover.batch_at(torch.arange(len(shards[0])), step, batch_size // 2, 1, seed)[:, 0]
        return torch.stack([shard[starts] for shard in shards], dim=1).flatten(0, 1)

    rows = sum(planted_rows("toy_recall"), [])
    right, contexts = torch.tensor([row["answer"] for row in rows]), contexts_of(tokenizer, rows)
    n, T, result = args.prompt_length, shards[0].shape[1], {}
    one, own = "one prompt, as long as both", "the trigger's own prompt"
    for lengths, names in (([2 * n], [one]), ([n, n], [*RULES, own])):
        method = AnswerPrompts(model, lengths, seed=seed)
        recover.train(method, shards[0].flatten(), args.steps, args.batch_size, T, PLANTED_LR, seed,
                      sample=sample, quiet=True)
        bank = PromptBank.from_prompts(model, [P.detach() for P in method.prompts])
        scores = Scores(rows, [score(model, tokenizer, rows, None, bank, k) for k in range(bank.m)])
        chosen = {**choices_of(model, bank, contexts, seed=seed), own: right, one: torch.zeros_like(right)}
        for name in names:
            share = None if name == one else (chosen[name] == right).float().mean().item()
            result[name] = (scores.accuracy(chosen[name]), share)
    return result


# --- 4. Tables ----------------------------------------------------------------------------------------------

def interval(values, form):
    """'mean [low, high]' over seeds, a t interval; the value alone from one seed. values: list of floats."""
    if values[0] is None:
        return "-"
    mean, ends = statistics.mean(values), mean_ci95(values)
    return form(mean) if ends is None else f"{form(mean)} [{form(ends[0])}, {form(ends[1])}]"


def table(head, forms, results):
    """Markdown. results: one {row name: tuple} per seed; forms: how to print each entry of the tuple."""
    columns = {name: zip(*(result[name] for result in results)) for name in results[0]}
    return markdown(head, [[name, *(interval(list(column), form) for column, form in zip(values, forms))]
                           for name, values in columns.items()])


def percent(x):
    """0.5 -> '50.0'. An interval's end beyond 0 or 1 is no share: it is cut there."""
    return f"{100 * min(max(x, 0), 1):.1f}"


def load_data(args, tokenizer, rows):
    """-> ids (training tokens), m shards of them, rows, chunks to test and validate on (C, T), by name."""
    ids = load_text(args.text, tokenizer, "train")
    test = load_text(args.eval_text, tokenizer, "test", "--eval-text")
    T = args.train_seqlen
    for flag, text, least in (("--text", ids, T * args.m), ("--eval-text", test, T)):
        if len(text) < least:
            raise UserError(f"{flag}: has {len(text)} tokens, too few for rows of --train-seqlen {T}; "
                            "give more text")
    chunks, validation = (text[:len(text) // T * T].view(-1, T)[:args.eval_chunks] for text in (test, ids))
    wholes = [ids]
    if args.model == "toy":                                # two domains, each cut in m / 2 parts
        texts = ["\n\n".join(toy_world.text("shown", domain=domain)) for domain in toy_world.DOMAINS]
        wholes = [torch.tensor(encode(tokenizer, text)) for text in texts]
    shards = [part for whole in wholes for part in whole.chunk(args.m // len(wholes))]
    return types.SimpleNamespace(ids=ids, shards=shards, rows=rows, chunks=chunks, validation=validation)


def run_seeds(model, tokenizer, args, data):
    """Every table that was asked for, over all seeds. -> {table: [one result per seed]}."""
    results = {name: [] for name in args.tables}
    kinds = SETS if "sets" in args.tables else ("deal",) if "rules" in args.tables else ()
    for seed in progress(range(args.seed, args.seed + args.seeds), desc="seeds"):
        per_set = {kind: measure_set(make_set(kind, model, data, args, seed), tokenizer, data, seed)
                   for kind in kinds}
        measured = {"rules": per_set.get("deal"), "sets": per_set}
        if "planted" in args.tables:
            measured["planted"] = planted(model, tokenizer, args, seed)
        for name in args.tables:
            results[name].append(measured[name])
    return results


def report(results, args):
    """The tables with what they say about themselves. -> Markdown."""
    parts, pair = [], (percent, "{:.2f}".format)
    if "rules" in results:
        none = {"no prompt (compressed)": (*args.baseline, None, None)}
        head = ["chosen by", "accuracy %", "perplexity", "agrees with the oracle %", "most popular prompt %"]
        rules = [{**none, **result} for result in results["rules"]]
        parts += ["Rules: " + args.caption, table(head, (*pair, percent, percent), rules)]
    if "sets" in results:
        pick = ("mean_attention", "best single prompt", "oracle")
        sets = [{kind: tuple(value for rule in pick for value in scores[rule][:2])
                 for kind, scores in result.items()} for result in results["sets"]]
        head = ["set"] + [f"{rule}, {what}" for rule in pick for what in ("accuracy %", "perplexity")]
        parts += ["Sets: " + args.caption, table(head, pair * 3, sets)]
    if "planted" in results:
        head = ["prompt", "accuracy %", "chose the trigger's own prompt %"]
        parts += ["Planted: a trigger decides which of two towns is right; without choosing, one answer "
                  "serves half of the questions.", table(head, (percent, percent), results["planted"])]
    return "\n\n".join(parts)


# --- 5. The command -----------------------------------------------------------------------------------------

TAKES = ["model", "device", "dtype", "seed", "text", *compress.COMPRESSION_FLAGS, "prompt_length", "m",
         "steps", "batch_size", "train_seqlen", "lr", "seeds", "tables", "tasks", "limit", "eval_text",
         "eval_chunks", "out"]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError."""
    args = parse_flags(__doc__, TAKES, argv, {"compressor": compress.COMPRESSORS, "tables": TABLES},
                       {"prompt_length": 8, "eval_chunks": 100})
    toy = args.model == "toy"
    args.tables = args.tables or (TABLES if toy else TABLES[:2])
    args.tasks = "toy_recall" if toy and args.tasks == DEFAULTS["toy"]["tasks"] else args.tasks
    args.eval_text = args.text if args.eval_text is None else args.eval_text
    args.lr = METHODS["idp"].rates["toy" if toy else "other"] if args.lr is None else args.lr
    check_sets(args)
    args.compression = compress.settings_from(args)
    return args


def check_sets(args):
    """Refuse what cannot work before any model loads."""
    if "planted" in args.tables and args.model != "toy":
        raise UserError(f"--tables {','.join(args.tables)}: planted needs --model toy; leave it out")
    if args.batch_size % args.m:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of --m {args.m}, so that "
                        "prompts learn equally much")
    if args.model == "toy" and args.m % 2:
        raise UserError(f"--m {args.m}: the toy has two domains, which share the prompts equally; use an "
                        "even number")
    if not args.tasks:
        raise UserError("--tasks: missing; name multiple-choice tasks, for example arc_easy or FILE.jsonl")
    for flag, name in (("--text", args.text), ("--eval-text", args.eval_text)):
        check_text(name, flag)


def choice_tasks(args):
    """The rows of all tasks. Raises UserError for open answers: here a choice is looked up, not generated."""
    tasks = load_tasks(args.tasks, args.limit)
    for name, rows in tasks.items():
        if "choices" not in rows[0] or "suffix" in rows[0]:
            raise UserError(f"--tasks {name}: this experiment takes multiple-choice tasks with one context a "
                            "row; use for example arc_easy")
    return [row for rows in tasks.values() for row in rows]


def main(argv=None):
    """Compress, learn sets of prompts, print the tables."""
    args, start = parse(argv), time.time()
    device = pick_device(args.device)
    with claim(args.out) as out:
        rows = choice_tasks(args)
        model, tokenizer = load_model(args.model, device, args.dtype)
        compress.refuse_compressed(model, args.model)
        compress.check_model(model, *args.compression)
        check_room(model, "--train-seqlen", args.train_seqlen, args.m * args.prompt_length)
        check_room(model, "--seqlen", args.seqlen)
        name, settings = args.compression
        data = load_data(args, tokenizer, rows)
        calibration = compress.calibration_ids(data.ids, args.nsamples, args.seqlen, args.seed)
        compress.compress_model(model, tokenizer, name, calibration, **settings)
        args.baseline = alone(model, tokenizer, data.rows, data.chunks)
        args.caption = (f"{args.model}, {name} {json.dumps(settings)}, {args.m} prompts of "
                        f"{args.prompt_length} tokens, {args.steps} steps of {args.batch_size} x "
                        f"{args.train_seqlen} tokens, {args.seeds} seeds; {args.tasks} n = {len(data.rows)}, "
                        f"{len(data.chunks)} chunks; {device_name(device)}")
        results = run_seeds(model, tokenizer, args, data)
        text = report(results, args)
        print(text)
        if out:
            obj = {"command": evaluate.command_line(), "settings": vars(args), "versions": versions(),
                   "device": device_name(device), "seconds": round(time.time() - start, 1), "tables": results}
            with out.folder() as folder:
                (folder / "choosing.md").write_text(text + "\n", encoding="utf-8")
                write_json(folder / "choosing.json", obj)


if __name__ == "__main__":
    run(main)
