"""Choosing: does it pay to choose among prompts, by which rule, and how must the prompts have been learnt?

IDP learns several prompts separately and lets each input choose by mean attention. Readers ask why that rule,
and whether a set of prompts is better than one prompt of the same total size. This experiment answers with
three tables:

    rules     one set of prompts, every rule of idp_minimal.SELECTORS, against the best single prompt, all prompts
              concatenated, the average of their output probabilities, and the oracle (lowest loss on the
              answer itself)
    sets      ways to make a set worth choosing from, each with the same parameters and the same training tokens:
              deal (rows dealt out at random, as recover.py does), lengths (unequal prompts), shards (each
              prompt its own part of the data, for the toy its own domain), assigned (each row trains the
              prompt that now fits it best), single (one prompt as long as all of the set together)
    planted   a case in which the right prompt differs by construction: a trigger token decides which of two
              answers is right. If choosing works at all, it must win here. Toy model only.

    python -m experiments.choosing --seeds 5 --out runs/choosing                                   # toy, about 10 minutes on a CPU
    python -m experiments.choosing --model smollm2 --tables rules --tasks arc_easy --limit 100     # a real model

Every prompt is scored once on every item; a rule's result is then looked up by what it chose, which the law
of idp_minimal.py makes exact. Text is chosen for by the first half of a chunk and scored on the second half,
so that no choice has seen what it is scored on. Intervals are over seeds: mean +- t_{0.975} s / sqrt(seeds).
"""
import contextlib
import json
import math
import statistics
import time
import types

import torch

import compress
import evaluate
import recover
from idp_minimal import SELECTORS, PromptBank, attach_idp, mean_attention
from methods.prompts import SoftPrompts
from methods.registry import METHODS
from support import toy_world
from support.cli import DEFAULTS, UserError, parse_flags, progress, run
from support.data import check_text, encode, load_tasks, load_text
from support.output import claim, json_text
from support.architectures import check_room, device_name, pick_device, versions
from support.models import load_model
from support.tables import markdown
from support.uncertainty import mean_interval

RULES = ["mean_attention", "total_attention", "max_attention", "last_token", "random"]
TABLES = ("rules", "sets", "planted")


# --- 1. Sets of prompts -------------------------------------------------------------------------------------

READING = {"layers": "first", "scores": "probabilities"}   # one choice a sequence, so that it can be looked up


class DealtPrompts(SoftPrompts):
    """Rows are dealt out to the m prompts in turn, each on its own share of the data: equal tokens for every m."""

    def losses(self, ids, owner=None):
        """ids (B, T); row b trains prompt b mod m. -> (B,)."""
        return super().losses(ids, torch.arange(len(ids), device=ids.device) % len(self.prompts) if owner is None else owner)


class AssignedPrompts(DealtPrompts):
    """Each row trains the prompt that now fits it best: hard expectation-maximisation over the set.

    It costs m forward passes more per step than dealing rows out; tokens that are trained on are the same.
    """

    def losses(self, ids, owner=None):
        """ids (B, T) -> (B,), each under its best prompt."""
        if owner is None:
            every = [torch.full((len(ids),), k, device=ids.device) for k in range(len(self.prompts))]
            with torch.no_grad():
                owner = torch.stack([super(AssignedPrompts, self).losses(ids, k) for k in every]).argmin(0)  # (B,)
        return super().losses(ids, owner)


