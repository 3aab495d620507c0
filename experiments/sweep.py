"""Sweeps: the main job many times over, one table each.

    python -m experiments.sweep rates                      # every trained method at several learning rates
    python -m experiments.sweep sizes --out runs/sizes     # quality against trainable parameters, a figure
    python -m experiments.sweep compressors                # every compressor at several settings, no recovery

Flags are recover.py's: --model, --text, --tasks, --limit, --steps, --seed and so on. All rows of a table
share the model, the calibration tokens, the training tokens in their order, and the test items, so that they
compare pair by pair (evaluate.py --compare). With --out: a row is written as soon as it is measured, under a
digest of everything that decides it; the same command goes on where it was cut off, and no row of other
settings can slip in. At the end: results.json, results.md, items.json, and sizes.png. The rates of
methods/registry.py come from `rates`.
"""
import math
import time

import torch

import compress
import evaluate
import recover
from experiments.style import pyplot, styles
from methods.registry import METHODS
from support.architectures import device_name
from support.cli import Kept, UserError, parse_flags, refuse_given, run
from support.files import OBJECT, read_fields
from support.output import claim
from support.recipe import digest, recipe_of
from support.tables import markdown
from support.uncertainty import FEW

COMPRESSIONS = (  # (compressor, settings)
    [(name, dict(bits=bits, group_size=group, act_order=act_order))
     for bits in (4, 3, 2) for group in (64, 128, -1)
     for name, act_order in (("rtn", False), ("gptq", False), ("gptq", True))]
    + [(name, dict(bits=bits, group_size=64, mse=True)) for bits in (3, 2) for name in ("rtn", "gptq")]
    + [(name, dict(sparsity=sparsity)) for sparsity in (0.3, 0.5, 0.7) for name in ("magnitude", "sparsegpt")]
    + [(name, dict(pattern="2:4")) for name in ("magnitude", "sparsegpt")])


class RowStore:
    """Rows by a digest of everything that decides them: in memory, and at once in rows/ of --out."""

    def __init__(self, out):
        self.out, self.memory = out, {}

    def file(self, name, recipe):
        """Where a row lies: rows/DIGEST.json. name, recipe: anything JSON can hold."""
        return f"rows/{digest([name, recipe])}.json"

    def get(self, name, recipe):
        """A row that this run, or an earlier one, or one beside it measured. -> dict, or None."""
        file = self.file(name, recipe)
        path = self.out and self.out.path / file
        if file not in self.memory and path and path.exists():
            self.memory[file] = read_fields(path, "--out")("row", OBJECT)
        return self.memory.get(file)

    def put(self, name, recipe, row):
        """Keep a row, on disk at once."""
        file = self.file(name, recipe)
        self.memory[file] = row
        if self.out:
            self.out.json(file, {"recipe": recipe, "row": row})
            Kept.words = f"the rows so far are in {self.out.path}; the same command goes on with them"


def check_shard(args):
    """Raise UserError for a --shard without the folder that all shards share."""
    if args.shard and args.out is None:
        raise UserError(f"--shard {args.shard}: needs --out DIR, which all shards share")


def of_shard(some, args):
    """What of a list this run is to measure: every N-th from the I-th on; all of it without --shard."""
    i, n = map(int, (args.shard or "1/1").split("/"))
    return some[i - 1::n]


def claim_rows(args):
    """--out as a folder of rows, which all shards hold at once. -> what support.output.claim gives."""
    return claim(args.out, rows=True, part="" if args.shard is None else args.shard.replace("/", "-of-"))


