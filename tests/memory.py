"""Peak memory of compressing and of training at the true shapes of large models, with random weights.

    python tests/memory.py compress --shape llama-7b --dtype bfloat16 --device cuda       # GPTQ, one block on the GPU at a time
    python tests/memory.py idp --shape llama-7b --dtype bfloat16 --device cuda            # or prompt, prefix, lora: a few steps
    python tests/memory.py idp --shape llama-7b --dtype bfloat16 --layers 2               # without a GPU: a part that fits

Blocks are all alike, so two runs with different --layers give the cost of a block. On CUDA the peak is the allocator's;
elsewhere it is the process's resident memory (Linux only), without what Python and the libraries took before.
"""
import argparse
import ctypes
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import compress
import latency
import loading
import recover
from methods import METHODS


def resident(what):
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    line = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


class Meter:
    """Peak of the memory in use on the device since the meter was made, without what was in use before."""

    def __init__(self, device):
        self.device, self.base = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            ctypes.CDLL(None).mallopt(-3, 65536)           # M_MMAP_THRESHOLD: what is freed goes back to the system at once
            pathlib.Path("/proc/self/clear_refs").write_text("5")    # forget the old peak
            self.base = resident("VmRSS")

    def peak(self):
        """Bytes."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM") - self.base


def main():
    """One job, one line."""
    parser = loading.Parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--dtype", default="float32", choices=sorted(loading.DTYPES), help="of the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and prompts")
    parser.add_argument("what", choices=["compress", *METHODS], help="which job")
    parser.add_argument("--shape", default="llama-7b", choices=list(latency.SHAPES), help="of the model")
    parser.add_argument("--layers", type=int, default=None, help="blocks; all of the shape when absent")
    parser.add_argument("--nsamples", type=int, default=128, help="compress: calibration chunks of 2048 tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="training: rows of 512 tokens")
    parser.add_argument("--no-checkpointing", action="store_true", help="training: keep all activations")
    parser.add_argument("--steps", type=int, default=2, help="training: optimizer steps")
    args = parser.parse_args()
    if args.layers:
        latency.SHAPES[args.shape]["num_hidden_layers"] = args.layers
    device, generator = loading.pick_device(args.device), torch.Generator().manual_seed(args.seed)
    meter, start = Meter(device), time.time()
    # while compressing, the model lives on the CPU and one block at a time on the device
    model = latency.random_model(args.shape, "cpu" if args.what == "compress" else device, args.dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(model.config.vocab_size, (max(args.nsamples * 2048, 4096),), generator=generator)
    if args.what == "compress":
        compress.compress_model(model, None, "gptq", ids[:args.nsamples * 2048].view(-1, 2048), device, bits=3, group_size=128)
    else:
        flags = argparse.Namespace(prompt_length=100, prompt_lengths=[16, 32, 64, 100], selector="mean_attention", rank=8, alpha=16,
                                   targets=None)
        build, settings = METHODS[args.what]
        recover.train(build(model, **settings(flags, None)), ids, args.steps, args.batch_size, 512, 1e-3,
                      checkpointing=not args.no_checkpointing, quiet=True)
    print(f"{args.what}, {args.shape}, {model.config.num_hidden_layers} blocks, {args.dtype}, {loading.device_name(device)}: peak "
          f"{meter.peak() / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    loading.run(main)
