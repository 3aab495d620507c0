"""Flips: which answers a real model loses by compression, and which come back, against the noise floor.

    python -m experiments.flips --model smollm2 --tasks a.jsonl,b.jsonl --method lora,prompt --out runs/flips
    python -m experiments.flips --model smollm2 --tasks a.jsonl --shard 1/2 --out runs/flips   # half of them

The question is ours; the paper compares averages over benchmarks. Here a *lost* item is one that the dense
model answers right and the compressed model wrong. Some of these were near a tie, and any small change would
turn them back: an item that was chosen because it had gone wrong is likely to do better next time, whatever
is done (regression to the mean). So each remedy is read against models that nothing recovered:

    other calibration    the same compression from another sample of the text
    other threads        the same compression, sums in another order: one thread instead of two, or two
                         instead of one
    on the dense model   the remedy where nothing was lost: the flips that it makes by itself

A remedy brings something back if more lost items come back with it than with another calibration sample.
Rows go to rows/ of --out one by one and the same command goes on, as in experiments.reproduce.
"""
import collections
import copy
import itertools
import time

import torch

import compress
import evaluate
import recover
from experiments.patterns import weights_on_cpu
from experiments.sweep import RowStore, check_shard, claim_rows, describe, of_shard
from methods.registry import COMPRESSORS, METHODS
from support.architectures import device_name, versions
from support.cli import UserError, parse_flags, run, say
from support.recipe import digest, recipe_of
from support.tables import markdown
from support.uncertainty import discordant, holm, mcnemar, paired_interval, wilson

# sample: seed of the calibration chunks, None for dense weights; other: with another number of threads;
# method: a remedy or None; seed: that of its training.
Model = collections.namedtuple("Model", "label sample other method seed", defaults=(None, False, None, None))
DENSE, COMPRESSED, SAMPLE = "dense", "compressed", "compressed, other calibration"


# --- 1. Which models, and measuring them --------------------------------------------------------------------

def plan(methods, seed):
    """Every model that is asked, in the order of the table. Models of one compression stand together."""
    on_dense = [Model(f"{name} on the dense model", method=name, seed=seed) for name in methods]
    recovered = [Model(f"{name}, seed {s}", seed, False, name, s)
                 for name in methods for s in (seed, seed + 1)]
    return [Model(DENSE), *on_dense, Model(COMPRESSED, seed), *recovered, Model(SAMPLE, seed + 1),
            Model("compressed, other threads", seed, True)]


class Flips(recover.Run):
    """The model, its dense weights on the CPU, and the store of rows."""

    def __init__(self, args, out):
        super().__init__(args)
        compress.refuse_compressed(self.model, args.model)
        self.store, known = RowStore(out), plan(args.method, args.seed)
        # threads of the CPU change nothing in a compression on a GPU
        self.plan = [model for model in known if not model.other or self.device.type == "cpu"]
        self.dense = weights_on_cpu(self.model)
        self.teacher = copy.deepcopy(self.model) if args.loss == "distill" else None
        free = ("method", "out", "given", "shard")         # which rows there are, not what is in them
        deciding = {key: value for key, value in vars(args).items() if key not in free}
        self.recipe = {**deciding, "train": digest(self.train_ids), "eval": digest(self.eval_ids),
                       "tasks": digest(self.tasks), "columns": self.columns, "base": recipe_of(self.model),
                       "machine": device_name(self.device)}

    def row(self, model):
        """A row that is there, or None."""
        return self.store.get(model.label, self.recipe)

    def measure_all(self):
        """Every missing row of this shard, one compression after the other."""
        missing = [model for model in of_shard(self.plan, self.args) if self.row(model) is None]
        for weights, models in itertools.groupby(missing, key=lambda model: (model.sample, model.other)):
            weight_bytes = self.set_weights(*weights)
            for model in models:
                say("row", model.label)
                self.measure_one(model, weight_bytes)

    def set_weights(self, sample, other):
        """Dense weights, or compressed ones. -> their bytes."""
        self.model.load_state_dict(self.dense)
        if sample is None:
            return evaluate.weight_bytes(self.model)
        args, (name, settings) = self.args, self.args.compression
        ids = compress.calibration_ids(self.train_ids, args.nsamples, args.seqlen, sample)
        threads = torch.get_num_threads()
        torch.set_num_threads((2 if threads == 1 else 1) if other else threads)
        report = compress.compress_model(self.model, self.tokenizer, name, ids, codes=False, **settings)
        torch.set_num_threads(threads)
        say("compression", compress.summary(report))
        return report["weight_bytes"]

    def measure_one(self, model, weight_bytes):
        """Train, if there is something to train, and measure."""
        args, method = self.args, None
        if model.method:
            entry = METHODS[model.method]
            lr = entry.rates["toy" if args.toy else "other"] if args.lr is None else args.lr
            method = entry.build(self.model, **entry.settings(args), seed=model.seed)
            recover.train(method, self.train_ids, args.steps, args.batch_size, args.train_seqlen, lr,
                          model.seed, args.accumulate, args.checkpointing, weight_decay=args.weight_decay,
                          teacher=self.teacher)
        self.measure(model.label, weight_bytes, method, device=device_name(self.device))
        self.store.put(model.label, self.recipe, self.rows[-1])


