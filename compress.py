"""Compress: every linear layer of every decoder block, one block at a time, by one of the functions of compressors.py.

    python compress.py --model toy --compressor gptq --bits 3 --out runs/toy-gptq3           # seconds, CPU
    python compress.py --model facebook/opt-125m --compressor gptq --bits 3 --group-size -1 --text c4 --nsamples 128 \\
        --seqlen 2048 --device cuda --packed --out runs/opt-gptq3                            # one block on the GPU at a time

The paper compresses with 3-bit GPTQ and with SparseGPT. lm_head and embeddings stay as they are. Letters: W (out, in) a
layer's weights, X (tokens, in) its inputs, H (in, in) = mean of x x^T over calibration tokens, Q the compressed W.
"""
import contextlib
import functools
import inspect
import json
import math
import pathlib
import sys
import time

import torch
import torch.nn as nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import loading
from compressors import COMPRESSORS, LIMITS, check, gptq, magnitude, rtn, sparsegpt, split_pattern    # noqa: F401
from loading import UserError


# --- 1. The walk over the blocks ---------------------------------------------------------------------------------------------

class Captured(Exception):
    """Raised by the capturing hook to stop the forward pass before the first block runs."""


@torch.no_grad()
def first_block_inputs(model, calibration, device):
    """What the first block is called with. calibration (nsamples, seqlen) -> [hidden (1, T, d), ...], keyword arguments.

    The other arguments (mask, positions) are those of one chunk: chunks are equally long and unpadded, so they are all alike.
    """
    block, hidden, kwargs = loading.blocks_of(model)[0], [], {}
    names = list(inspect.signature(block.forward).parameters)

    def capture(block, args, given):
        """Keep what the first block is called with, and stop."""
        given = {**dict(zip(names, args)), **given}        # GPT-2 passes its mask by position
        hidden.append(given.pop(names[0]).to(device))
        kwargs.update({name: to_device(value, device) for name, value in given.items()})
        raise Captured

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    for row in calibration:
        with contextlib.suppress(Captured):
            model(row[None].to(model.device), use_cache=False)
    handle.remove()
    return hidden, kwargs


