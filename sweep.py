"""Sweeps: the main job many times over, one table each.

    python sweep.py rates                    # every method at several learning rates: where LEARNING_RATES comes from
    python sweep.py sizes --out runs/sizes   # quality against trainable parameters, with a figure
    python sweep.py compressors              # every compressor at several settings, no recovery

Flags are recover.py's: --model, --text, --tasks, --limit, --steps, --seed and so on. All rows of a table share the model,
the calibration tokens, the training tokens in their order, and the test items, so that they compare pair by pair
(evaluate.py --compare). With --out: results.json, results.md, items.json, written after every row, and sizes.png. A sweep
that was cut off, or that should get more rows, goes on with --resume.
"""
import json
import math
import pathlib
import time

import torch

import compress
import evaluate
import loading
import recover
from loading import UserError
from methods import METHODS

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = {  # method -> (flag of recover.py, its values): what makes the method larger
    "prompt": ("prompt_length", (1, 4, 16, 64)),
    "prefix": ("prompt_length", (1, 4, 16, 64)),
    "idp": ("prompt_lengths", ([1] * 4, [4] * 4, [16] * 4)),
    "lora": ("rank", (1, 2, 4, 8, 16)),
}
COMPRESSIONS = (  # (compressor, settings)
    [(name, dict(bits=bits, group_size=group, act_order=act_order)) for bits in (4, 3, 2) for group in (64, 128, -1)
     for name, act_order in (("rtn", False), ("gptq", False), ("gptq", True))]
    + [(name, dict(bits=bits, group_size=64, mse=True)) for bits in (3, 2) for name in ("rtn", "gptq")]
    + [(name, dict(sparsity=sparsity)) for sparsity in (0.3, 0.5, 0.7) for name in ("magnitude", "sparsegpt")]
    + [(name, dict(pattern="2:4")) for name in ("magnitude", "sparsegpt")])


class Sweep(recover.Run):
    """A run whose rows are on disk as soon as they are measured; with --resume, those are not measured again."""

    def __init__(self, args):
        self.settings, self.out, args.out = {**vars(args)}, args.out, None     # no checkpoint of the training: a row is short
        self.command, self.seconds, kept = evaluate.command_line(), 0, []
        if args.resume:
            kept, command, self.seconds = earlier_part(self.settings)
            self.command = " && ".join(filter(None, [command, self.command]))
        super().__init__(args)
        self.rows += kept

    def has(self, name):
        """Is that row there already?"""
        return any(row["row"] == name for row in self.rows)

    def measure(self, name, *args, **kwargs):
        """One row more, and all of them on disk."""
        if not self.has(name):
            super().measure(name, *args, **kwargs)
            if self.out:
                evaluate.write_results(self.out, self.command, self.settings, self.device, self.seconds + time.time() - self.start,
                                       self.rows)

    def recover(self, name, weight_bytes, row):
        """Train and measure, unless that row is there."""
        if not self.has(row):
            super().recover(name, weight_bytes, row)


FREE = {"method", "only", "rates", "resume", "out", "compression"}     # settings that may differ between the parts of one table


def earlier_part(settings):
    """What an earlier part of this sweep left in --out. -> its rows, command and seconds; raises UserError if it is another sweep."""
    out = pathlib.Path(settings["out"])
    if not (out / "results.json").exists():
        return [], None, 0
    if not (out / "items.json").exists():
        raise UserError(f"--resume: {out} has lost its items.json; use a new --out")
    before, items = (json.loads((out / name).read_text()) for name in ("results.json", "items.json"))
    now = {**json.loads(json.dumps(settings)), "machine": loading.device_name(loading.pick_device(settings["device"]))}
    then = {**before["settings"], "machine": before["device"]}
    for name in sorted(now.keys() & then.keys() - FREE):
        if now[name] != then[name]:
            raise UserError(f"--resume: in {out}, {name} is {then[name]}, here {now[name]}; use the same flags or a new --out")
    return [{**row, "items": items[row["row"]]} for row in before["rows"]], before["command"], before["seconds"]


def compressed(run):
    """Compress as the flags say and append that row. -> bytes of the compressed weights."""
    report = run.compress()
    run.measure("compressed", report["weight_bytes"])
    return report["weight_bytes"]


def rates(run):
    """Every method at every rate. NOT IN PAPER: how the authors chose theirs."""
    weight_bytes = compressed(run)
    for name in run.args.method:
        for run.args.lr in run.args.rates:
            run.recover(name, weight_bytes, f"{name}, lr {run.args.lr:g}")


def sizes(run):
    """Every method at several sizes, each at the learning rate of its method."""
    weight_bytes = compressed(run)
    for name in run.args.method:
        flag, values = SIZES[name]
        before = getattr(run.args, flag)
        for value in values:
            setattr(run.args, flag, value)
            run.recover(name, weight_bytes, f"{name}, {flag.replace('_', ' ')} {value}")
        setattr(run.args, flag, before)