# --- 2. Counting --------------------------------------------------------------------------------------------

def answers(row):
    """Right or wrong, all tasks in a row. -> list of bool."""
    return [right for task in row["tasks"] for right in row["items"][task]["values"]]


def counts(dense, compressed, other):
    """Three lists of right or wrong on the same items. -> {"lost", "back", "kept", "newly_lost", "never",
    "gained"}.

    lost: right in dense, wrong in compressed; back: of these, right in the other. kept: right in both;
    newly_lost: of these, wrong in the other. never: wrong in both; gained: of these, right in the other.
    """
    groups = {key: [z for x, y, z in zip(dense, compressed, other) if (x, y) == pair] for key, pair in
              {"lost": (True, False), "kept": (True, True), "never": (False, False)}.items()}
    return {"lost": len(groups["lost"]), "back": sum(groups["lost"]), "kept": len(groups["kept"]),
            "newly_lost": len(groups["kept"]) - sum(groups["kept"]), "never": len(groups["never"]),
            "gained": sum(groups["never"])}


def lost_items(rows, label):
    """On the items that compression lost: right or wrong in another row. -> list of bool."""
    dense, compressed = answers(rows[DENSE]), answers(rows[COMPRESSED])
    return [z for x, y, z in zip(dense, compressed, answers(rows[label])) if x and not y]


def beyond_noise(rows, label):
    """Lost items that come back in a row, against the other calibration sample.

    -> {"difference", "ci95", "p"}: of the two shares; McNemar's exact test on the lost items.
    """
    base, new = lost_items(rows, SAMPLE), lost_items(rows, label)
    only_base, only_new = discordant(base, new)
    return {"difference": (only_new - only_base) / len(base), "ci95": list(paired_interval(base, new)),
            "p": mcnemar(base, new)}


def share(part, whole):
    """'12/40 30.0 % [18.1, 45.4]'."""
    if whole == 0:
        return "0/0"
    low, high = wilson(part, whole)
    return f"{part}/{whole} {100 * part / whole:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def tests_of(rows, models):
    """{label: test against the noise floor} of the remedies that are there, where anything was lost."""
    if not {DENSE, COMPRESSED, SAMPLE} <= rows.keys() or not lost_items(rows, SAMPLE):
        return {}
    return {model.label: beyond_noise(rows, model.label) for model in models
            if model.method and model.sample is not None and model.label in rows}