def shard_batches(shards):
    """A stand-in for recover.batch_at whose row b comes from shard b mod m, the one that prompt b mod m
    learns.
    """
    def sample(ids, step, batch_size, seqlen, seed):
        parts = [recover.batch_at(shard, step, batch_size // len(shards), seqlen, seed) for shard in shards]
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
    recover.train(method, data.ids, args.steps, args.batch_size, args.train_seqlen, args.lr, seed, sample=sample)
    return method


SETS = ("deal", "lengths", "shards", "assigned", "single")


# --- 2. Every prompt on every item, every rule's choice -----------------------------------------------------

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
def second_half(model, chunks, batch_size=8):
    """Log-probability of each token in the second half of each chunk. chunks (C, T) -> (C, T - T//2) on the
    CPU.
    """
    half, logp = chunks.shape[1] // 2, []
    for rows in chunks.split(batch_size):
        rows = rows.to(model.device)
        keep = torch.arange(half - 1, rows.shape[1] - 1, device=rows.device)
        logits = model(rows, use_cache=False, logits_to_keep=keep).logits                     # (B, T-half, V)
        logp.append(evaluate.token_scores(logits, rows[:, half:])[0].cpu())
    return torch.cat(logp)


def score(model, tokenizer, rows, chunks, bank=None, k=0):
    """Answers and text under one prompt, or under none. -> (logp of the choices [(choices,)], (C, T') token
    logp).
    """
    with attach_idp(model, bank, "fixed", k=k) if bank else contextlib.nullcontext():
        answers = evaluate.multiple_choice(model, tokenizer, rows)["logp"]
        return [torch.tensor(a) for a in answers], None if chunks is None else second_half(model, chunks)


@torch.no_grad()
def prompt_losses(model, bank, input_ids, attention_mask, labels=None, **options):
    """Mean next-token loss of every sequence under every prompt, for attach_idp(..., "oracle", loss=...). ->
    (B, m) float32.

    labels: (B, T), -100 where a token does not count; the real tokens themselves when absent.
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


class Scores:
    """Answers and text under each of several prompts. answers: n tensors (m, choices); text: (m, C, T')."""

    def __init__(self, rows, scored):
        self.gold = torch.tensor([row["answer"] for row in rows])                              # (n,)
        self.answers = [torch.stack(per_prompt) for per_prompt in zip(*(answers for answers, _ in scored))]
        self.text = torch.stack([text for _, text in scored]) if scored[0][1] is not None else None  # (m, C, T')

    def accuracy(self, items):
        """Accuracy when item i is answered by prompt items[i]."""
        right = [a[k].argmax() == gold for a, k, gold in zip(self.answers, items, self.gold)]
        return torch.stack(right).float().mean().item()

    def perplexity(self, texts):
        """Perplexity of the second halves when chunk j is read under prompt texts[j]."""
        return math.exp(-self.text[texts, torch.arange(len(texts))].mean())

    def oracle(self):
        """The prompt with the lowest loss on the right answer, and on the second half itself. -> (n,),
        (C,).
        """
        items = torch.stack([a[:, gold].argmax() for a, gold in zip(self.answers, self.gold)])
        return items, self.text.mean(2).argmax(0)

    def averaged(self):
        """All prompts at once: their probabilities averaged, per answer and per token. -> accuracy,
        perplexity.
        """
        right = [a.logsumexp(0).argmax() == gold for a, gold in zip(self.answers, self.gold)]
        return torch.stack(right).float().mean().item(), math.exp(-(self.text.logsumexp(0) - math.log(len(self.text))).mean())


def measure_set(method, tokenizer, data, seed):
    """One set of prompts under every rule and control.

    -> {name: (accuracy, perplexity, agreement with the oracle, share of items that take the most popular
    prompt)}.
    """
    model, rows, chunks, prompts = method.model, data.rows, data.chunks, [P.detach() for P in method.prompts]
    bank = PromptBank.from_prompts(model, prompts)
    scores = Scores(rows, [score(model, tokenizer, rows, chunks, bank, k) for k in range(bank.m)])
    items = choices_of(model, bank, contexts_of(tokenizer, rows), seed=seed)
    texts = choices_of(model, bank, chunks[:, :chunks.shape[1] // 2].tolist(), seed=seed)
    best_items, best_texts = scores.oracle()
    agree = lambda chosen: (chosen == best_items).float().mean().item()
    popular = lambda chosen: chosen.bincount().max().item() / len(chosen)
    row = lambda chosen, read: (scores.accuracy(chosen), scores.perplexity(read), agree(chosen), popular(chosen))
    result = {rule: row(items[rule], texts[rule]) for rule in RULES}
    losses = []
    for k in range(bank.m):                  # the best single prompt is picked on other text, not on the test
        with attach_idp(model, bank, "fixed", k=k):
            losses.append(-second_half(model, data.validation).mean())
    best = torch.stack(losses).argmin()
    result["best single prompt"] = row(best.expand(len(rows)), best.expand(len(chunks)))
    joined = PromptBank.from_prompts(model, [torch.cat(prompts)])
    one, first = Scores(rows, [score(model, tokenizer, rows, chunks, joined)]), torch.zeros(len(rows) + len(chunks), dtype=torch.long)
    result["all concatenated"] = (one.accuracy(first[:len(rows)]), one.perplexity(first[:len(chunks)]), None, None)
    result["probabilities averaged"] = (*scores.averaged(), None, None)
    result["oracle"] = row(best_items, best_texts)
    return result


# --- 3. The planted case ------------------------------------------------------------------------------------
# Two triggers in front of the same questions "Where was p born?": after <s> the first town is always right,
# after </s> the second. Each prompt learns one trigger's rows, so one prompt is right for each input, and
# which one is known.

TRIGGERS, PLANTED_LR = ("<s>", "</s>"), 0.1


class AnswerPrompts(DealtPrompts):
    """Soft prompts that learn from the last token of each row, the answer."""
    counted = slice(-1, None)


def planted_rows(task):
    """The questions about towns under both triggers. -> one list of rows per trigger."""
    rows = [row for row in toy_world.tasks()[task] if row["id"].endswith("/town")]
    return [[{**row, "context": f"{trigger} {row['context']}", "answer": k} for row in rows] for k, trigger in enumerate(TRIGGERS)]


def planted(model, tokenizer, args, seed):
    """Learn on shown people, ask about held-out ones. -> {name: (accuracy, share that chose the trigger's
    own prompt)}.
    """
    shards = [torch.tensor([encode(tokenizer, f"{row['context']} {row['choices'][row['answer']]}") for row in rows])
              for rows in planted_rows("toy_shown")]                                           # 2 x (rows, T)
    def sample(ids, step, batch_size, seqlen, seed):
        starts = recover.batch_at(torch.arange(len(shards[0])), step, batch_size // 2, 1, seed)[:, 0]
        return torch.stack([shard[starts] for shard in shards], dim=1).flatten(0, 1)           # (B, T): row b is of trigger b % 2
    rows = sum(planted_rows("toy_recall"), [])
    right, contexts, result = torch.tensor([row["answer"] for row in rows]), contexts_of(tokenizer, rows), {}
    n, T = args.prompt_length, shards[0].shape[1]
    for lengths, names in (([2 * n], ["one prompt, as long as both"]), ([n, n], [*RULES, "the trigger's own prompt"])):
        method = AnswerPrompts(model, lengths, seed=seed)
        recover.train(method, shards[0].flatten(), args.steps, args.batch_size, T, PLANTED_LR, seed, sample=sample, quiet=True)
        bank = PromptBank.from_prompts(model, [P.detach() for P in method.prompts])
        scores = Scores(rows, [score(model, tokenizer, rows, None, bank, k) for k in range(bank.m)])
        chosen = {**choices_of(model, bank, contexts, seed=seed), "the trigger's own prompt": right}
        for name in names:
            choice = chosen.get(name, torch.zeros_like(right))
            result[name] = (scores.accuracy(choice), (choice == right).float().mean().item() if bank.m > 1 else None)
    return result


# --- 4. Tables ----------------------------------------------------------------------------------------------

def interval(values, form):
    """'mean [low, high]' over seeds, a t interval; the value alone from one seed. values: list of floats."""
    if values[0] is None:
        return "-"
    mean, (low, high) = statistics.mean(values), mean_interval(values)
    return form(mean) if low is None else f"{form(mean)} [{form(low)}, {form(high)}]"


def table(head, forms, results):
    """Markdown. results: one {row name: tuple} per seed; forms: how to print each entry of the tuple."""
    columns = {name: zip(*(result[name] for result in results)) for name in results[0]}
    return markdown(head, [[name, *(interval(list(column), form) for column, form in zip(values, forms))]
                           for name, values in columns.items()])


def percent(x):
    """0.5 -> '50.0'. An interval's end beyond 0 or 1 is no share: it is cut there."""
    return f"{100 * min(max(x, 0), 1):.1f}"


def load_data(args, tokenizer, rows):
    """-> namespace of ids (training tokens), shards (m of them), rows, chunks and validation (C, T), which
    is training text.
    """
    ids = load_text(args.text, tokenizer, "train")
    test = load_text(args.eval_text, tokenizer, "test", "--eval-text")
    T = args.train_seqlen
    for flag, text in (("--text", ids), ("--eval-text", test)):
        if len(text) < T * (args.m if flag == "--text" else 1):
            raise UserError(f"{flag}: has {len(text)} tokens, too few for rows of --train-seqlen {T}; give more text")
    chunks, validation = (text[:len(text) // T * T].view(-1, T)[:args.eval_chunks] for text in (test, ids))
    shards = domain_shards(tokenizer, args.m) if args.model == "toy" else list(ids.chunk(args.m))
    return types.SimpleNamespace(ids=ids, shards=shards, rows=rows, chunks=chunks, validation=validation)


def domain_shards(tokenizer, m):
    """The toy's recovery text by domain, each domain cut in m / 2 parts. -> m tensors of ids. m must be
    even.
    """
    texts = ["\n\n".join(toy_world.text("shown", domain=domain)) for domain in toy_world.DOMAINS]
    return [part for text in texts for part in torch.tensor(encode(tokenizer, text)).chunk(m // len(texts))]


def run_seeds(model, tokenizer, args, data):
    """Every table that was asked for, over all seeds. -> {table: [one result per seed]}."""
    results = {name: [] for name in args.tables}
    kinds = SETS if "sets" in args.tables else ("deal",) if "rules" in args.tables else ()
    for seed in progress(range(args.seed, args.seed + args.seeds), desc="seeds"):
        per_set = {kind: measure_set(make_set(kind, model, data, args, seed), tokenizer, data, seed) for kind in kinds}
        for name, scores in (("rules", per_set.get("deal")), ("sets", per_set)):
            if name in args.tables:
                results[name].append(scores)
        if "planted" in args.tables:
            results["planted"].append(planted(model, tokenizer, args, seed))
    return results


def report(results, args):
    """The tables with what they say about themselves. -> Markdown."""
    parts = []
    if "rules" in results:
        none = {"no prompt (compressed)": (*args.baseline, None, None)}
        rules = [{**none, **result} for result in results["rules"]]
        parts += ["Rules: " + args.caption, table(
            ["chosen by", "accuracy %", "perplexity", "agrees with the oracle %", "most popular prompt %"],
            (percent, "{:.2f}".format, percent, percent), rules)]
    if "sets" in results:
        pick = ("mean_attention", "best single prompt", "oracle")
        sets = [{kind: tuple(value for rule in pick for value in scores[rule][:2]) for kind, scores in result.items()}
                for result in results["sets"]]
        head = ["set"] + [f"{rule}, {what}" for rule in pick for what in ("accuracy %", "perplexity")]
        parts += ["Sets: " + args.caption, table(head, (percent, "{:.2f}".format) * 3, sets)]
    if "planted" in results:
        parts += ["Planted: a trigger decides which of two towns is right; without choosing, one answer serves half of the questions.",
                  table(["prompt", "accuracy %", "chose the trigger's own prompt %"], (percent, percent), results["planted"])]
    return "\n\n".join(parts)


# --- 5. The command -----------------------------------------------------------------------------------------

TAKES = ["model", "device", "dtype", "seed", "text", *compress.COMPRESSION_FLAGS, "prompt_length", "m", "steps", "batch_size",
         "train_seqlen", "lr", "seeds", "tables", "tasks", "limit", "eval_text", "eval_chunks", "out"]


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
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of --m {args.m}, so that prompts learn equally much")
    if args.model == "toy" and args.m % 2:
        raise UserError(f"--m {args.m}: the toy has two domains, which share the prompts equally; use an even number")
    if not args.tasks:
        raise UserError("--tasks: missing; name multiple-choice tasks, for example arc_easy or FILE.jsonl")
    for flag, name in (("--text", args.text), ("--eval-text", args.eval_text)):
        check_text(name, flag)


def choice_tasks(args):
    """The rows of all tasks. Raises UserError for open answers: here a choice is looked up, not generated."""
    tasks = load_tasks(args.tasks, args.limit)
    for name, rows in tasks.items():
        if "choices" not in rows[0] or "suffix" in rows[0]:
            raise UserError(f"--tasks {name}: this experiment takes multiple-choice tasks with one context a row; use for example "
                            "arc_easy")
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
        alone = Scores(data.rows, [score(model, tokenizer, data.rows, data.chunks)])
        args.baseline = (alone.accuracy(torch.zeros(len(data.rows), dtype=torch.long)),
                         alone.perplexity(torch.zeros(len(data.chunks), dtype=torch.long)))
        args.caption = (f"{args.model}, {name} {json.dumps(settings)}, {args.m} prompts of {args.prompt_length} tokens, "
                        f"{args.steps} steps of {args.batch_size} x {args.train_seqlen} tokens, {args.seeds} seeds; {args.tasks} "
                        f"n = {len(data.rows)}, {len(data.chunks)} chunks; {device_name(device)}")
        results = run_seeds(model, tokenizer, args, data)
        text = report(results, args)
        print(text)
        if out:
            with out.folder() as folder:
                (folder / "choosing.md").write_text(text + "\n", encoding="utf-8")
                (folder / "choosing.json").write_text(json_text({
                    "command": evaluate.command_line(), "settings": vars(args), "versions": versions(),
                    "device": device_name(device), "seconds": round(time.time() - start, 1), "tables": results}), encoding="utf-8")


if __name__ == "__main__":
    run(main)
