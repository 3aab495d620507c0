"""Our functions against the fastest public ones we could install, in one run; the project needs none of them.

    pip install llmcompressor && python -m experiments.speed gptq         # one 2048 x 2048 layer, group 128
    pip install gptqmodel && python -m experiments.speed gptq --against gptqmodel
    python -m experiments.speed gptq-model --model smollm2 --text wikitext2     # every layer, group 64
    pip install peft && python -m experiments.speed train --model smollm2       # prompt-tuning, LoRA steps
    pip install lm_eval && python -m experiments.speed score --model smollm2 --tasks arc_easy --limit 100

Both sides get the same threads, dtype and data, take turns, and are warmed up first. Printed are medians, and
the median of the ratios ours / theirs within a turn; for gptq-model, sums over its layers. GPTQ has 3 bits.
"""
import functools
import statistics

import torch

import compress
import evaluate
from experiments.latency import now
from methods.lora import LoRA
from methods.prompts import SoftPrompts
from methods.registry import Compressor
from support.architectures import pick_device
from support.cli import parse_flags, run
from support.data import load_tasks, load_text
from support.models import load_model


def timed(side, device):
    """Call a function. -> what it returns, seconds until its work is finished."""
    start = now(device)
    result = side()
    return result, now(device) - start


def take_turns(sides, repeats, device):
    """Print seconds and their ratio. sides: {"ours": function, name: theirs}."""
    for side in sides.values():
        side()
    turns = [[timed(side, device)[1] for side in sides.values()] for _ in range(repeats)]
    medians = [f"{name} {statistics.median(seconds):.3f} s" for name, seconds in zip(sides, zip(*turns))]
    ratio = statistics.median(ours / theirs for ours, theirs in turns)
    print(f"{', '.join(medians)}, ratio {ratio:.3f} (median of {repeats}, {torch.get_num_threads()} threads)",
          flush=True)


GRIDS = {  # ways to fit grids, as settings of gptq()
    "current groups": dict(), "static groups": dict(static_groups=True),
    "current groups, mse": dict(mse=True), "static groups, mse": dict(static_groups=True, mse=True)}


def llmcompressor_gptq(W, H, group, static_groups=True, mse=False):
    """llmcompressor's GPTQ, 3 bits; its groups are always static. W (out, in), H (in, in) -> Q."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer
    observer = "memoryless_mse" if mse else "memoryless_minmax"
    scheme = QuantizationArgs(num_bits=3, group_size=group, symmetric=False, strategy="group",
                              observer=observer)
    grid = Observer.load_from_registry(observer, base_name="weight", args=scheme)(W).get_qparams()
    return quantize_weight(W[None].clone(), H[None].clone(), grid["scale"][None], grid["zero_point"][None],
                           None, scheme, blocksize=128, percdamp=0.01)[0][0]


def gptqmodel_gptq(W, H, group, static_groups=False, mse=False):
    """gptqmodel's GPTQ, 3 bits. W (out, in), H (in, in) -> Q."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).requires_grad_(False)
    layer.weight.copy_(W)
    solver = GPTQ(layer, QuantizeConfig(
        bits=3, group_size=group, sym=False, desc_act=False, act_group_aware=False,
        static_groups=static_groups, damp_percent=0.01, mse=2.4 if mse else 0.0))
    solver.quantizer.configure(perchannel=True)
    solver.H, solver.nsamples = H.clone(), len(H)
    return solver.quantize(blocksize=128)[0].float()


RIVALS = {"llmcompressor": llmcompressor_gptq, "gptqmodel": gptqmodel_gptq}


def gptq(args):
    """One layer: our gptq() against theirs."""
    n, group, rival = args.size, 128, RIVALS[args.against]
    generator = torch.Generator().manual_seed(args.seed)
    noise = lambda rows: torch.randn(rows, n, generator=generator)
    mix = noise(n) / n ** 0.5 * torch.logspace(0, -1.5, n)[:, None]
    X = noise(4 * n) @ mix + 0.01 * noise(4 * n)
    W, H = 0.02 * noise(n), X.T @ X / len(X)
    error = lambda Q: compress.relative_error(W, Q, H)
    if args.profile:
        with torch.profiler.profile() as profile:
            compress.gptq(W, H, 3, group)
        found = profile.key_averages()
        print(found.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=32))
        return
    print(f"relative output error of RTN {error(compress.rtn(W, 3, group)):.5f}")
    for name, settings in GRIDS.items():
        sides = {"ours": lambda: compress.gptq(W, H, 3, group, **settings),
                 args.against: lambda: rival(W, H, group, **settings)}
        errors = [f"{side} {error(solve()):.5f}" for side, solve in sides.items()]
        print(f"{name}: error {', '.join(errors)}", end="; ")
        take_turns(sides, args.repeats, args.device)


