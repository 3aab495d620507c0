"""Recover: the main job. Compress a language model, then get its knowledge back; print one table.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867. The base model stays frozen; what is trained
is small:

    prompt   one soft prompt of n tokens in front of the input            (Lester et al. 2021)
    prefix   trained keys and values in every layer           (Li and Liang 2021; the paper's second baseline)
    idp      m soft prompts, learnt apart; each input chooses one; with each alone, and concatenated [Tab. 3]
    lora     W + (alpha / r) B A on some linear layers                    (Hu et al. 2021)
    eora     the same, computed from the weights' error and not trained   (EoRA, arXiv 2410.21271)

    python recover.py --method idp                                 # toy model, CPU, no network, a minute
    python recover.py --method prompt,prefix,idp,lora --out runs/toy   # several in one table
    python recover.py --method lora --model facebook/opt-125m --compressor gptq --bits 3 --out runs/lora
    python recover.py --method prompt --model runs/compressed            # a folder that compress.py wrote
    python recover.py --method lora,prompt --loss distill    # learn the dense model's guesses, not the text

Writes, with --out DIR: adapter/ in PEFT's layout (adapter/METHOD/ when there are several), results.json,
results.md, items.json. All methods see the same training tokens in the same order. Letters: B batch, T
tokens, m prompts.
"""
import contextlib
import copy
import functools
import math
import os
import pathlib
import time

import torch
import torch.nn as nn

import compress
import evaluate
from idp_minimal import SELECTORS
from methods.lora import LoRALinear                        # noqa: F401, courses take LoRALinear from here
from methods.recompute import checkpointed_blocks
from methods.registry import METHODS, load_adapter         # noqa: F401
from methods.rounding import Grid
from support import packing
from support.architectures import check_room, pick_device, weight_of
from support.checkpoint import Checkpoint, put_back
from support.cli import UserError, fill_in, flag_of, parse_flags, refuse_given, run, say
from support.data import check_text, load_tasks, load_text
from support.models import load_model
from support.output import claim
from support.progress import progress
from support.recipe import digest, recipe_of


# --- 1. One training loop for all ---------------------------------------------------------------------------

def batch_at(ids, step, batch_size, seqlen, seed):
    """Random chunks, a pure function of (seed, step). ids (tokens,) -> (batch_size, seqlen) long."""
    return compress.calibration_ids(ids, batch_size, seqlen, seed * 1_000_003 + step)          # (B, T)


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over a tenth of the steps, then linear decay to 0. NOT IN PAPER: the schedule."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def snapshot(method):
    """A copy of the trainables."""
    return {name: tensor.detach().clone() for name, tensor in method.tensors().items()}


def train(method, ids, steps, batch_size, seqlen, lr, seed=0, accumulate=1, checkpointing=False, saved=None,
          save_every=50, resume=False, quiet=False, sample=batch_at, weight_decay=0.0, teacher=None):
    """AdamW on the method's trainables [§3.3]. ids: (tokens,) long on the CPU. Returns {"loss", "seconds",
    "tokens"}.

    sample: where a step's rows come from, a function like batch_at. saved: a Checkpoint, written every
    `save_every` steps. teacher: the dense model, another object than the method's; the loss is then the KL
    divergence from its next-token distributions, on the same tokens.

    Raises UserError when the text is too short, the batch does not divide, or the loss stops being a number
    (the trainables then hold the last good state).
    """
    groups, device = method.groups(), method.model.device
    check_training(ids, batch_size, seqlen, accumulate)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=lr, weight_decay=weight_decay)
    first, loss = saved.restore(method, optimizer) if saved and resume else (0, None)
    good, start = snapshot(method), time.time()
    with method.training(), checkpointed_blocks(method.model, checkpointing):
        bar = progress(range(first, steps), initial=first, total=steps, desc="train", disable=quiet)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            # without non_blocking each step would wait for the one before
            rows = sample(ids, step, batch_size, seqlen, seed).to(device, non_blocking=device.type == "cuda")
            total = one_step(method, optimizer, rows, accumulate, teacher)
            if step % 10 == 9 or step == steps - 1:    # reading the loss waits for the GPU: not at every step
                loss = read_loss(method, total, good, lr, step)
                good = snapshot(method)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if saved and ((step + 1) % save_every == 0 or step == steps - 1):
                saved.save(method, optimizer, step + 1, loss)
    return {"loss": loss, "seconds": time.time() - start, "tokens": steps * batch_size * seqlen}


