"""Readings: the same prompts under every reading of the paper's words, and what is chosen.

    python -m experiments.readings --out runs/readings     # the toy model, minutes on a CPU
    python -m experiments.readings --model smollm2 --tasks arc_easy --limit 100

IDP's prompts are trained once, as recover.py trains them: choosing exists at inference only. Then three
tables:

    readings   layers every, first x scores logits, probabilities; paired tests against the literal reading
    choices    which prompt each layer gives each input, under layers="every": by task, on the toy by domain
    pairs      what a choice is made for: a context, which all candidates share (ours), or a question with one
               candidate, an input of its own, so that candidates of one question may see other prompts. NOT
               IN PAPER: which; a harness scores pairs. Here a pair's choice is made by all its tokens. The
               standard harness leaves the last one out, which where candidates have one token is the context.

Letters: B contexts, R pairs, T tokens, C tokens of a candidate, V words, m prompts, L layers.
"""
import collections
import itertools
import time

import torch

import evaluate
import recover
from experiments.choosing import choice_tasks
from idp_minimal import attach_idp
from methods.registry import METHODS
from support.architectures import room
from support.cli import UserError, parse_flags, run
from support.output import claim
from support.progress import progress
from support.recipe import recipe_of
from support.scoring import TOKENS, encode_pair, pad, token_scores
from support.tables import markdown
from support.uncertainty import cells_of, discordant, paired_test, together

READINGS = tuple(itertools.product(("every", "first"), ("logits", "probabilities")))
LITERAL = ("every", "logits")                              # [§3.2]
COMPARED = ["A", "B", "on", "n", "A", "B", "B - A", "95 % of the difference", "p", "real at 5 %"]


def row_name(reading):
    """('every', 'logits') -> 'idp, every, logits'."""
    return ", ".join(["idp", *reading])


# --- 1. Readings --------------------------------------------------------------------------------------------

def trained(job):
    """IDP's prompts, trained as recover.py does. -> SoftPrompts."""
    args, entry = job.args, METHODS["idp"]
    method = entry.build(job.model, args.prompt_lengths, seed=args.seed)
    lr = entry.rates["toy" if args.toy else "other"] if args.lr is None else args.lr
    recover.train(method, job.train_ids, args.steps, args.batch_size, args.train_seqlen, lr, args.seed,
                  args.accumulate, args.checkpointing, weight_decay=args.weight_decay, teacher=job.teacher)
    return method


def measure_readings(job, method, weight_bytes):
    """A row for each prompt alone and for each reading."""
    for name, part in method.parts().items():
        if name != "concatenated":
            job.measure(name, weight_bytes, part)
    for layers, scores in READINGS:
        method.reading.update(layers=layers, scores=scores)
        job.measure(row_name((layers, scores)), weight_bytes, method)
    method.reading.update(layers=LITERAL[0], scores=LITERAL[1])


def tests_table(rows):
    """Every other row of IDP's prompts against the literal reading. -> Markdown with what many tests mean."""
    items, base, tests, lines = {row["row"]: row["items"] for row in rows}, row_name(LITERAL), [], []
    for name in items.keys() - {"dense", "compressed", base}:
        for on in items[base]:
            a, b = items[base][on]["values"], items[name][on]["values"]
            tests.append({"a": base, "b": name, **paired_test(on, a, b)})
            flips = "-" if on == "loss" else "{} / {}".format(*discordant(a, b))
            lines.append([*cells_of(tests[-1]), flips])
    return markdown([*COMPARED, "lost / gained"], sorted(lines)) + "\n\n" + together(tests)


# --- 2. Choices ---------------------------------------------------------------------------------------------

@torch.no_grad()
def choices_of(model, bank, contexts, scores, batch_size=64):
    """What each layer chooses for each context. contexts: lists of ids -> (L, B) long on the CPU."""
    chosen = []
    with attach_idp(model, bank, layers="every", scores=scores) as idp:
        for start in range(0, len(contexts), batch_size):
            ids, mask = pad(contexts[start:start + batch_size], 0, left=True, device=model.device)
            model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            chosen.append(idp.choice.cpu())
    return torch.cat(chosen, dim=1)


