"""Our functions against the fastest public ones we could install, in one run. Each needs its tool, which the project never needs.

    pip install llmcompressor && python tests/speed.py gptq                  # one 2048 x 2048 layer, 3 bits, group 128
    pip install peft && python tests/speed.py train --model smollm2          # a prompt-tuning step and a LoRA step
    pip install lm_eval && python tests/speed.py score --model smollm2 --tasks arc_easy --limit 100

Both sides get the same threads, dtype and data, take turns, and are warmed up first; printed are medians, and the median of
the ratios ours / theirs within a turn.
"""
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import compress
import evaluate
import loading
import methods


def take_turns(sides, repeats):
    """sides: {name: function}; the first is ours. Prints seconds and the ratio to the second."""
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = list(seconds)[:2]
    ratio = statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs]))
    print(f"{ours} {statistics.median(seconds[ours]):.3f} s, {theirs} {statistics.median(seconds[theirs]):.3f} s, ratio {ratio:.3f} "
          f"(median of {repeats}, {torch.get_num_threads()} threads)", flush=True)


def gptq(args):
    """One layer: our gptq() against llmcompressor's quantize_weight, which fits its grids to the original weights."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    n, group, generator = args.size, 128, torch.Generator().manual_seed(args.seed)
    mix = torch.randn(n, n, generator=generator) / n ** 0.5 * torch.logspace(0, -1.5, n)[:, None]
    X = torch.randn(4 * n, n, generator=generator) @ mix + 0.01 * torch.randn(4 * n, n, generator=generator)
    W, H = 0.02 * torch.randn(n, n, generator=generator), X.T @ X / len(X)

    def theirs():
        scheme = QuantizationArgs(num_bits=3, group_size=group, symmetric=False, strategy="group")
        groups = W.view(n, -1, group)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme)
        return quantize_weight(W[None].clone(), H[None].clone(), scale[None], zero[None], None, scheme, blocksize=128, percdamp=0.01)[0][0]
    for static in (False, True):
        ours = lambda: compress.gptq(W, H, 3, group, static_groups=static)
        print(f"relative output error: ours, {'static' if static else 'current'} groups {compress.relative_error(W, ours(), H):.5f}, "
              f"theirs {compress.relative_error(W, theirs(), H):.5f}, RTN {compress.relative_error(W, compress.rtn(W, 3, group), H):.5f}")
        take_turns({"ours": ours, "llmcompressor": theirs}, args.repeats)


def train(args):
    """A step on batch x seqlen tokens, loss and gradients: our methods against PEFT's on the same model."""
    import peft
    ids = torch.randint(1000, 2000, (args.batch_size, args.seqlen), generator=torch.Generator().manual_seed(args.seed))
    n = args.prompt_length
    configs = {f"prompt of {n}": (lambda model: methods.SoftPrompts(model, [n]), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n)),
               "LoRA r 8": (lambda model: methods.LoRA(model), peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16))}
    for name, (build, config) in configs.items():
        method = build(loading.load_model(args.model, args.device, args.dtype)[0])
        theirs = peft.get_peft_model(loading.load_model(args.model, args.device, args.dtype)[0], config).eval()
        here = ids.to(args.device)

        def our_step():
            with method.training():
                method.losses(here).mean().backward()
        print(name, f"{args.batch_size} x {args.seqlen} tokens:", end=" ")
        take_turns({"ours": our_step, "peft": lambda: theirs(here, labels=here).loss.backward()}, args.repeats)


def score(args):
    """Multiple-choice log-likelihoods: ours against the harness, same rows, same batch size."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = loading.load_model(args.model, args.device, args.dtype)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    for name, rows in loading.load_tasks(args.tasks, args.limit).items():
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pair for row in rows for pair in evaluate.choice_pairs(row))]
        print(f"{name}, {len(rows)} rows:", end=" ")
        take_turns({"ours": lambda: evaluate.multiple_choice(model, tokenizer, rows, 16),
                    "lm_eval": lambda: harness.loglikelihood(requests, disable_tqdm=True)}, args.repeats)


def main():
    """One comparison."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    parser.add_argument("what", choices=["gptq", "train", "score"], help="which comparison")
    parser.add_argument("--size", type=int, default=2048, help="gptq: rows and columns")
    parser.add_argument("--batch-size", type=int, default=4, help="train: rows")
    parser.add_argument("--seqlen", type=int, default=128, help="train: tokens per row")
    parser.add_argument("--prompt-length", type=int, default=32, help="train: tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5, help="turns after the warm-up")
    args = parser.parse_args()
    args.device = str(loading.pick_device(args.device))
    {"gptq": gptq, "train": train, "score": score}[args.what](args)


if __name__ == "__main__":
    loading.run(main)
