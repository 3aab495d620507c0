"""Our functions against the fastest public ones we could install, in one run. Each needs its tool, which the
project never needs.

    pip install llmcompressor && python -m experiments.speed gptq                  # one 2048 x 2048 layer, 3 bits, group 128
    pip install gptqmodel && python -m experiments.speed gptq --against gptqmodel
    python -m experiments.speed gptq-model --model smollm2 --text wikitext2        # every layer of a model, 3 bits, group 64
    pip install peft && python -m experiments.speed train --model smollm2          # a prompt-tuning step and a LoRA step
    pip install lm_eval && python -m experiments.speed score --model smollm2 --tasks arc_easy --limit 100

Both sides get the same threads, dtype and data, take turns, and are warmed up first. Printed are medians, and
the median of the ratios ours / theirs within a turn; for gptq-model, sums over its layers.
"""
import functools
import statistics
import time

import torch

import compress
import evaluate
from experiments.latency import synchronize
from methods.lora import LoRA
from methods.prompts import SoftPrompts
from methods.registry import Compressor
from support.cli import parse_flags, run
from support.data import load_tasks, load_text
from support.architectures import pick_device
from support.models import load_model


def take_turns(sides, repeats, device):
    """sides: {name: function}; the first is ours. Prints seconds, of finished work, and the ratio to the
    second.
    """
    for side in sides.values():
        side()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            synchronize(device)
            start = time.perf_counter()
            side()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = list(seconds)[:2]
    ratio = statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs]))
    print(f"{ours} {statistics.median(seconds[ours]):.3f} s, {theirs} {statistics.median(seconds[theirs]):.3f} s, ratio {ratio:.3f} "
          f"(median of {repeats}, {torch.get_num_threads()} threads)", flush=True)


GRIDS = {  # ways to fit grids, as settings of gptq()
    "current groups": dict(), "static groups": dict(static_groups=True),
    "current groups, mse": dict(mse=True), "static groups, mse": dict(static_groups=True, mse=True)}


def llmcompressor_gptq(W, H, group, static_groups=True, mse=False):
    """llmcompressor's GPTQ, 3 bits; its groups are always static. W (out, in), H (in, in) -> Q."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer
    observer = "memoryless_mse" if mse else "memoryless_minmax"
    scheme = QuantizationArgs(num_bits=3, group_size=group, symmetric=False, strategy="group", observer=observer)
    grid = Observer.load_from_registry(observer, base_name="weight", args=scheme)(W).get_qparams()
    return quantize_weight(W[None].clone(), H[None].clone(), grid["scale"][None], grid["zero_point"][None], None, scheme,
                           blocksize=128, percdamp=0.01)[0][0]


def gptqmodel_gptq(W, H, group, static_groups=False, mse=False):
    """gptqmodel's GPTQ, 3 bits. W (out, in), H (in, in) -> Q."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).requires_grad_(False)
    layer.weight.copy_(W)
    solver = GPTQ(layer, QuantizeConfig(bits=3, group_size=group, sym=False, desc_act=False, act_group_aware=False,
                                        static_groups=static_groups, damp_percent=0.01, mse=2.4 if mse else 0.0))
    solver.quantizer.configure(perchannel=True)
    solver.H, solver.nsamples = H.clone(), len(H)
    return solver.quantize(blocksize=128)[0].float()


RIVALS = {"llmcompressor": llmcompressor_gptq, "gptqmodel": gptqmodel_gptq}


def gptq(args):
    """One layer: our gptq() against theirs."""
    n, group, generator, rival = args.size, 128, torch.Generator().manual_seed(args.seed), RIVALS[args.against]
    mix = torch.randn(n, n, generator=generator) / n ** 0.5 * torch.logspace(0, -1.5, n)[:, None]
    X = torch.randn(4 * n, n, generator=generator) @ mix + 0.01 * torch.randn(4 * n, n, generator=generator)
    W, H = 0.02 * torch.randn(n, n, generator=generator), X.T @ X / len(X)
    error = lambda Q: compress.relative_error(W, Q, H)
    if args.profile:
        with torch.profiler.profile() as profile:
            compress.gptq(W, H, 3, group)
        return print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=32))
    print(f"relative output error of RTN {error(compress.rtn(W, 3, group)):.5f}")
    for name, settings in GRIDS.items():
        sides = {"ours": lambda: compress.gptq(W, H, 3, group, **settings), args.against: lambda: rival(W, H, group, **settings)}
        print(f"{name}: error " + ", ".join(f"{side} {error(solve()):.5f}" for side, solve in sides.items()), end="; ")
        take_turns(sides, args.repeats, args.device)