def compressors(run):
    """Every entry of COMPRESSIONS, each from the dense weights."""
    chosen = [entry for entry in COMPRESSIONS if any(text in describe(*entry) for text in run.args.only)]
    run.measure("dense", evaluate.weight_bytes(run.model))
    dense = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    ids = compress.calibration_ids(run.train_ids, run.args.nsamples, run.args.seqlen, run.args.seed)
    for name, settings in chosen:
        if run.has(describe(name, settings)):
            continue
        run.model.load_state_dict(dense)
        report = compress.compress_model(run.model, run.tokenizer, name, ids, **settings)
        report.pop("layers")
        run.measure(describe(name, settings), report["weight_bytes"], compression=report)


def describe(name, settings):
    """('gptq', ...) -> 'gptq 3 bits, group 64, act-order'."""
    parts = []
    if "sparsity" in settings or "pattern" in settings:
        parts.append(settings.get("pattern") or f"{100 * settings['sparsity']:.0f} %")
    if "bits" in settings:
        parts.append(f"{settings['bits']} bits, group {'row' if settings['group_size'] == -1 else settings['group_size']}")
    return f"{name} " + ", ".join(parts + [word for key, word in (("act_order", "act-order"), ("mse", "mse")) if settings.get(key)])


SWEEPS = {"rates": rates, "sizes": sizes, "compressors": compressors}


def compression_table(rows):
    """What format_table leaves out: bits, error and seconds of each compression. -> Markdown."""
    lines = ["| compression | bits per weight | relative output error | seconds |", "|---|---|---|---|"]
    for row in rows:
        if "compression" in row:
            report = row["compression"]
            lines.append(f"| {row['row']} | {report['bits_per_weight']:.2f} | {report['mean_error']:.3f} | {report['seconds']:.1f} |")
    return "\n".join(lines)


def figure(rows, path, title):
    """Quality against trainable parameters, a line per method: the first task's accuracy, and perplexity."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    task = next(iter(rows[0]["tasks"]), None)
    panels = ([(f"accuracy on {task}, %", lambda row: 100 * row["tasks"][task]["acc"], lambda row: [100 * x for x in row["tasks"][task]["ci95"]])]
              if task else []) + [("perplexity", lambda row: row["ppl"], lambda row: row["ppl_ci95"])]
    fig, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for ax, (label, value, interval) in zip(axes[0], panels):
        for (method, _), marker, style in zip(SIZES.items(), "os^D", ("-", "--", ":", "-.")):
            points = [row for row in rows if row["row"].startswith(method + ",")]
            if points:
                bars = [[value(row) - interval(row)[0] for row in points], [interval(row)[1] - value(row) for row in points]]
                ax.errorbar([row["trainable_params"] for row in points], [value(row) for row in points], yerr=bars,
                            marker=marker, linestyle=style, capsize=3, label=method)
        for row, style in ((rows[0], (0, (1, 1))), (rows[1], (0, (5, 1)))):
            ax.axhline(value(row), color="0.4", linestyle=style, linewidth=1)
            ax.text(1, value(row), row["row"], fontsize=9, color="0.3", va="bottom", transform=ax.get_yaxis_transform(), ha="right")
        ax.set(xscale="log", xlabel="trainable parameters (log scale)", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def parse(argv=None):
    """The command line: the name of a sweep, and recover.py's flags. -> argparse.Namespace; raises UserError."""
    parser = recover.build_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("sweep", choices=sorted(SWEEPS), help="which table")
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[""],
                        help="compressors: rows whose name contains one of these, separated by ';', as in 'group 64;50 %%'")
    parser.add_argument("--rates", type=rates_flag, default=list(RATES), help="rates: peak learning rates, comma-separated")
    parser.set_defaults(method=list(METHODS))
    args = recover.parse(argv, parser)
    if not all(0 < rate < math.inf for rate in args.rates):
        raise UserError(f"--rates {','.join(map(str, args.rates))}: each must be above 0; use for example 0.01,0.1")
    if args.out:
        loading.check_out(args.out, "results.json")
        if not args.resume and pathlib.Path(args.out, "results.json").exists():
            raise UserError(f"--out {args.out}: holds rows already; go on with --resume, or use a new folder")
    return args


def rates_flag(text):
    """'0.01,0.1' -> [0.01, 0.1], for argparse."""
    return [float(part) for part in text.split(",")]


def main(argv=None):
    """One sweep, one table."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    run = Sweep(args)
    SWEEPS[args.sweep](run)
    print(evaluate.format_table(run.rows))
    if args.sweep == "compressors":
        print("\n" + compression_table(run.rows))
    if run.out and args.sweep == "sizes":
        title = f"{args.model}, {describe(*args.compression)}, {args.steps} steps of {args.batch_size} x {args.train_seqlen} tokens, 95 % intervals"
        figure(run.rows, f"{run.out}/sizes.png", title)


if __name__ == "__main__":
    loading.run(main)
