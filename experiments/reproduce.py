"""Reproduce: a command for every table and figure of the paper.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867; tags such as [Tab. 1] mean its ICLR 2024
submission.

    python -m experiments.reproduce table1                # after GPTQ, 3 bits: every remedy at three sizes
    python -m experiments.reproduce table2 --out runs/paper     # the same after SparseGPT, 50 %
    python -m experiments.reproduce table3 --bits 2       # IDP's prompts: each alone, concatenated, chosen
    python -m experiments.reproduce all --out runs/paper  # and fig2 fig3 fig5 fig6 fig7, with PNG files
    python -m experiments.reproduce table1 --shard 2/5 --out runs/paper    # every fifth row, from the second
    python -m experiments.reproduce table1 --recipe paper --model huggyllama/llama-7b --out runs/7b

A row is written to rows/ of --out as soon as it is measured, under a digest of everything that decides it:
the same command goes on where it was cut off, and tables share their rows. With --shard i/n, n commands fill
one --out at the same time, on one machine or on n; each ends by writing the tables of the rows that are
there, so the last one leaves them whole. IDP's four rows [Tab. 3] come from one training, so --shard counts
them as one.

Without --recipe paper rates are each method's own, steps are --steps, and sizes go with the model's width
(experiments/reproduce_plan.py). With it all that §3.3 states is taken, wherever no flag says otherwise. On
the toy 3 bits hardly hurt: --bits 2 or --compressor magnitude give the remedies something to get back.
"""
import contextlib
import copy
import time

import torch

import compress
import evaluate
import recover
from experiments.fidelity import Reference
from experiments.patterns import weights_on_cpu
from experiments.reproduce_figures import DOMAINS, REPORTS, Line, summary
from experiments.reproduce_plan import (
    LORA_ON_ALL, OPEN, PAPER, PLANS, USED, WIDTH, Plan, own_settings, paper_recipe, parts_of)
from experiments.sweep import RowStore, check_shard, claim_rows, describe, of_shard
from methods.registry import COMPRESSORS, METHODS
from support.architectures import check_room, device_name, versions
from support.cli import flag_of, parse_flags, refuse_given, run, say
from support.data import check_text
from support.recipe import digest, recipe_of


# --- 1. Measuring rows --------------------------------------------------------------------------------------