def one_step(method, optimizer, rows, accumulate, teacher=None):
    """One AdamW step on a batch. rows (B, T) -> its mean loss, a tensor still on the device."""
    groups, total, learnt_from = method.groups(), 0, {"teacher": teacher} if teacher else {}
    for part in rows.chunk(accumulate):
        losses = method.losses(part, **learnt_from)        # one a row, or with m prompts one a row and prompt
        # each of the len(groups) prompts gets the mean over its own losses
        (losses.mean() * len(groups) / accumulate).backward()
        total = total + losses.detach().mean() / accumulate
    for group in groups:
        nn.utils.clip_grad_norm_(group, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def read_loss(method, total, good, lr, step):
    """The loss, a tensor, as a float. One read from the device in all.

    Raises UserError when it or a trainable is no number any more; the trainables go back to the last good
    state.
    """
    finite = torch.stack([t.isfinite().all() for t in method.tensors().values()]).all()
    loss, finite = torch.stack([total, finite.to(total)]).tolist()
    if not math.isfinite(loss) or not finite:
        put_back(method, good)
        raise UserError(f"--lr {lr}: the loss stopped being a number near step {step + 1}; use a smaller one")
    return loss


def check_training(ids, batch_size, seqlen, accumulate):
    """Refuse what cannot train, before the first step."""
    if len(ids) < seqlen:
        raise UserError(f"--text: has {len(ids)} tokens, fewer than one row of --train-seqlen {seqlen}; give "
                        "more text")
    if batch_size % accumulate:
        best = accumulate * max(1, batch_size // accumulate)
        raise UserError(f"--batch-size {batch_size}: must be a multiple of --accumulate {accumulate}; use "
                        f"{best}")


# --- 2. The command -----------------------------------------------------------------------------------------

METHOD_FLAGS = tuple(dict.fromkeys(flag for entry in METHODS.values() for flag in entry.flags))
TRAINING_FLAGS = ("loss", "steps", "batch_size", "train_seqlen", "lr", "weight_decay", "accumulate",
                  "checkpointing")
TAKES = ["model", "device", "dtype", "seed", "text", *compress.COMPRESSION_FLAGS, "method", *METHOD_FLAGS,
         *TRAINING_FLAGS, "resume",
         "tasks", "limit", "eval_text", "eval_seqlen", "eval_context", "eval_chunks", "out"]
CHOICES = {"compressor": compress.COMPRESSORS, "method": METHODS,
           "selector": sorted(set(SELECTORS) - {"oracle"}), "layers": ["every", "first"],
           "scores": ["logits", "probabilities"], "loss": ["text", "distill"]}


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    args = parse_flags(__doc__, TAKES, argv, CHOICES)
    if args.resume and args.out is None:
        raise UserError("--resume: needs --out DIR of the run to go on with")
    check_job(args)
    return args


def check_job(args):
    """What every training job has in common: fill in what was left open, refuse what cannot be."""
    fill_evaluation(args)
    if os.path.isfile(pathlib.Path(args.model, "compression.json")):
        refuse_given(args, set(compress.COMPRESSION_FLAGS),
                     f"{args.model} is compressed already, and its own recipe counts; leave it out")
        refuse_without_dense(args)
    else:
        args.compression = compress.settings_from(args)    # raises UserError
    taken = {flag for name in args.method for flag in METHODS[name].flags}
    refuse_given(args, set(METHOD_FLAGS) - taken,
                 f"--method {','.join(args.method)} has no such setting; leave it out")
    if untrained(args) == args.method:
        refuse_given(args, set(TRAINING_FLAGS) - {"train_seqlen"},
                     f"--method {','.join(args.method)} trains nothing; leave it out")
    for flag, name in (("text", args.text), ("eval_text", args.eval_text)):
        check_text(name, flag_of(flag))
    check_training(range(args.train_seqlen), args.batch_size, args.train_seqlen, args.accumulate)


def untrained(args):
    """The methods of a run that are computed while the model is compressed, and not trained."""
    return [name for name in args.method if METHODS[name].rates is None]


def refuse_without_dense(args):
    """Raise UserError for what needs the dense model, which a folder that is compressed already has not."""
    needs = [f"--method {name}" for name in untrained(args)] + ["--loss distill"] * (args.loss == "distill")
    if needs:
        raise UserError(f"{needs[0]}: needs the dense weights, and {args.model} is compressed already; give "
                        "the dense model as --model, and --compressor")


def fill_evaluation(args):
    """Evaluation flags that follow others when they are not given."""
    fill_in(args, {"eval_text": args.text, "eval_seqlen": args.train_seqlen, "eval_chunks": args.limit})
    evaluate.check_context(args)


def longest_prompt(args):
    """Positions of the longest prompt of the run (all in a row, for idp): every row gets the same room."""
    flags = {flag for name in args.method for flag in METHODS[name].flags if flag.startswith("prompt_length")}
    values = [getattr(args, flag) for flag in flags]
    return max((sum(value) if isinstance(value, list) else value for value in values), default=0)


class Run:
    """The model of one run and the rows that were measured on it."""

    def __init__(self, args, out=None):
        self.args, self.out, self.start, self.rows = args, out, time.time(), []
        self.device = pick_device(args.device)
        self.tasks = load_tasks(args.tasks, args.limit)
        self.model, self.tokenizer = load_model(args.model, self.device, args.dtype)
        self.grids, self.columns, self.computed, self.teacher = {}, longest_prompt(args), {}, None
        self.check_model()
        self.train_ids = load_text(args.text, self.tokenizer, "train")
        check_training(self.train_ids, args.batch_size, args.train_seqlen, 1)
        self.eval_ids = evaluate.load_scored_text(args.eval_text, self.tokenizer)

    def check_model(self):
        """Refuse, before any text is read, what this model has no room for or no layer of."""
        args = self.args
        check_room(self.model, "--train-seqlen", args.train_seqlen, self.columns)
        check_room(self.model, "--eval-seqlen", args.eval_seqlen, self.columns)
        if not self.model.compression:
            check_room(self.model, "--seqlen", args.seqlen)
            compress.check_model(self.model, *args.compression)
        for name in args.method:
            if "targets" in METHODS[name].flags:           # building it looks its layers up
                METHODS[name].build(self.model, **METHODS[name].settings(args))

    def measure(self, name, weight_bytes, method=None, **extra):
        """Evaluate the model, under a method or as it is; append one row and say its scores."""
        args = self.args
        with method.inference() if method else contextlib.nullcontext():
            scores = evaluate.evaluate_model(
                self.model, self.tokenizer, self.eval_ids, self.tasks, args.eval_seqlen,
                limit=args.eval_chunks, prompt_columns=self.columns, context=args.eval_context)
        sizes = [t.numel() for t in method.tensors().values()] if method else []
        self.rows.append({"row": name, **scores, "trainable_params": sum(sizes),
                          "extra_bytes": 4 * sum(sizes), "weight_bytes": weight_bytes, **extra})
        shown = [f"ppl {scores['ppl']:.2f}"]
        shown += [f"{task} {100 * score['acc']:.1f} %" for task, score in scores["tasks"].items()]
        say(name, f"{', '.join(shown)} (after {time.time() - self.start:.0f} s)")

    def compress(self):
        """Compress in place, unless the folder holds a compressed model already. -> compression report."""
        args = self.args
        if self.model.compression:
            if args.merge:
                self.grids = packing.read_grids(self.model, args.model)
            return self.model.compression
        self.measure("dense", evaluate.weight_bytes(self.model))
        name, settings = args.compression
        ids = compress.calibration_ids(self.train_ids, args.nsamples, args.seqlen, args.seed)
        grids = {} if args.merge else None
        # made of the dense model: methods that observe what compression does; what --loss distill learns from
        self.computed = {one: METHODS[one].build(self.model, **METHODS[one].settings(args), seed=args.seed)
                         for one in untrained(args)}
        self.teacher = copy.deepcopy(self.model) if args.loss == "distill" else None
        report = compress.compress_model(self.model, self.tokenizer, name, ids, grids=grids, codes=False,
                                         observe=self.observe, **settings)
        self.grids = {path: grid for path, grid in (grids or {}).items() if grid}
        report["calibration"].update(text=args.text, seed=args.seed)
        say("compression", compress.summary(report))
        return report

    def observe(self, *layer):
        """Show a layer that was just compressed to every method that is computed from it."""
        for method in self.computed.values():
            method.observe(*layer)

    def label(self, name, row):
        """A row's name: of a method that was trained it says by which loss, unless that is the text's."""
        return row if self.args.loss == "text" or name in self.computed else f"{row}, {self.args.loss}"

    def recover(self, name, weight_bytes, row=None):
        """Train one method and append its row, called `row` or as the method. -> the method."""
        args, entry = self.args, METHODS[name]
        if name in self.computed:
            self.measure(row or name, weight_bytes, self.computed[name])
            return self.computed[name]
        settings = entry.settings(args)
        method = entry.build(self.model, **settings, seed=args.seed)
        lr = entry.rates["toy" if args.toy else "other"] if args.lr is None else args.lr
        saved = Checkpoint(self.out, name, self.training_recipe(name, settings, lr)) if self.out else None
        training = train(method, self.train_ids, args.steps, args.batch_size, args.train_seqlen, lr,
                         args.seed, args.accumulate, args.checkpointing, saved, resume=args.resume,
                         weight_decay=args.weight_decay, teacher=self.teacher)
        parts = method.parts() if row is None and hasattr(method, "parts") else {}
        for part, alone in parts.items():
            self.measure(self.label(name, part), weight_bytes, alone)
        self.measure(row or self.label(name, name), weight_bytes, method, training={**training, "lr": lr})
        return method

    def training_recipe(self, name, settings, lr):
        """Everything that decides what a training ends in."""
        args = self.args
        deciding = ("steps", "batch_size", "train_seqlen", "weight_decay", "accumulate", "seed")
        deciding += ("loss",) * (args.loss != "text")      # as before there was another
        return {"method": name, "settings": settings, "lr": lr, "text": digest(self.train_ids),
                "dtype": str(self.model.dtype), **{key: getattr(args, key) for key in deciding},
                **recipe_of(self.model)}

    def merge(self, name, method, report):
        """Rows for an adapter folded into the weights: as it comes, and put back on the compressed model's
        grid or mask.

        A merged weight has left the grid (or the mask) of the compressed one: the same outputs as unmerged,
        but stored dense. Put back it is as small as before, and is another model: what was learnt has to
        survive the rounding. The grid is the compressed weight's own, so that an adapter that learnt nothing
        changes nothing.
        """
        self.measure_merged(method, f"{name} merged", evaluate.weight_bytes(self.model))
        masked = "sparsity" in compress.COMPRESSORS[report["compressor"]].settings
        if masked or self.grids:
            how = " and ".join(["rounded"] * bool(self.grids) + ["masked"] * masked)
            back = lambda path, Q: functools.partial(put_on, grid=self.grids.get(path),
                                                     mask=Q != 0 if masked else None)
            self.measure_merged(method, f"{name} merged, {how}", report["weight_bytes"], back)

    def measure_merged(self, method, row, weight_bytes, recompress=None):
        """One row, every layer merged. recompress: (path, compressed W) -> what puts a merged W back."""
        for path, layer in method.layers.items():
            layer.merge(recompress(path, weight_of(layer.linear)) if recompress else None)
        self.measure(row, weight_bytes)
        for layer in method.layers.values():
            layer.unmerge()


def put_on(W, grid=None, mask=None):
    """A merged W back to where compressed weights lie. mask: True where a weight may not be zero."""
    if grid is not None:
        grid = grid if isinstance(grid, Grid) else Grid(code=None, **grid)
        W = grid.to(W.device).round(W)
    return W if mask is None else W * mask


def main(argv=None):
    """Dense, compressed, recovered: one table."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    with claim(args.out, args.resume, ("checkpoint-*.safetensors", "adapter")) as out:
        job = Run(args, out)
        report = job.compress()
        brief = {key: value for key, value in report.items() if key != "layers"}
        job.measure("compressed", report["weight_bytes"], compression=brief)
        for name in args.method:
            method = job.recover(name, report["weight_bytes"])
            if out:
                save_adapter(out, method, "/".join(["adapter", *[name] * (len(args.method) > 1)]))
            if args.merge and "merge" in METHODS[name].flags:
                job.merge(job.rows[-1]["row"], method, report)
        print(evaluate.format_table(job.rows))
        if out:
            files = evaluate.result_files(vars(args), job.device, job.start, job.rows, recipe_of(job.model))
            for file, text in files.items():
                out.text(file, text)


def save_adapter(out, method, name):
    """The adapter's folder, whole; one that a resumed run finds there has the same bits."""
    if not (out.path / name).exists():
        with out.folder(name) as folder:
            method.save(folder)


if __name__ == "__main__":
    run(main)