def table(rows, models):
    """The rows that are there. -> Markdown. Needs the dense and the compressed one."""
    tests, lines = tests_of(rows, models), []
    dense, compressed = answers(rows[DENSE]), answers(rows[COMPRESSED])
    adjusted = dict(zip(tests, holm([test["p"] for test in tests.values()])))
    for model in models:
        if model.label not in rows:
            continue
        row, mine = rows[model.label], answers(rows[model.label])
        count, (lost, gained) = counts(dense, compressed, mine), discordant(dense, mine)
        broken, mended = discordant(compressed, mine)
        test = tests.get(model.label)
        cell = "-" if test is None else (
            f"{100 * test['difference']:+.1f} [{100 * test['ci95'][0]:.1f}, {100 * test['ci95'][1]:.1f}], "
            f"p {test['p']:.2g} (Holm {adjusted[model.label]:.2g})")
        lines.append([model.label, f"{row['ppl']:.2f}", f"{100 * sum(mine) / len(mine):.1f}",
                      f"{lost} / {gained}", f"{broken} / {mended}, p {mcnemar(compressed, mine):.2g}",
                      share(count["back"], count["lost"]),
                      share(count["newly_lost"], count["kept"]),
                      share(count["gained"], count["never"]), cell])
    return markdown(["model", "ppl", "right %", "lost / gained against dense",
                     "lost / gained against compressed", "of the lost: come back",
                     "of the kept: newly lost", "of the never known: gained",
                     "come back, beyond another calibration sample, points"], lines)


def caption(job, rows):
    """What a reader needs to know. -> str."""
    args, some = job.args, next(iter(rows.values()))
    tasks = ", ".join(f"{name} {task['n']}" for name, task in some["tasks"].items())
    absent = [model.label for model in job.plan if model.label not in rows]
    words = (f"{args.model}, {describe(*args.compression)}; {some['device']}. Questions: {tasks}, taken "
             f"together; [95 % intervals]. Training: {args.steps} steps of {args.batch_size} x "
             f"{args.train_seqlen} tokens of {args.text}. Perplexity on {some['ppl_chunks']} chunks of "
             f"{some['ppl_seqlen']} tokens.")
    return words + (f" Not there yet: {'; '.join(absent)}." if absent else "")


# --- 3. The command -----------------------------------------------------------------------------------------

TAKES = [*(name for name in recover.TAKES if name not in ("merge", "resume")), "shard"]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    choices = {**recover.CHOICES, "method": [name for name, entry in METHODS.items() if entry.rates]}
    args = parse_flags(__doc__, TAKES, argv, choices, {"method": ["lora"]})
    args.merge = False
    recover.check_job(args)
    if not hasattr(args, "compression"):
        raise UserError(f"--model {args.model}: is compressed already; give the dense model, which can lose")
    if not COMPRESSORS[args.compressor].takes_H:
        raise UserError(f"--compressor {args.compressor}: reads no calibration text, so another sample is "
                        "the same model and no noise floor; use gptq or sparsegpt")
    if not args.tasks:
        raise UserError("--tasks: missing; name tasks or FILE.jsonl, whose answers can be lost")
    check_shard(args)
    return args


def main(argv=None):
    """Measure what is missing, then print the table of the rows that are there."""
    args, start = parse(argv), time.time()
    torch.manual_seed(args.seed)
    with claim_rows(args) as out:
        job = Flips(args, out)
        job.measure_all()
        rows = {model.label: row for model in job.plan if (row := job.row(model))}
        if not {DENSE, COMPRESSED} <= rows.keys():
            print("flips: the dense and the compressed row are not there yet")
            return
        text = f"{table(rows, job.plan)}\n\n{caption(job, rows)}\n"
        print(text)
        if out:
            kept = [{key: value for key, value in row.items() if key != "items"} for row in rows.values()]
            compared = {label: counts(answers(rows[DENSE]), answers(rows[COMPRESSED]), answers(row))
                        for label, row in rows.items()}
            out.text("flips.md", text)
            out.json("flips.json", {
                "command": evaluate.command_line(), "settings": vars(args), "recipe": job.recipe,
                "versions": versions(), "device": device_name(job.device),
                "seconds": round(time.time() - start, 1), "rows": kept, "counts": compared,
                "tests": tests_of(rows, job.plan)})


if __name__ == "__main__":
    run(main)