def inputs_by_kind(job):
    """{kind: contexts as lists of ids}: each task, on the toy each domain of it, and the text's contexts."""
    kinds, args = collections.defaultdict(list), job.args
    limit = room(job.model, job.columns)
    for name, rows in job.tasks.items():
        for row in rows:
            kind = f"{name}, {row['domain']}" if "domain" in row else name
            kinds[kind].append(encode_pair(job.tokenizer, *evaluate.choice_pairs(row)[0], limit)[0])
    if args.eval_context:
        chunks = job.eval_ids[:len(job.eval_ids) // args.eval_seqlen * args.eval_seqlen]
        chunks = chunks.view(-1, args.eval_seqlen)[:args.eval_chunks, :args.eval_context]
        kinds["text"] = chunks.tolist()
    return dict(kinds)


def choices_table(job, bank, scores):
    """A line a layer, a column a kind of input: the share of inputs that take each prompt. -> Markdown."""
    kinds = inputs_by_kind(job)
    chosen = {kind: choices_of(job.model, bank, contexts, scores) for kind, contexts in kinds.items()}
    lines = [[i + 1, *(shares(chosen[kind][i], bank.m) for kind in kinds)]
             for i in range(len(bank.keys))]
    patterns = collections.Counter(map(tuple, torch.cat(list(chosen.values()), dim=1).T.tolist()))
    most = patterns.most_common(1)[0][1]
    head = ["layer", *(f"{kind} ({len(contexts)})" for kind, contexts in kinds.items())]
    names = " / ".join(str(k + 1) for k in range(bank.m))
    return (f"Share of inputs that take prompt {names}, %; every, {scores}:\n\n{markdown(head, lines)}\n\n"
            f"{len(patterns)} of {bank.m ** len(bank.keys)} patterns over the layers occur; "
            f"{100 * most / sum(patterns.values()):.1f} % of the inputs have the commonest.")


def shares(choice, m):
    """choice (B,) -> '25.0 / 75.0', in percent, a number for each prompt."""
    return " / ".join(f"{100 * (choice == k).float().mean().item():.1f}" for k in range(m))


# --- 3. Per context or per pair -----------------------------------------------------------------------------

@torch.no_grad()
def pair_scores(model, tokenizer, rows, attached=None, limit=None):
    """Every choice read together with its context, an input of its own. attached: the IDP in use, if any.

    -> log p of each choice, a list a row, and what each layer chose for it, a list of tuples a row.
    """
    limit = limit or room(model)
    logp = [[None] * len(evaluate.choice_pairs(row)) for row in rows]
    chosen = [[()] * len(scores) for scores in logp]
    pairs = [(i, j, *encode_pair(tokenizer, *pair, limit)) for i, row in enumerate(rows)
             for j, pair in enumerate(evaluate.choice_pairs(row))]
    pairs.sort(key=lambda pair: len(pair[2]) + len(pair[3]))
    size = max(1, TOKENS // (len(pairs[-1][2]) + len(pairs[-1][3])))
    for start in progress(range(0, len(pairs), size), desc="pairs"):
        batch = pairs[start:start + size]
        scores = score_pairs(model, [pair[2:] for pair in batch])
        by_pair = attached.choice.T.tolist() if attached else [()] * len(batch)                    # (R, L)
        for (i, j, *_), score, choice in zip(batch, scores, by_pair):
            logp[i][j], chosen[i][j] = score, tuple(choice)
    return logp, chosen


def score_pairs(model, pairs):
    """pairs: R of (context ids, candidate ids) -> R sums of log p over the candidate's tokens."""
    ids, mask = pad([left + right for left, right in pairs], 0, left=True, device=model.device)    # (R, T)
    lengths = torch.tensor([len(right) for _, right in pairs], device=ids.device)
    C, positions = int(lengths.max()), (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False,
                   logits_to_keep=C + 1).logits[:, :-1]                                        # (R, C, V)
    own = torch.arange(C, device=ids.device) >= C - lengths[:, None]                           # (R, C)
    return (token_scores(logits, ids[:, -C:])[0] * own).sum(1).tolist()


def pairs_table(job, method):
    """The literal reading, its choice made per context and per pair. -> Markdown."""
    lines, tests = [], []
    for name, rows in job.tasks.items():
        with method.inference() as attached:
            limit = room(job.model, job.columns)
            ours = evaluate.multiple_choice(job.model, job.tokenizer, rows, max_length=limit)["logp"]
            theirs, chosen = pair_scores(job.model, job.tokenizer, rows, attached, limit)
        answers = [[max(range(len(s)), key=s.__getitem__) for s in logp] for logp in (ours, theirs)]
        a, b = ([x == row["answer"] for x, row in zip(some, rows)] for some in answers)
        tests.append({"a": "per context", "b": "per pair", **paired_test(name, a, b)})
        same = sum(x == y for x, y in zip(*answers)) / len(rows)
        differ = sum(len(set(patterns)) > 1 for patterns in chosen) / len(rows)
        lines.append([*cells_of(tests[-1]), "{} / {}".format(*discordant(a, b)), f"{100 * same:.1f}",
                      f"{100 * differ:.1f}"])
    head = [*COMPARED, "lost / gained", "same answer %", "candidates under different prompts %"]
    return markdown(head, lines) + "\n\n" + together(tests)


# --- 4. The command -----------------------------------------------------------------------------------------

OTHERS = {"method", "resume", *recover.METHOD_FLAGS} - {"prompt_lengths"}              # recover.py's alone
TAKES = [name for name in recover.TAKES if name not in OTHERS]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError."""
    args = parse_flags(__doc__, TAKES, argv, {name: recover.CHOICES[name] for name in ("compressor", "loss")})
    args.method, args.merge = ["idp"], False
    recover.check_job(args)
    if len(args.prompt_lengths) < 2:
        raise UserError(f"--prompt-lengths {args.prompt_lengths[0]}: one prompt leaves nothing to choose; "
                        "give several, as 8,16")
    return args


def main(argv=None):
    """Train once; three tables."""
    args, start = parse(argv), time.time()
    torch.manual_seed(args.seed)
    with claim(args.out) as out:
        choice_tasks(args)                                 # raises UserError for open answers
        job = recover.Run(args)
        report = job.compress()
        job.measure("compressed", report["weight_bytes"])
        method = trained(job)
        measure_readings(job, method, report["weight_bytes"])
        with method.inference() as attached:
            bank = attached.bank
        parts = [evaluate.format_table(job.rows), tests_table(job.rows)]
        parts += [choices_table(job, bank, scores) for scores in ("logits", "probabilities")]
        parts += [pairs_table(job, method)] if job.tasks else []
        text = "\n\n".join(parts) + "\n"
        print(text)
        if out:
            files = evaluate.result_files(vars(args), job.device, start, job.rows, recipe_of(job.model))
            for file, content in {**files, "results.md": text}.items():
                out.text(file, content)


if __name__ == "__main__":
    run(main)