def to_device(value, device):
    """Tensors, and tuples of them such as (cos, sin), to the device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(to_device(v, device) for v in value) if isinstance(value, tuple) else value


def block_output(block, hidden, kwargs):
    """A block's hidden states, whether this version of transformers returns a tensor or a tuple."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def linears_of(block):
    """{name: layer} of the linear layers in a block; GPT-2 calls them Conv1D and stores W^T."""
    return {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def weight_of(layer):
    """A view of a layer's weight as W (out, in)."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


@torch.no_grad()
def hessians(block, hidden, kwargs):
    """H (in, in) float32 of every linear layer of a block, over all calibration tokens. -> {name: H}.

    Layers that read the same tensor (q, k and v; gate and up) share one H.
    """
    total, seen, handles, tokens = {}, {}, [], 0

    def accumulate(name, layer, args):
        """Add x^T x of this call, once for all layers that read the same tensor. x (1, T, in)."""
        leader, x = seen.setdefault(id(args[0]), (name, args[0]))   # keeps x alive: its id cannot pass to another tensor
        if leader == name:
            x = x.reshape(-1, x.shape[-1]).float()         # (tokens, in)
            total[name] = total[name].addmm_(x.T, x) if name in total else x.T @ x
        total[name] = total[leader]

    for name, layer in linears_of(block).items():
        handles.append(layer.register_forward_pre_hook(functools.partial(accumulate, name)))
    for x in hidden:
        block(x, **kwargs)
        seen.clear()
        tokens += x.shape[:-1].numel()
    for handle in handles:
        handle.remove()
    for H in {id(H): H for H in total.values()}.values():
        H /= tokens
    return total


def relative_error(W, Q, H):
    """||X (W - Q)^T|| / ||X W^T|| from H alone: ||X D^T||^2 = tokens * trace(D H D^T). An H that is not finite counts as I."""
    W, D = W.float(), W.float() - Q.float()
    norm = lambda D: ((D @ H if H.isfinite().all() else D) * D).sum().clamp(min=0).sqrt().item()
    return norm(D) / max(norm(W), 1e-12)


def check_model(model, name, settings):
    """-> the settings of compressor `name`, defaults filled in. Raises UserError for what cannot work on this model."""
    if name not in COMPRESSORS:
        raise UserError(f"--compressor {name}: unknown; use one of: {' '.join(sorted(COMPRESSORS))}")
    function, _, takes = COMPRESSORS[name]
    unknown = set(settings).difference(*(entry[2] for entry in COMPRESSORS.values()))
    if unknown:
        raise UserError(f"--compressor {name}: unknown settings: {' '.join(sorted(unknown))}; it takes: {' '.join(takes)}")
    settings = {key: settings.get(key, inspect.signature(function).parameters[key].default) for key in takes}
    check(**{key: value for key, value in settings.items() if key in LIMITS})
    if settings.get("pattern"):
        settings = {key: value for key, value in settings.items() if key not in ("sparsity", "scope")}     # overridden
        for layer in linears_of(loading.blocks_of(model)).values():
            split_pattern(settings["pattern"], weight_of(layer).shape[1], settings.get("group_size", -1))
    return settings


@torch.no_grad()
def compress_model(model, tokenizer, name, calibration, device=None, grids=None, **settings):
    """Compress every linear layer of every block, in place; each block sees what the compressed ones before it give out.

    calibration: (nsamples, seqlen) token ids. device: where blocks are worked on, one at a time; the model itself may stay on
    the CPU. grids: a dict that receives {layer name: Grid or None} for packing. settings: those of other compressors are
    ignored, so that one set of flags serves all. Returns the report. tokenizer: unused, kept so that a compressor that needs
    text can have it. Raises UserError for a name or a setting that does not exist or cannot work.
    """
    settings, start, layers = check_model(model, name, settings), time.time(), {}
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or []
    if window and len(set(kinds)) > 1 and calibration.shape[1] > window:
        raise UserError(f"--seqlen {calibration.shape[1]}: this model has blocks with and without a sliding window, and the walk "
                        f"gives all the same mask; use at most {window}")
    blocks, prefix, home = loading.blocks_of(model), loading.arch_of(model).blocks, model.device
    device = torch.device(device or home)
    hidden, kwargs = first_block_inputs(model, calibration, device)
    for i, block in enumerate(tqdm(blocks, desc=f"{name}, blocks", disable=None)):             # None: quiet unless a terminal
        block.to(device)
        H = hessians(block, hidden, kwargs)
        for layer_name, layer in linears_of(block).items():
            path = f"{prefix}.{i}.{layer_name}"
            layers[path], grid = compress_layer(layer, H[layer_name], name, settings)
            if grids is not None:
                grids[path] = grid and grid.cpu()
        for j, x in enumerate(hidden):                     # one by one: old and new states never stand side by side
            hidden[j] = block_output(block, x, kwargs)
        block.to(home)
    return make_report(model, name, settings, calibration, layers, time.time() - start)


def compress_layer(layer, H, name, settings):
    """Compress one linear layer in place. -> its lines of the report, its Grid or None."""
    function, takes_H, takes = COMPRESSORS[name]
    W, details, start = weight_of(layer), {}, time.time()                                      # (out, in)
    Q = function(W, H, **settings, details=details) if takes_H else function(W, **settings, details=details)
    row = {"error": relative_error(W, Q, H), "sparsity": (Q == 0).float().mean().item(), "weights": Q.numel(),
           "bits": stored_bits(Q, details.get("grid"), "sparsity" in takes), "seconds": round(time.time() - start, 3)}
    if "note" in details:
        row["note"] = details["note"]
    layer.weight.data = Q.T.contiguous() if isinstance(layer, Conv1D) else Q
    return row, details.get("grid")


def mask_pays(Q, value_bits):
    """Is one bit a weight and value_bits a nonzero shorter than value_bits a weight?"""
    return Q.numel() + int((Q != 0).sum()) * value_bits < Q.numel() * value_bits


def stored_bits(Q, grid, prunes):
    """Bits that packing.py stores for a matrix: codes or values, scales, zero points, order; with a mask where that pays."""
    value_bits = grid.bits if grid else 8 * Q.element_size()
    masked = prunes and mask_pays(Q, value_bits)
    bits = Q.numel() + int((Q != 0).sum()) * value_bits if masked else Q.numel() * value_bits
    if grid:
        bits += grid.scale.numel() * (16 + (0 if grid.sym else grid.bits)) + (0 if grid.order is None else 32 * len(grid.order))
    return bits


def make_report(model, name, settings, calibration, layers, seconds):
    """compression.json: settings, every layer, totals."""
    weights, bits = sum(row["weights"] for row in layers.values()), sum(row["bits"] for row in layers.values())
    mean = lambda key: sum(row[key] * row["weights"] for row in layers.values()) / weights
    size = lambda parameter: parameter.numel() * parameter.element_size()
    rest = sum(map(size, model.parameters())) - sum(size(model.get_submodule(path).weight) for path in layers)
    return {"compressor": name, "settings": settings, "base_model": model.config.name_or_path,
            "calibration": {"nsamples": len(calibration), "seqlen": calibration.shape[1]}, "seconds": round(seconds, 2),
            "mean_error": mean("error"), "sparsity": mean("sparsity"), "bits_per_weight": bits / weights,
            "weight_bytes": math.ceil(rest + bits / 8), "versions": loading.versions(), "layers": layers}


def summary(report):
    """One line for people."""
    notes = sorted({row["note"] for row in report["layers"].values() if "note" in row})
    return (f"{report['compressor']} {json.dumps(report['settings'])}: relative output error {report['mean_error']:.4f}, "
            f"{report['bits_per_weight']:.3f} bits per weight, {100 * report['sparsity']:.2f} % zeros, "
            f"{report['seconds']:.1f} s" + (f"; {'; '.join(notes)}" if notes else ""))


# --- 2. The command ------------------------------------------------------------------------------------------------------------

def add_compression_flags(parser):
    """The flags that compress.py and recover.py share."""
    parser.add_argument("--compressor", default=None, choices=sorted(COMPRESSORS),
                        help="how to compress; magnitude for the toy model, gptq for others")
    parser.add_argument("--bits", type=int, default=3, help="bits per weight, 2 to 8")
    parser.add_argument("--group-size", type=int, default=64, help="columns that share a grid; -1: the whole row")
    parser.add_argument("--sym", action="store_true", help="symmetric grids, without zero points")
    parser.add_argument("--mse", action="store_true", help="fit grids by least squared error, clipping a few weights, instead of by min and max")
    parser.add_argument("--act-order", action="store_true", help="gptq: columns in descending order of diag H")
    parser.add_argument("--static-groups", action="store_true", help="gptq: fit all grids to the original weights")
    parser.add_argument("--percdamp", type=float, default=0.01, help="damping, relative to the mean of diag H")
    parser.add_argument("--sparsity", type=float, default=None, help="share of zeros, 0 to below 1; 0.6 for the toy model, 0.5 for others")
    parser.add_argument("--pattern", default=None, help="N:M, keep N of every M inputs, for example 2:4; overrides --sparsity")
    parser.add_argument("--scope", default="layer", choices=["layer", "row"], help="magnitude: what the share is counted over")
    parser.add_argument("--nsamples", type=int, default=32, help="calibration chunks")
    parser.add_argument("--seqlen", type=int, default=None, help="tokens per calibration chunk; 64 for the toy model, 512 for others")


def settings_from(args):
    """-> (compressor name, its settings). Raises UserError for values outside their range."""
    check(**{name: getattr(args, name) for name in LIMITS if name != "block_size"})
    if args.sparsity == 1:
        raise UserError(f"--sparsity {args.sparsity}: must be below 1, or nothing is left of the model; use for example 0.5")
    return args.compressor, {key: getattr(args, key) for key in COMPRESSORS[args.compressor][2]}


def calibration_ids(ids, nsamples, seqlen, seed=0):
    """Random chunks of a text. ids (tokens,) -> (nsamples, seqlen) long. Raises UserError when the text is too short."""
    if len(ids) < seqlen:
        raise UserError(f"--seqlen {seqlen}: the text has only {len(ids)} tokens; use a longer --text or a smaller --seqlen")
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(seqlen)]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    add_compression_flags(parser)
    parser.add_argument("--packed", action="store_true", help="write true bits, which only this project loads, instead of "
                        "dequantized weights")
    args = parser.parse_args(argv)
    loading.fill_defaults(args)
    args.compression = settings_from(args)
    if not args.out:
        raise UserError("--out: missing; name the folder to write, for example --out runs/compressed")
    loading.check_out(args.out, "compression.json")
    return args


def main(argv=None):
    """Compress a model and write a folder that any Hugging Face program loads."""
    args = parse(argv)
    name, settings = args.compression
    device = loading.pick_device(args.device)
    model, tokenizer = loading.load_model(args.model, "cpu", args.dtype)
    check_model(model, name, settings)                     # before the text is read and tokenized
    ids = loading.load_text(args.text, tokenizer, "train")
    calibration, grids = calibration_ids(ids, args.nsamples, args.seqlen, args.seed), {}
    report = compress_model(model, tokenizer, name, calibration, device, grids if args.packed else None, **settings)
    report["calibration"].update(text=args.text, seed=args.seed)
    for path, row in report["layers"].items():
        print(f"{path}: error {row['error']:.4f}, {row['bits'] / row['weights']:.3f} bits, {100 * row['sparsity']:.2f} % zeros "
              + row.get("note", ""))
    print(summary(report))
    write(args.out, model, tokenizer, report, grids)


def write(out, model, tokenizer, report, grids):
    """The folder `out`, whole or not at all: weights (packed if there are grids), tokenizer, compression.json."""
    with loading.whole_folder(out) as folder:
        if grids:
            import packing                                 # only --packed needs it
            report["packed_bytes"] = packing.save_packed(model, grids, report, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loading.write_json(folder / "compression.json", report)
    megabytes = sum(file.stat().st_size for file in pathlib.Path(out).glob("*.safetensors")) / 1e6
    print(f"wrote {out}: {megabytes:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    loading.run(main)