class Sweep(recover.Run):
    """A run whose rows are on disk as soon as they are measured, and are measured once."""

    def __init__(self, args, out):
        super().__init__(args)                 # without out: a row is short, its training needs no checkpoint
        self.store = RowStore(out)
        deciding = {key: value for key, value in vars(args).items() if key not in FREE}
        if args.loss == "text":                            # rows keep the digests of before there was another
            del deciding["loss"]
        self.recipe = {**deciding, "train": digest(self.train_ids), "eval": digest(self.eval_ids),
                       "tasks": digest(self.tasks), "columns": self.columns,
                       "machine": device_name(self.device), "base": recipe_of(self.model)}

    def stored(self, name):
        """Take a row that an earlier part of this sweep measured. -> was it there?"""
        row = self.store.get(name, self.recipe)
        if row:
            self.rows.append(row)
        return row is not None

    def measure(self, name, *args, **kwargs):
        """One row more, on disk at once."""
        if not self.stored(name):
            super().measure(name, *args, **kwargs)
            self.store.put(name, self.recipe, self.rows[-1])

    def recover(self, name, weight_bytes, row):
        """Train and measure, unless that row is there."""
        row = self.label(name, row)
        if not self.stored(row):
            super().recover(name, weight_bytes, row)


FREE = ("method", "only", "rates", "out", "given")         # which rows there are, not what is in them


def compressed(job):
    """Compress as the flags say and append that row. -> bytes of the compressed weights."""
    report = job.compress()
    job.measure("compressed", report["weight_bytes"])
    return report["weight_bytes"]


def rates(job):
    """Every method at every rate. NOT IN PAPER: how the authors chose theirs."""
    weight_bytes = compressed(job)
    for name in job.args.method:
        if name in job.computed:                           # nothing is trained: a row to compare with
            job.recover(name, weight_bytes, name)
            continue
        for job.args.lr in job.args.rates:
            job.recover(name, weight_bytes, f"{name}, lr {job.args.lr:g}")


def sizes(job):
    """Every method at several sizes, each at the learning rate of its method."""
    weight_bytes = compressed(job)
    for name in job.args.method:
        if METHODS[name].sizes is None:                    # a remedy of one size
            job.recover(name, weight_bytes, name)
            continue
        flag, values = METHODS[name].sizes
        before = getattr(job.args, flag)
        for value in values:
            setattr(job.args, flag, value)
            job.recover(name, weight_bytes, f"{name}, {flag.replace('_', ' ')} {value}")
        setattr(job.args, flag, before)


def compressors(job):
    """Every entry of COMPRESSIONS, each from the dense weights, which are kept on the CPU."""
    wanted = [""] if job.args.only is None else job.args.only.split(";")
    chosen = [entry for entry in COMPRESSIONS if any(text in describe(*entry) for text in wanted)]
    if not chosen:
        raise UserError(f"--only {job.args.only}: names no row; use for example 'group 64;50 %'")
    job.measure("dense", evaluate.weight_bytes(job.model))
    dense = {name: tensor.cpu().clone() for name, tensor in job.model.state_dict().items()}
    ids = compress.calibration_ids(job.train_ids, job.args.nsamples, job.args.seqlen, job.args.seed)
    for name, settings in chosen:
        if job.stored(describe(name, settings)):
            continue
        job.model.load_state_dict(dense)
        report = dict(compress.compress_model(job.model, job.tokenizer, name, ids, **settings))
        report.pop("layers")
        job.measure(describe(name, settings), report["weight_bytes"], compression=report)


def describe(name, settings):
    """('gptq', ...) -> 'gptq 3 bits, group 64, act-order'."""
    parts = []
    if "sparsity" in settings or "pattern" in settings:
        parts.append(settings.get("pattern") or f"{100 * settings['sparsity']:.0f} %")
    if "bits" in settings:
        group = settings["group_size"]
        parts.append(f"{settings['bits']} bits, group {'row' if group == -1 else group}")
    parts += [key.replace("_", "-") for key in ("act_order", "mse") if settings.get(key)]
    return f"{name} " + ", ".join(parts)


SWEEPS = {"rates": rates, "sizes": sizes, "compressors": compressors}


def compression_table(rows):
    """What format_table leaves out: bits, error and seconds of each compression. -> Markdown."""
    lines = []
    for row in rows:
        if "compression" in row:
            report = row["compression"]
            lines.append([row["row"], f"{report['bits_per_weight']:.2f}", f"{report['mean_error']:.3f}",
                          f"{report['seconds']:.1f}"])
    return markdown(["compression", "bits per weight", "relative output error", "seconds"], lines)