def gptq_model(args):
    """Every linear layer of a model, in turns on the same W and H; the walk goes on with our first result."""
    rival = functools.partial(RIVALS[args.against], group=64, static_groups=True)
    sides = {("ours", name): functools.partial(compress.gptq, bits=3, group_size=64, **settings)
             for name, settings in GRIDS.items()}
    sides.update({("theirs", mse): functools.partial(rival, mse=mse) for mse in (False, True)})
    seconds, errors = dict.fromkeys(sides, 0), {side: [] for side in sides}

    def every_side(W, H, details=None):
        """A compressor that is every side of the comparison; ours counts."""
        results = []
        for side, solve in sides.items():
            Q, took = timed(lambda: solve(W, H), W.device)
            seconds[side] += took
            errors[side].append(compress.relative_error(W, Q, H))
            results.append(Q)
        return results[0]

    for solve in sides.values():                           # warm up: imports, allocations
        solve(torch.randn(128, 128), torch.eye(128))
    compress.COMPRESSORS["every side"] = Compressor(every_side, True, ())
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    ids = compress.calibration_ids(load_text(args.text, tokenizer, "train"), 32, 512, args.seed)
    compress.compress_model(model, tokenizer, "every side", ids)
    shown = lambda side: f"{seconds[side]:.1f} s, error {statistics.mean(errors[side]):.5f}"
    for name, settings in GRIDS.items():
        ours, theirs = ("ours", name), ("theirs", settings.get("mse", False))
        print(f"{name}: ours {shown(ours)}; {args.against}, static groups {shown(theirs)}; "
              f"ratio {seconds[ours] / seconds[theirs]:.3f} ({len(errors[ours])} layers, "
              f"{torch.get_num_threads()} threads)")


def train(args):
    """A step on batch x seqlen tokens, loss and gradients: our methods against PEFT's on the same model."""
    import peft
    generator, n = torch.Generator().manual_seed(args.seed), args.prompt_length
    ids = torch.randint(3, 300, (args.batch_size, args.train_seqlen), generator=generator).to(args.device)
    fresh = lambda: load_model(args.model, args.device, args.dtype)[0]
    configs = {
        f"prompt of {n}": (lambda model: SoftPrompts(model, [n]),
                           peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)),
        "LoRA r 8": (LoRA, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))}
    for name, (build, config) in configs.items():
        method, theirs = build(fresh()), peft.get_peft_model(fresh(), config).eval()

        def our_step():
            """Loss and gradients."""
            with method.training():
                method.losses(ids).mean().backward()

        print(name, f"{args.batch_size} x {args.train_seqlen} tokens:", end=" ")
        sides = {"ours": our_step, "peft": lambda: theirs(ids, labels=ids).loss.backward()}
        take_turns(sides, args.repeats, args.device)


def score(args):
    """Multiple-choice log-likelihoods: ours against the harness, same rows, same batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    for name, rows in load_tasks(args.tasks, args.limit).items():
        pairs = [pair for row in rows for pair in evaluate.choice_pairs(row)]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        print(f"{name}, {len(rows)} rows:", end=" ")
        sides = {"ours": lambda: evaluate.multiple_choice(model, tokenizer, rows, 16),
                 "lm_eval": lambda: harness.loglikelihood(requests, disable_tqdm=True)}
        take_turns(sides, args.repeats, args.device)


COMPARISONS = {"gptq": gptq, "gptq-model": gptq_model, "train": train, "score": score}


def own_flags(parser):
    """What only this script asks."""
    parser.add_argument("what", choices=list(COMPARISONS), help="which comparison")
    parser.add_argument("--against", default="llmcompressor", choices=list(RIVALS),
                        help="gptq, gptq-model: whose GPTQ")
    parser.add_argument("--profile", action="store_true", help="gptq: where our time goes, nothing else")
    parser.add_argument("--size", type=int, default=2048, help="gptq: rows and columns")


def parse(argv=None):
    """The command line. -> argparse.Namespace."""
    takes = ["model", "device", "dtype", "seed", "text", "tasks", "limit", "batch_size", "train_seqlen",
             "prompt_length", "repeats"]
    defaults = {"batch_size": 4, "train_seqlen": 128, "prompt_length": 32, "repeats": 5}
    return parse_flags(__doc__, takes, argv, defaults=defaults, add=own_flags)


def main(argv=None):
    """One comparison."""
    args = parse(argv)
    args.device = pick_device(args.device)
    COMPARISONS[args.what](args)


if __name__ == "__main__":
    run(main)