class Reproduction(recover.Run):
    """The model, the entries that were asked for, and the store that keeps their rows."""

    def __init__(self, args, out):
        args.method = []                                   # what is built is in the plan, not in flags
        super().__init__(args)
        compress.refuse_compressed(self.model, args.model)
        self.plan, self.store, self.reference = Plan(args, self.model), RowStore(out), None
        self.columns = self.plan.columns()
        check_room(self.model, "--train-seqlen", args.train_seqlen, self.columns)
        check_room(self.model, "--eval-seqlen", args.eval_seqlen, self.columns)
        self.names = list(PLANS) if args.name == "all" else [args.name]
        self.entries = {name: PLANS[name](self.plan) for name in self.names}
        texts = {"train": self.train_ids, "eval": self.eval_ids, "tasks": self.tasks}
        self.texts = {key: digest(value) for key, value in texts.items()}
        self.base = {**recipe_of(self.model), "dtype": str(self.model.dtype), "columns": self.columns}

    def recipe(self, spec):
        """Everything that decides a row, and nothing else: so one dense row serves every rate and table.

        Not the machine: rows of one table may come from several, which its caption names.
        """
        flags, texts = ["eval_seqlen", "eval_context", "eval_chunks"], ["eval", "tasks"]
        if spec.compression:
            flags += ["nsamples", "seqlen", "seed"]
            texts += ["train"]
        trained = self.is_trained(spec)
        if trained:
            flags += ["steps", "batch_size", "train_seqlen", "accumulate", "weight_decay"]
            flags += ["loss"] * (self.args.loss != "text")         # as before there was another
        recipe = {"spec": spec, **self.base, **{key: self.texts[key] for key in texts},
                  **{flag: getattr(self.args, flag) for flag in flags}}
        return {**recipe, "lr": self.rate(spec.method)} if trained else recipe

    def is_trained(self, spec):
        """Is there something to train? Not for dense and compressed, and not for eora."""
        return spec.method is not None and METHODS[spec.method].rates is not None

    def rate(self, method):
        """The peak learning rate of a method: --lr, or its own, for LoRA on all linears a tenth of it."""
        own = METHODS[method].rates["toy" if self.args.toy else "other"]
        own *= LORA_ON_ALL if method == "lora" else 1
        return own if self.args.lr is None else self.args.lr

    def row(self, spec, part=None):
        """A row that is there, or None."""
        return self.store.get(part, self.recipe(spec))

    def models(self):
        """[(spec, label)] of every different model, in the order of the tables; IDP and its parts are one."""
        found = {}
        for entry in (entry for entries in self.entries.values() for entry in entries):
            for spec in entry.specs:
                seed = f", seed {spec.seed}" if len(entry.specs) > 1 else ""
                found.setdefault(digest(self.recipe(spec)), (spec, entry.label.split(":")[0] + seed))
        return list(found.values())

    def missing(self):
        """[(spec, label)] of this shard, of which some row is not there."""
        lacks = lambda spec: any(self.row(spec, part) is None for part in parts_of(spec))
        return [(spec, label) for spec, label in of_shard(self.models(), self.args) if lacks(spec)]

    def measure_all(self):
        """Every missing row, one compression after the other. With several, dense weights wait on the CPU."""
        args, missing, groups = self.args, self.missing(), {}
        for number, (spec, label) in enumerate(missing, 1):
            group = groups.setdefault(digest(spec.compression), [])
            group.append((spec, label, f"{number} of {len(missing)}"))
        if missing:
            self.reference = Reference(
                self.model, self.eval_ids, args.eval_seqlen, args.eval_context, args.eval_chunks)
        if args.loss == "distill" and any(self.is_trained(spec) for spec, _ in missing):
            self.teacher = copy.deepcopy(self.model)
        several = len(groups.keys() - {digest(None)}) > 1
        dense = weights_on_cpu(self.model) if several else None
        # the dense model first, as it is there
        for group in sorted(groups.values(), key=lambda group: group[0][0].compression is not None):
            size, report = self.set_weights([spec for spec, _, _ in group], dense)
            for spec, label, number in group:
                say("row", f"{number}: {label}")
                self.measure_one(spec, label, size, report)

    def set_weights(self, specs, dense):
        """The model as the compression of these specs leaves it. -> bytes of its weights, what its own row
        says of it. EoRA observes at the largest rank of the specs; the others are cut from that.
        """
        if specs[0].compression is None:
            return evaluate.weight_bytes(self.model), {}
        if dense:
            self.model.load_state_dict(dense)
        wanted = [spec.settings for spec in specs if spec.method == "eora"]
        largest = max(wanted, key=lambda settings: settings["r"], default=None)
        self.computed = {"eora": METHODS["eora"].build(self.model, **largest)} if largest else {}
        name, settings = specs[0].compression
        ids = compress.calibration_ids(self.train_ids, self.args.nsamples, self.args.seqlen, self.args.seed)
        report = compress.compress_model(self.model, self.tokenizer, name, ids, codes=False,
                                         observe=self.observe, **settings)
        say("compression", compress.summary(report))
        brief = {key: value for key, value in report.items() if key != "layers"}
        return report["weight_bytes"], {"compression": brief}

    def measure_one(self, spec, label, size, report):
        """Train what is to be trained, measure, keep. IDP's parts come before it."""
        if spec.method is None:
            return self.keep(spec, None, label, size, None, report)
        if not self.is_trained(spec):
            method = self.computed[spec.method].at_rank(spec.settings["r"])
            return self.keep(spec, None, label, size, method, {})
        args, lr = self.args, self.rate(spec.method)
        method = METHODS[spec.method].build(self.model, **spec.settings, seed=spec.seed)
        training = recover.train(
            method, self.train_ids, args.steps, args.batch_size, args.train_seqlen, lr, spec.seed,
            args.accumulate, args.checkpointing, weight_decay=args.weight_decay, teacher=self.teacher)
        parts = method.parts() if spec.method == "idp" else {}
        for part, one in {**parts, None: method}.items():
            self.keep(spec, part, label, size, one, {"training": {**training, "lr": lr}})

    def keep(self, spec, part, label, size, method, extra):
        """Measure one row, and its KL to the dense model and cosines with it; put it in the store, unless it
        is there.
        """
        if self.row(spec, part) is None:
            name = f"{label}: {part}" if part else label
            self.measure(name, size, method, device=device_name(self.device), **extra)
            with method.inference() if method else contextlib.nullcontext() as attached:
                self.rows[-1].update(self.reference.compare(self.model, attached))
            self.store.put(part, self.recipe(spec), self.rows[-1])

    def lines(self, name):
        """The lines of a table: each entry with those of its rows that are there, one a seed."""
        lines = []
        for entry in self.entries[name]:
            rows = [row for spec in entry.specs if (row := self.row(spec, entry.part))]
            if rows:
                lines.append(Line(entry.label, entry.specs[0], entry.part, rows))
        return lines

    def absent(self, name):
        """Labels of the entries of which a row is not there."""
        return [entry.label for entry in self.entries[name]
                if not all(self.row(spec, entry.part) for spec in entry.specs)]