def gptq_model(args):
    """Every linear layer of a model, in turns on the same W and H; the walk goes on with our first result."""
    group, seconds, errors = 64, {}, {}
    sides = {("ours", name): functools.partial(compress.gptq, bits=3, group_size=group, **settings) for name, settings in GRIDS.items()}
    sides.update({("theirs", mse): functools.partial(RIVALS[args.against], group=group, static_groups=True, mse=mse) for mse in (False, True)})

    def every_side(W, H, details=None):
        results = []
        for side, solve in sides.items():
            synchronize(W.device)
            start = time.perf_counter()
            results.append(solve(W, H))
            synchronize(W.device)
            seconds[side] = seconds.get(side, 0) + time.perf_counter() - start
            errors.setdefault(side, []).append(compress.relative_error(W, results[-1], H))
        return results[0]

    for solve in sides.values():                           # warm up: imports, allocations
        solve(torch.randn(128, 128), torch.eye(128))
    compress.COMPRESSORS["every side"] = Compressor(every_side, True, ())
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    ids = compress.calibration_ids(load_text(args.text, tokenizer, "train"), 32, 512, args.seed)
    compress.compress_model(model, tokenizer, "every side", ids)
    for name, settings in GRIDS.items():
        ours, theirs = ("ours", name), ("theirs", settings.get("mse", False))
        print(f"{name}: ours {seconds[ours]:.1f} s, error {statistics.mean(errors[ours]):.5f}; {args.against}, static groups {seconds[theirs]:.1f} s, error "
              f"{statistics.mean(errors[theirs]):.5f}; ratio {seconds[ours] / seconds[theirs]:.3f} "
              f"({len(errors[ours])} layers, {torch.get_num_threads()} threads)")


def train(args):
    """A step on batch x seqlen tokens, loss and gradients: our methods against PEFT's on the same model."""
    import peft
    ids = torch.randint(1000, 2000, (args.batch_size, args.train_seqlen), generator=torch.Generator().manual_seed(args.seed))
    n = args.prompt_length
    configs = {f"prompt of {n}": (lambda model: SoftPrompts(model, [n]), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)),
               "LoRA r 8": (lambda model: LoRA(model), peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))}
    for name, (build, config) in configs.items():
        method = build(load_model(args.model, args.device, args.dtype)[0])
        theirs = peft.get_peft_model(load_model(args.model, args.device, args.dtype)[0], config).eval()
        here = ids.to(args.device)

        def our_step():
            with method.training():
                method.losses(here).mean().backward()
        print(name, f"{args.batch_size} x {args.train_seqlen} tokens:", end=" ")
        take_turns({"ours": our_step, "peft": lambda: theirs(here, labels=here).loss.backward()}, args.repeats, args.device)


def score(args):
    """Multiple-choice log-likelihoods: ours against the harness, same rows, same batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    for name, rows in load_tasks(args.tasks, args.limit).items():
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pair for row in rows for pair in evaluate.choice_pairs(row))]
        print(f"{name}, {len(rows)} rows:", end=" ")
        take_turns({"ours": lambda: evaluate.multiple_choice(model, tokenizer, rows, 16),
                    "lm_eval": lambda: harness.loglikelihood(requests, disable_tqdm=True)}, args.repeats, args.device)


COMPARISONS = {"gptq": gptq, "gptq-model": gptq_model, "train": train, "score": score}


def own_flags(parser):
    """What only this script asks."""
    parser.add_argument("what", choices=list(COMPARISONS), help="which comparison")
    parser.add_argument("--against", default="llmcompressor", choices=list(RIVALS), help="gptq, gptq-model: whose GPTQ")
    parser.add_argument("--profile", action="store_true", help="gptq: where our time goes, nothing else")
    parser.add_argument("--size", type=int, default=2048, help="gptq: rows and columns")


def parse(argv=None):
    """The command line. -> argparse.Namespace."""
    return parse_flags(__doc__, ["model", "device", "dtype", "seed", "text", "tasks", "limit", "batch_size", "train_seqlen",
                                 "prompt_length", "repeats"], argv,
                       defaults={"batch_size": 4, "train_seqlen": 128, "prompt_length": 32, "repeats": 5}, add=own_flags)


def main(argv=None):
    """One comparison."""
    args = parse(argv)
    args.device = pick_device(args.device)
    COMPARISONS[args.what](args)


if __name__ == "__main__":
    run(main)
