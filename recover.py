"""Recover: the main job. Compress a language model, then get its knowledge back; print one table.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867. The base model stays frozen; what is trained is small:

    prompt   one soft prompt of n tokens in front of the input            (Lester et al. 2021)
    prefix   trained keys and values in every layer                       (Li and Liang 2021; the paper's second baseline)
    idp      m soft prompts, learnt separately; each input chooses one    (the paper; idp_minimal.py)
    lora     W + (alpha / r) B A on some linear layers                    (Hu et al. 2021)

    python recover.py --method idp                                       # toy model, CPU, no network, under a minute
    python recover.py --method prompt,prefix,idp,lora --out runs/toy     # several in one table, one compression
    python recover.py --method lora --model facebook/opt-125m --compressor gptq --bits 3 --out runs/lora
    python recover.py --method prompt --model runs/compressed            # a folder that compress.py wrote

Writes, with --out DIR: adapter/ in PEFT's layout (adapter/METHOD/ when there are several), results.json, results.md,
items.json. All methods see the same training tokens in the same order. Letters: B batch, T tokens, m prompts.
"""
import contextlib
import json
import math
import pathlib
import sys
import time

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Cache

import compress
import evaluate
import loading
from compressors import QUANT
from idp_minimal import SELECTORS
from loading import UserError
from methods import METHODS, LoRALinear, put_back, snapshot    # noqa: F401, courses take LoRALinear from here


# NOT IN PAPER: the peak learning rates. Within 1 % of the lowest perplexity of `python sweep.py rates`, one grid for all methods:
# on the toy, and on SmolLM2 at 3 bits (README; idp as prompt). For a model of another size they are a start: sweep yours.
LEARNING_RATES = {"toy": {"prompt": 1e-1, "prefix": 1e-1, "idp": 1e-1, "lora": 1e-2},
                  "other": {"prompt": 3e-2, "prefix": 3e-2, "idp": 3e-2, "lora": 1e-2}}


# --- 1. One training loop for all -------------------------------------------------------------------------------------------

def batch_at(ids, step, batch_size, seqlen, seed):
    """The random chunks of one step, a pure function of (seed, step): so a resumed run sees what the first would have.

    ids (tokens,) -> (batch_size, seqlen) long.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - seqlen + 1, (batch_size,), generator=generator)
    return ids[starts[:, None] + torch.arange(seqlen)]                                         # (B, T)


def learning_rate_of(args, name):
    """--lr, or what LEARNING_RATES says for this model and method."""
    return args.lr or LEARNING_RATES["toy" if args.model == "toy" else "other"][name]


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then linear decay to zero. NOT IN PAPER: the schedule."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


@contextlib.contextmanager
def as_it_was(cache, i, held):
    """Layer i of the cache as before its block ran: or running again would append twice. And so again afterwards: or the cache
    would keep alive what was recomputed."""
    layer = cache.layers[i]
    layer.keys, layer.values = held
    try:
        yield
    finally:
        layer.keys, layer.values = held


def recomputed(forward, i):
    """The forward of block i, to be run again in the backward pass."""
    def run(*args, **kwargs):
        """The block's own arguments and result."""
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if cache is None:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        empty = (torch.tensor([], dtype=args[0].dtype, device=args[0].device),) * 2
        held = (cache.layers[i].keys, cache.layers[i].values) if i < len(cache.layers) else empty
        contexts = lambda: (contextlib.nullcontext(), as_it_was(cache, i, held))               # of the first run, of the second
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return run


@contextlib.contextmanager
def checkpointed_blocks(model, enabled):
    """Recompute each block in the backward pass instead of storing its activations.

    Ours rather than transformers' switch, which only acts in training mode, and that would turn dropout on.
    """
    blocks = loading.blocks_of(model) if enabled else []
    for i, block in enumerate(blocks):
        block.forward = recomputed(block.forward, i)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward                              # the class's own forward shows again


