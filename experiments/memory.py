"""Peak memory of compressing and of training at the true shapes of large models, with random weights.

    python -m experiments.memory compress --shape llama-7b           # GPTQ, one block on the GPU at a time
    python -m experiments.memory idp --shape llama-7b                # or prompt, prefix, lora: a few steps
    python -m experiments.memory idp --shape llama-7b --dtype bfloat16 --layers 2    # a part: for a CPU

Blocks are all alike, so two runs with different --layers give the cost of a block. On CUDA the peak is the
allocator's; elsewhere it is the process's resident memory (Linux only), without what Python and the libraries
took before.
"""
import argparse
import ctypes
import pathlib
import time

import torch

import compress
import recover
from experiments.latency import SHAPES, random_model
from methods.registry import METHODS
from support.architectures import device_name, pick_device, pick_dtype
from support.cli import parse_flags, run


def resident(what):
    """VmRSS (now) or VmHWM (peak) of this process, bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


class Meter:
    """Peak of the memory in use on the device since the meter was made, without what was in use before."""

    def __init__(self, device):
        self.device, self.base = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # M_MMAP_THRESHOLD: what is freed goes back to the system at once
            ctypes.CDLL(None).mallopt(-3, 65536)
            pathlib.Path("/proc/self/clear_refs").write_text("5")    # forget the old peak
            self.base = resident("VmRSS")

    def peak(self):
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident("VmHWM") - self.base


def own_flags(parser):
    """What only this script asks."""
    trained = [name for name, entry in METHODS.items() if entry.rates]
    parser.add_argument("what", choices=["compress", *trained], help="which job")
    parser.add_argument("--layers", type=int, default=None, help="blocks; all of the shape when absent")
    parser.add_argument("--no-checkpointing", action="store_true", help="training: keep all activations")


def parse(argv=None):
    """The command line. -> argparse.Namespace."""
    takes = ["device", "dtype", "seed", "shape", "nsamples", "batch_size", "steps"]
    defaults = {"shape": "llama-7b", "nsamples": 128, "batch_size": 4, "steps": 2}
    return parse_flags(__doc__, takes, argv, {"shape": SHAPES}, defaults, add=own_flags)


def main(argv=None):
    """One job, one line."""
    args = parse(argv)
    if args.layers:
        SHAPES[args.shape]["num_hidden_layers"] = args.layers
    device, generator = pick_device(args.device), torch.Generator().manual_seed(args.seed)
    meter, start = Meter(device), time.time()
    # while compressing, the model lives on the CPU and one block at a time on the device
    home = "cpu" if args.what == "compress" else device
    model = random_model(args.shape, home, pick_dtype(args.dtype, device, None))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(model.config.vocab_size, (max(args.nsamples * 2048, 4096),), generator=generator)
    if args.what == "compress":
        rows = ids[:args.nsamples * 2048].view(-1, 2048)
        compress.compress_model(model, None, "gptq", rows, device, bits=3, group_size=128)
    else:
        flags = argparse.Namespace(prompt_length=100, prompt_lengths=[50, 100], rank=8, alpha=16,
                                   selector="mean_attention", layers="every",
                                   scores="logits", targets=None)
        entry = METHODS[args.what]
        method = entry.build(model, **entry.settings(flags))
        recover.train(method, ids, args.steps, args.batch_size, 512, 1e-3,
                      checkpointing=not args.no_checkpointing, quiet=True)
    print(f"{args.what}, {args.shape}, {model.config.num_hidden_layers} blocks, {model.dtype}, "
          f"{device_name(device)}: peak {meter.peak() / 1e9:.2f} GB, weights {weights / 1e9:.2f} GB, "
          f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    run(main)