# --- 2. Words beside the numbers ----------------------------------------------------------------------------

def sizes_in_words(job):
    """Which sizes the rows have, and why."""
    sizes, why = job.plan.sizes, "the paper's"
    if sizes != PAPER:
        why = ("where the paper has n tokens, the power of two nearest "
               f"n sqrt({job.plan.width} / {WIDTH}), for this model's width; ranks one less")
    each = zip(("prompts", "prefixes", "LoRA's ranks", "IDP"), sizes)
    return "Sizes: " + ", ".join(f"{name} {' '.join(map(str, some))}" for name, some in each) + f" ({why})."


def training_in_words(job):
    """How the rows were trained."""
    args = job.args
    rates = ", ".join(f"{name} {job.rate(name):g}" for name in ("lora", "prompt", "prefix", "idp"))
    seeds = f"seed {args.seed}" if args.seeds == 1 else f"{args.seeds} seeds from {args.seed}"
    loss = "" if args.loss == "text" else " Loss: KL divergence from the dense model (--loss distill)."
    return (f"Training: {args.steps} steps of {args.batch_size} x {args.train_seqlen} tokens of {args.text}, "
            f"AdamW at {rates}, weight decay {args.weight_decay:g}, {seeds}. LoRA on all linears of a block."
            + loss)


def recipe_in_words(job):
    """What was typed against the paper's recipe, and what that leaves open."""
    typed = [f"{flag_of(name)} {getattr(job.args, name)} instead of {value}"
             for name, value in paper_recipe(job.args).items() if name in job.args.given]
    return f"The paper's recipe [§3.3]{', but ' * bool(typed)}{', '.join(typed)}. {OPEN}"


def caption(job, name, lines, absent):
    """What a reader needs to know. -> list of str."""
    first = lines[0].rows[0]
    compression = next((line.spec.compression for line in lines if line.spec.compression), None)
    how = describe(*compression) if compression and name != "fig2" else "several compressions"
    devices = sorted({row["device"] for line in lines for row in line.rows})
    counts = ", ".join(f"{task} {scores['n']}" for task, scores in first["tasks"].items())
    chunks = (f"Perplexity on {first['ppl_chunks']} chunks of {first['ppl_seqlen']} tokens, the first "
              f"{first['ppl_context']} of each read and not scored; KL on {first['kl_chunks']} of them")
    trained = [sizes_in_words(job), training_in_words(job)] if name != "fig2" else []
    trained += [recipe_in_words(job)] if job.args.recipe else []
    if any(line.spec.method == "eora" for line in lines):
        trained += ["EoRA, on the same layers, is computed from the error of each, and not trained."]
    missing = [f"Not there yet: {'; '.join(absent)}."] if absent else []
    return [f"{job.args.model}, {how}; {'; '.join(devices)}.", *trained,
            f"{chunks}. Questions: {counts or 'none'}.", *missing]