def train(method, ids, steps, batch_size, seqlen, lr, seed=0, accumulate=1, checkpointing=False, state_file=None,
          save_every=50, resume=False, quiet=None, sample=batch_at):
    """AdamW on the method's trainables. ids: (tokens,) long on the CPU. Returns {"loss", "seconds", "tokens"}.

    sample: where a step's rows come from, a function like batch_at.

    Raises UserError when the text is too short, the batch does not divide, or the loss stops being a number (the
    trainables then hold the last good state).
    """
    groups, device = method.groups(), method.model.device
    check_training(ids, batch_size, seqlen, accumulate, len(groups))
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=lr, weight_decay=0.0)
    first, loss = restore(state_file, method, optimizer) if resume else (0, None)
    good, start = snapshot(method), time.time()
    with method.training(), checkpointed_blocks(method.model, checkpointing):
        bar = tqdm(range(first, steps), initial=first, total=steps, desc="train", disable=quiet, unit="step")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            batch, total = sample(ids, step, batch_size, seqlen, seed).to(device), 0
            for rows in batch.chunk(accumulate):
                losses = method.losses(rows)               # (B / accumulate,)
                # each of the len(groups) prompts gets the mean over its own B / len(groups) rows
                (losses.sum() * len(groups) / batch_size).backward()
                total = total + losses.detach().sum() / batch_size
            for group in groups:
                nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 9 or step == steps - 1:        # reading the loss waits for the GPU: not at every step
                loss = total.item()
                if not math.isfinite(loss) or not all(t.isfinite().all() for t in method.tensors().values()):
                    put_back(method, good)
                    raise UserError(f"--lr {lr}: the loss stopped being a number near step {step + 1}; the state of step "
                                    f"{step - step % 10} is kept; use a smaller --lr")
                good = snapshot(method)
                bar.set_postfix(loss=f"{loss:.3f}", tok_s=int((step + 1 - first) * batch.numel() / (time.time() - start)))
            if state_file and ((step + 1) % save_every == 0 or step == steps - 1):
                save_state(state_file, method, optimizer, step + 1, loss)
    return {"loss": loss, "seconds": time.time() - start, "tokens": steps * batch_size * seqlen}


def check_training(ids, batch_size, seqlen, accumulate, m):
    """Refuse what cannot train, before the first step."""
    if len(ids) < seqlen + 1:
        raise UserError(f"--text: has {len(ids)} tokens, fewer than one chunk of --train-seqlen {seqlen}; give more text")
    if batch_size % (accumulate * m):
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {accumulate * m} (--accumulate {accumulate} x "
                        f"{m} prompts), so that every prompt sees equally many rows; use {accumulate * m * max(1, batch_size // (accumulate * m))}")


def save_state(path, method, optimizer, step, loss):
    """Trainables, both Adam moments, the step and the last loss read in one safetensors file, whole or not at all."""
    path, state = pathlib.Path(path), {name: t.detach().contiguous() for name, t in method.tensors().items()}
    for name, tensor in method.tensors().items():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[tensor][moment]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path) + ".tmp", metadata={"step": str(step), "loss": json.dumps(loss)})
    pathlib.Path(str(path) + ".tmp").replace(path)


def restore(path, method, optimizer):
    """Load what save_state wrote. -> (the step to go on from, the last loss read); (0, None) without a checkpoint."""
    if path is None or not pathlib.Path(path).exists():
        return 0, None
    state = load_file(path)
    with safe_open(path, "pt") as file:
        step, loss = int(file.metadata()["step"]), json.loads(file.metadata()["loss"])
    if any(name not in state or state[name].shape != t.shape for name, t in method.tensors().items()):
        raise UserError("--resume: the checkpoint in --out belongs to other settings; use the same flags or a new --out")
    put_back(method, state)
    for name, tensor in method.tensors().items():
        optimizer.state[tensor] = {"step": torch.tensor(float(step)),
                                   **{moment: state[f"{moment}.{name}"].to(tensor.device) for moment in ("exp_avg", "exp_avg_sq")}}
    return step, loss


# --- 2. The command ---------------------------------------------------------------------------------------------------------

def names_flag(text):
    """'prompt,lora' -> ['prompt', 'lora'], for argparse."""
    return [part.strip() for part in text.split(",") if part.strip()]