def perplexity_interval(row):
    """[low, high], or None from too few chunks."""
    return row["ppl_ci95"] if row["ppl_chunks"] >= FEW else None


def bar(value, interval):
    """Lengths of a point's error bar below and above; nan, which draws nothing, without an interval."""
    if interval is None:
        return math.nan, math.nan
    return max(0, value - interval[0]), max(0, interval[1] - value)


def figure(rows, title):
    """Quality against trainable parameters, a line per method: the first task's accuracy, and perplexity."""
    plt = pyplot()
    task = next(iter(rows[0]["tasks"]), None)
    panels = [("perplexity", lambda row: row["ppl"], perplexity_interval)]
    if task:
        panels.insert(0, (f"accuracy on {task}, %", lambda row: 100 * row["tasks"][task]["acc"],
                          lambda row: [100 * x for x in row["tasks"][task]["ci95"]]))
    fig, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for ax, (label, value, interval) in zip(axes[0], panels):
        for method, (color, style, marker) in zip(METHODS, styles(METHODS)):
            points = [row for row in rows if row["row"].startswith(method + ",")]
            if points:
                bars = list(zip(*(bar(value(row), interval(row)) for row in points)))          # (2, points)
                ax.errorbar([row["trainable_params"] for row in points], [value(row) for row in points],
                            yerr=bars, color=color, marker=marker, linestyle=style, capsize=3, label=method)
        for row, style in ((rows[0], (0, (1, 1))), (rows[1], (0, (5, 1)))):
            ax.axhline(value(row), color="0.4", linestyle=style, linewidth=1)
            ax.text(1, value(row), row["row"], fontsize=9, color="0.3", va="bottom", ha="right",
                    transform=ax.get_yaxis_transform())
        ax.set(xscale="log", xlabel="trainable parameters (log scale)", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    plt.close(fig)
    return fig


TAKES = {  # sweep -> the flags that it would ignore
    "rates": ("lr", "only"), "sizes": ("only", "rates"),
    "compressors": ("method", "rates", *recover.METHOD_FLAGS, *recover.TRAINING_FLAGS,
                    *compress.COMPRESSION_FLAGS[:-2])}


def parse(argv=None):
    """The command line: the name of a sweep, and recover.py's flags. -> argparse.Namespace."""
    names = [name for name in recover.TAKES if name not in ("merge", "resume")] + ["only", "rates"]
    add = lambda parser: parser.add_argument("sweep", choices=sorted(SWEEPS), help="which table")
    trained = [name for name, entry in METHODS.items() if entry.rates]
    args = parse_flags(__doc__, names, argv, recover.CHOICES, {"method": trained}, add=add)
    args.given.remove("sweep")
    args.merge = args.resume = False
    refuse_given(args, TAKES[args.sweep], f"the sweep {args.sweep} takes no such flag; leave it out")
    recover.check_job(args)
    if args.sweep == "compressors" and not hasattr(args, "compression"):
        raise UserError(f"--model {args.model}: is compressed already, and this sweep starts from a dense "
                        "model; give that")
    return args


def main(argv=None):
    """One sweep, one table."""
    args, start = parse(argv), time.time()
    torch.manual_seed(args.seed)
    with claim(args.out, rows=True) as out:
        job = Sweep(args, out)
        SWEEPS[args.sweep](job)
        print(evaluate.format_table(job.rows))
        if args.sweep == "compressors":
            print("\n" + compression_table(job.rows))
        if out:
            files = evaluate.result_files(vars(args), job.device, start, job.rows, job.recipe)
            for file, text in files.items():
                out.text(file, text)
        if out and args.sweep == "sizes":
            how = describe(*args.compression) if hasattr(args, "compression") else "compressed"
            title = (f"{args.model}, {how}, {args.steps} steps of {args.batch_size} x {args.train_seqlen} "
                     "tokens, 95 % intervals")
            out.figure("sizes.png", figure(job.rows, title))


if __name__ == "__main__":
    run(main)