def report(job, out, name, start):
    """The table or figure, of the rows that are there. -> its text."""
    while True:
        absent = job.absent(name)                          # first: a row that comes next is noticed below
        lines = job.lines(name)
        if not lines:
            return f"{name}: no row is there yet"
        words = caption(job, name, lines, absent)
        make_text, make_figure = REPORTS[name]
        text = "\n\n".join([f"# {name}", make_text(lines), *words]) + "\n"
        if out:
            out.text(f"{name}.md", text)
            out.json(f"{name}.json", {
                "command": evaluate.command_line(), "settings": vars(job.args), "recipe": job.base,
                "versions": versions(), "device": device_name(job.device),
                "seconds": round(time.time() - start, 1), "caption": words, "rows": summary(lines)})
            if make_figure and not absent:
                out.figure(f"{name}.png", make_figure(lines, f"{name}: {words[0]}"))
        if job.absent(name) == absent:                     # else another shard has added rows meanwhile
            return text


# --- 3. The command -----------------------------------------------------------------------------------------

NINE = ",".join(task for tasks in DOMAINS.values() for task in tasks)                          # [§3.3]
UNTRAINED = ("compressor", "bits", "sparsity", "layers", "scores", "alpha", "seeds", "recipe",
             *recover.TRAINING_FLAGS)
IGNORED = {"fig2": UNTRAINED, "fig3": ("layers", "scores", "alpha"), "table3": ("alpha",), "fig7": ("alpha",),
           "all": ("compressor",)}
OTHERS = ("method", "resume", "pattern", *recover.METHOD_FLAGS)                # recover.py's alone
TAKES = [*(name for name in recover.TAKES if name not in OTHERS),
         "layers", "scores", "alpha", "seeds", "recipe", "shard"]


def parse(argv=None):
    """The command line: a table or figure, and flags. -> argparse.Namespace; raises UserError."""
    choices = {name: recover.CHOICES[name] for name in ("compressor", "layers", "scores", "loss")}
    choices["recipe"], defaults = ["paper"], {"seeds": 1, "alpha": None}
    which = lambda parser: parser.add_argument("name", choices=[*PLANS, "all"], help="which table or figure")
    args = parse_flags(__doc__, TAKES, argv, choices, defaults, add=which)
    args.given.remove("name")
    refuse_given(args, IGNORED.get(args.name, ()), f"{args.name} takes no such flag; leave it out")
    check_shard(args)
    fill_in(args)
    check_compression(args)
    recover.fill_evaluation(args)
    for flag, name in (("--text", args.text), ("--eval-text", args.eval_text)):
        check_text(name, flag)
    recover.check_training(range(args.train_seqlen), args.batch_size, args.train_seqlen, args.accumulate)
    return args


def fill_in(args):
    """What was not typed: the tables' own compression, the nine tasks, the paper's recipe [§3.3]."""
    if "compressor" not in args.given:
        args.compressor = None
        args.sparsity = args.sparsity if "sparsity" in args.given else 0.5
    if "tasks" not in args.given and not args.toy:
        args.tasks = NINE
    for name, value in paper_recipe(args).items() if args.recipe else ():
        if name not in args.given:
            setattr(args, name, value)


def check_compression(args):
    """Refuse settings that no compressor of the table has."""
    used = USED["fig2"] if args.name == "all" else USED.get(args.name, ("gptq",))
    used = (args.compressor,) if args.compressor else used
    taken = {key for name in used for key in COMPRESSORS[name].settings}
    refuse_given(args, set(compress.COMPRESSION_FLAGS) - {"compressor", "nsamples", "seqlen"} - taken,
                 f"{' and '.join(used)} has no such setting; leave it out, or use another --compressor")
    args.compression = own_settings(args, used[0])         # Run checks it on the model, before it reads text


def main(argv=None):
    """Measure what is missing, then write every table that was asked for."""
    args, start = parse(argv), time.time()
    torch.manual_seed(args.seed)
    with claim_rows(args) as out:
        job = Reproduction(args, out)
        if args.recipe:
            say("recipe", f"{recipe_in_words(job)} {sizes_in_words(job)} {training_in_words(job)}")
        job.measure_all()
        for name in job.names:
            print(report(job, out, name, start))


if __name__ == "__main__":
    run(main)