def lengths_flag(text):
    """'16,32,64' -> [16, 32, 64], for argparse."""
    return [int(part) for part in text.split(",")]


def build_parser():
    """Every flag of the main job."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    compress.add_compression_flags(parser)
    parser.add_argument("--method", type=names_flag, default=["idp"], help=f"how to recover; one or several of: {','.join(METHODS)}")
    parser.add_argument("--prompt-length", type=int, default=16, help="prompt, prefix: n, tokens")
    parser.add_argument("--prompt-lengths", type=lengths_flag, default=[8, 8, 16, 16], help="idp: n_k of each prompt, comma-separated")
    parser.add_argument("--selector", default="mean_attention", choices=sorted(set(SELECTORS) - {"oracle"}), help="idp: how to choose")
    parser.add_argument("--init-text", default=None, help="start prompts from this text instead of random vocabulary rows")
    parser.add_argument("--rank", type=int, default=8, help="lora: r")
    parser.add_argument("--alpha", type=float, default=16, help="lora: scaling is alpha / r")
    parser.add_argument("--targets", type=names_flag, default=None, help="lora: names of linear layers, comma-separated; PEFT's when absent")
    parser.add_argument("--merge", action="store_true", help="lora: two more rows, merged into the weights, and merged then compressed again")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step, shared out among IDP's prompts")
    parser.add_argument("--train-seqlen", type=int, default=64, help="tokens per training row")
    parser.add_argument("--eval-seqlen", type=int, default=None, help="tokens per perplexity chunk; --train-seqlen when absent")
    parser.add_argument("--eval-text", default=None, help="text for perplexity; the test split of a named --text when absent")
    parser.add_argument("--eval-chunks", type=int, default=None, help="chunks of text for perplexity; --limit when absent")
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate; LEARNING_RATES of the method when absent")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass (less memory)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out: checkpoints, or the rows of a sweep")
    return parser


def parse(argv=None, parser=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work.

    parser: build_parser() with more flags, for scripts that do the main job many times.
    """
    args = (parser or build_parser()).parse_args(argv)
    loading.fill_defaults(args)
    args.eval_text = args.eval_text or args.text
    args.eval_seqlen = args.eval_seqlen or args.train_seqlen
    args.eval_chunks = args.eval_chunks or args.limit
    check(args)
    args.compression = compress.settings_from(args)        # raises UserError
    if args.out and not args.resume:
        loading.check_out(args.out, "results.json")
    return args


def check(args):
    """Refuse impossible values before any model loads."""
    unknown = [name for name in args.method if name not in METHODS]
    if unknown or not args.method:
        raise UserError(f"--method {','.join(unknown)}: unknown; use one or several of: {' '.join(METHODS)}")
    lowest = {"prompt_length": 1, "rank": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "train_seqlen": 2, "eval_seqlen": 2}
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: too small; use at least {low}")
    for name in ("alpha", "lr"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0; use for example {16 if name == 'alpha' else 0.001}")
    if not args.prompt_lengths or min(args.prompt_lengths) < 1:
        raise UserError("--prompt-lengths: every prompt needs at least one token; use for example 8,8,16,16")
    if args.resume and not args.out:
        raise UserError("--resume: needs --out DIR of the run to go on with")
    if args.merge and "lora" not in args.method:
        raise UserError("--merge: only LoRA can be merged; use --method lora")
    m = len(args.prompt_lengths) if "idp" in args.method else 1
    check_training(range(args.train_seqlen + 1), args.batch_size, args.train_seqlen, args.accumulate, m)


class Run:
    """The model of one run and the rows that were measured on it."""

    def __init__(self, args):
        self.args, self.start, self.rows = args, time.time(), []
        self.device = loading.pick_device(args.device)
        self.tasks = loading.load_tasks(args.tasks, args.limit)
        self.model, self.tokenizer = loading.load_model(args.model, self.device, args.dtype)
        self.train_ids = loading.load_text(args.text, self.tokenizer, "train")
        self.eval_ids = loading.load_text(args.eval_text, self.tokenizer, "test")
        self.prompt_columns = max([args.prompt_length, *args.prompt_lengths])
        check_training(self.train_ids, args.batch_size, args.train_seqlen, 1, 1)

    def measure(self, name, weight_bytes, method=None, **extra):
        """Evaluate the model, with a method applied or as it is, and append one row."""
        args = self.args
        with method.inference() if method else contextlib.nullcontext():
            scores = evaluate.evaluate_model(self.model, self.tokenizer, self.eval_ids, self.tasks, seqlen=args.eval_seqlen,
                                             limit=args.eval_chunks, prompt_columns=self.prompt_columns)
        sizes = [t.numel() for t in method.tensors().values()] if method else []
        self.rows.append({"row": name, **scores, "trainable_params": sum(sizes), "extra_bytes": 4 * sum(sizes),
                          "weight_bytes": weight_bytes, **extra})
        print(f"{name}: done after {time.time() - self.start:.0f} s", file=sys.stderr)

    def compress(self):
        """Compress in place, unless the folder holds a compressed model already. -> compression report."""
        ready = pathlib.Path(self.args.model, "compression.json")
        if ready.exists():
            return json.loads(ready.read_text())
        self.measure("dense", evaluate.weight_bytes(self.model))
        name, settings = self.args.compression
        ids = compress.calibration_ids(self.train_ids, self.args.nsamples, self.args.seqlen, self.args.seed)
        report = compress.compress_model(self.model, self.tokenizer, name, ids, **settings)
        print(compress.summary(report), file=sys.stderr)
        return report

    def recover(self, name, weight_bytes, row=None):
        """Train one method and append its row, called `row` or as the method. -> the method."""
        args, (build, settings) = self.args, METHODS[name]
        text = None
        if args.init_text:
            text = self.tokenizer(args.init_text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        method = build(self.model, **settings(args, text), seed=args.seed)
        state = pathlib.Path(args.out, f"checkpoint-{name}.safetensors") if args.out else None
        training = train(method, self.train_ids, args.steps, args.batch_size, args.train_seqlen, learning_rate_of(args, name),
                         args.seed, args.accumulate, args.checkpointing, state, resume=args.resume)
        self.measure(row or name, weight_bytes, method, training=training)
        return method

    def merge(self, method, weight_bytes):
        """Rows for LoRA folded into the weights: as it comes, and compressed again.

        A merged weight has left the grid (or the mask) of the compressed one: the same outputs as unmerged, but stored dense.
        Compressed again it is as small as before, and is another model: what was learnt has to survive the rounding.
        """
        name, settings = self.args.compression
        self.measure_merged(method, "lora merged", evaluate.weight_bytes(self.model))
        if name in ("magnitude", "sparsegpt"):
            self.measure_merged(method, "lora merged, masked", weight_bytes, lambda Q: lambda W: W * (Q != 0))
        elif name in ("rtn", "gptq"):
            settings = {key: settings[key] for key in QUANT}
            self.measure_merged(method, "lora merged, rounded", weight_bytes, lambda Q: lambda W: compress.rtn(W, **settings))

    def measure_merged(self, method, row, weight_bytes, recompress=None):
        """One row with every LoRALinear merged. recompress: the compressed W -> a function that puts a merged W back."""
        for layer in method.layers.values():
            layer.merge(recompress(layer.base_weight()) if recompress else None)
        self.measure(row, weight_bytes)
        for layer in method.layers.values():
            layer.unmerge()


def main(argv=None):
    """Dense, compressed, recovered: one table."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    run = Run(args)
    report = run.compress()
    run.measure("compressed", report["weight_bytes"], compression={key: value for key, value in report.items() if key != "layers"})
    for name in args.method:
        method = run.recover(name, report["weight_bytes"])
        if args.out:
            with loading.whole_folder(pathlib.Path(args.out, "adapter", *[name] * (len(args.method) > 1))) as folder:
                method.save(folder)
        if args.merge and name == "lora":
            run.merge(method, report["weight_bytes"])
    print(evaluate.format_table(run.rows))
    if args.out:
        evaluate.write_results(args.out, evaluate.command_line(), vars(args), run.device, time.time() - run.start, run.rows)


if __name__ == "__main__":
    loading.run(main)
