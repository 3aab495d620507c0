"""Compress: every linear layer of every decoder block, one block at a time, by one of methods/'s compressors.

    python compress.py --model toy --compressor gptq --bits 3 --out runs/toy-gptq3           # seconds, CPU
    python compress.py --model facebook/opt-125m --compressor gptq --bits 3 --group-size -1 --text c4 \\
        --nsamples 128 --seqlen 2048 --device cuda --packed --out runs/opt3  # one block on the GPU at a time

The paper compresses with 3-bit GPTQ and with 50 % SparseGPT [§3.3]. lm_head and embeddings stay as they are.
Letters: W (out, in) a layer's weights, X (tokens, in) its inputs, H (in, in) = mean of x x^T over calibration
tokens, Q the compressed W.
"""
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import sys
import time

import torch

from methods.gptq import gptq, sparsegpt                   # noqa: F401, courses take the functions from here
from methods.pruning import magnitude, split_pattern       # noqa: F401
from methods.registry import COMPRESSORS
from methods.rounding import check_weights, rtn            # noqa: F401
from support import packing
from support.cli import FLAGS, UserError, check_limits, parse_flags, refuse_given, run
from support.data import check_text, load_text
from support.files import all_finite
from support.output import claim, write_json
from support.architectures import (
    arch_of, as_stored, blocks_of, check_room, linears_of, pick_device, pick_dtype, versions, weight_of)
from support.models import load_model
from support.progress import progress


# --- 1. The walk over the blocks ----------------------------------------------------------------------------

class Captured(Exception):
    """Raised by the capturing hook to stop the forward pass before the first block runs."""


@torch.no_grad()
def first_block_inputs(model, calibration, device):
    """What the first block is called with.

    calibration (nsamples, seqlen) -> [hidden (1, T, d), ...], keyword arguments. The other arguments (mask,
    positions) are those of one chunk: chunks are equally long and unpadded, so they are all alike.
    """
    block, hidden, kwargs = blocks_of(model)[0], [], {}
    names = list(inspect.signature(block.forward).parameters)

    def capture(block, args, given):
        """Keep what the first block is called with, and stop."""
        given = {**dict(zip(names, args)), **given}        # GPT-2 passes its mask by position
        hidden.append(given.pop(names[0]).to(device))
        kwargs.update({name: to_device(value, device) for name, value in given.items()})
        raise Captured

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    for row in calibration.to(model.device):
        with contextlib.suppress(Captured):
            model(row[None], use_cache=False)
    handle.remove()
    return hidden, kwargs


def to_device(value, device):
    """Tensors, and tuples of them such as (cos, sin), to the device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(to_device(v, device) for v in value) if isinstance(value, tuple) else value


@torch.no_grad()
def hessians(block, hidden, kwargs):
    """H (in, in) float32 of every linear layer of a block, over all calibration tokens. -> {name: H}.

    Layers that read the same tensor (q, k and v; gate and up) share one H.
    """
    total, seen, handles, tokens = {}, {}, [], 0

    def accumulate(name, layer, args):
        """Add x^T x of this call, once for all layers that read the same tensor. x (1, T, in)."""
        # kept, x stays alive: its id cannot pass to another tensor
        leader, x = seen.setdefault(id(args[0]), (name, args[0]))
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
    """||X (W - Q)^T|| / ||X W^T|| from H alone: ||X D^T||^2 = tokens * trace(D H D^T). -> float.

    The scales of W and H cancel, so they are divided out first: no square overflows. An H that is not finite
    counts as I.
    """
    size = W.abs().amax().float().item() or 1.0
    W, D = W.float() / size, (W.float() - Q.float()) / size                                 # (out, in)
    if all_finite(H):
        H = H / (H.diagonal().amax().item() or 1.0)
        norm = lambda D: ((D @ H) * D).sum().clamp(min=0).sqrt().item()
    else:
        norm = lambda D: D.norm().item()
    return norm(D) / max(norm(W), 1e-12)


def check_model(model, name, settings):
    """-> the settings of compressor `name`, defaults filled in.

    Raises UserError for what cannot work on this model.
    """
    if name not in COMPRESSORS:
        raise UserError(f"--compressor {name}: unknown; use one of: {' '.join(sorted(COMPRESSORS))}")
    function, _, takes = COMPRESSORS[name]
    unknown = set(settings).difference(*(entry.settings for entry in COMPRESSORS.values()))
    if unknown:
        raise UserError(f"--compressor {name}: unknown settings: {' '.join(sorted(unknown))}; it takes: "
                        f"{' '.join(takes)}")
    settings = {key: settings.get(key, inspect.signature(function).parameters[key].default) for key in takes}
    check_limits(**{key: value for key, value in settings.items() if key in FLAGS})
    if settings.get("pattern"):
        settings = {key: value for key, value in settings.items() if key != "sparsity"}        # overridden
        for layer in linears_of(blocks_of(model)).values():
            split_pattern(settings["pattern"], weight_of(layer).shape[1], settings.get("group_size", -1))
    return settings


@torch.no_grad()
def compress_model(model, tokenizer, name, calibration, device=None, grids=None, codes=True, observe=None,
                   **settings):
    """Compress every linear layer of every block, in place; each block sees what compressed ones give out.

    calibration: (nsamples, seqlen) token ids. device: where blocks are worked on, one at a time; the model
    itself may stay on the CPU. grids: a dict that receives {layer path: Grid or None}; codes: with the codes,
    which only packing needs (a byte a weight). observe: a function (path, W, Q, H), called after each layer,
    for every compressor, with its dense and its compressed weights (out, in) and the H (in, in) of its inputs
    in this walk: behind blocks that are compressed already. settings: those of other compressors are ignored,
    so that one set of flags serves all. Returns the report. tokenizer: unused, kept so that a compressor that
    needs text can have it. Raises UserError for a name or a setting that does not exist or cannot work, and
    for a layer whose weights or inputs are not finite.
    """
    settings, start, layers = check_model(model, name, settings), time.time(), {}
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or []
    if window and len(set(kinds)) > 1 and calibration.shape[1] > window:
        raise UserError(f"--seqlen {calibration.shape[1]}: this model has blocks with and without a sliding "
                        f"window, and the walk gives all the same mask; use at most {window}")
    blocks, prefix, home = blocks_of(model), arch_of(model).blocks, model.device
    device = torch.device(device or home)
    hidden, kwargs = first_block_inputs(model, calibration, device)
    for i, block in enumerate(progress(blocks, desc=f"{name}, blocks")):
        block.to(device)
        for layer_name, layer in linears_of(block).items():
            check_weights(weight_of(layer), f"--model: {prefix}.{i}.{layer_name}")
        H = hessians(block, hidden, kwargs)
        check_hessians(H, f"{prefix}.{i}")
        for layer_name, layer in linears_of(block).items():
            path = f"{prefix}.{i}.{layer_name}"
            see = observe and functools.partial(observe, path)
            layers[path], grid = compress_layer(layer, H[layer_name], name, settings, see)
            if grids is not None:
                grids[path] = grid and (grid if codes else dataclasses.replace(grid, code=None)).to("cpu")
        for j, x in enumerate(hidden):  # one by one: old and new states never stand side by side
            hidden[j] = block(x, **kwargs)
        block.to(home)
    model.compression = make_report(model, name, settings, calibration, layers, time.time() - start)
    return model.compression


def check_hessians(H, block):
    """Raise UserError, naming the layer, when its inputs overflow or the block before it gives out NaNs."""
    for name, matrix in H.items():
        if not all_finite(matrix):
            raise UserError(f"--model: the inputs of {block}.{name} are not finite (a broken layer before "
                            "it, or numbers too large for this dtype); use --dtype float32, or another copy "
                            "of the model")


def compress_layer(layer, H, name, settings, observe=None):
    """Compress one linear layer in place; observe, if any, sees W, Q, H. -> its lines of the report, its Grid
    or None.
    """
    function, takes_H, takes = COMPRESSORS[name]
    W, details, start = weight_of(layer), {}, time.time()                                      # (out, in)
    Q = function(W, H, **settings, details=details) if takes_H else function(W, **settings, details=details)
    row = {"error": relative_error(W, Q, H), "sparsity": (Q == 0).float().mean().item(), "weights": Q.numel(),
           "bits": packing.stored_bits(Q, details.get("grid"), "sparsity" in takes),
           "seconds": round(time.time() - start, 3)}
    if "note" in details:
        row["note"] = details["note"]
    layer.weight.data = as_stored(layer, Q)
    if observe:
        observe(W, Q, H)
    return row, details.get("grid")


def make_report(model, name, settings, calibration, layers, seconds):
    """compression.json: settings, every layer, totals."""
    weights, bits = (sum(row[key] for row in layers.values()) for key in ("weights", "bits"))
    mean = lambda key: sum(row[key] * row["weights"] for row in layers.values()) / weights
    size = lambda parameter: parameter.numel() * parameter.element_size()
    rest = sum(map(size, model.parameters())) - sum(size(model.get_submodule(path).weight) for path in layers)
    return {"compressor": name, "settings": settings, "base_model": model.config.name_or_path,
            "calibration": {"nsamples": len(calibration), "seqlen": calibration.shape[1]},
            "seconds": round(seconds, 2),
            "mean_error": mean("error"), "sparsity": mean("sparsity"), "bits_per_weight": bits / weights,
            "weight_bytes": math.ceil(rest + bits / 8), "versions": versions(), "layers": layers}


def summary(report):
    """One line for people."""
    notes = sorted({row["note"] for row in report["layers"].values() if "note" in row})
    return (f"{report['compressor']} {json.dumps(report['settings'])}: "
            f"relative output error {report['mean_error']:.4f}, "
            f"{report['bits_per_weight']:.3f} bits per weight, {100 * report['sparsity']:.2f} % zeros, "
            f"{report['seconds']:.1f} s" + (f"; {'; '.join(notes)}" if notes else ""))


# --- 2. The command -----------------------------------------------------------------------------------------

COMPRESSION_FLAGS = ("compressor", "bits", "group_size", "sym", "mse", "act_order", "static_groups",
                     "percdamp", "sparsity", "pattern", "nsamples", "seqlen")


def settings_from(args):
    """-> (compressor name, its settings). Raises UserError for a flag that this compressor would ignore."""
    takes = COMPRESSORS[args.compressor].settings
    refuse_given(args, set(COMPRESSION_FLAGS) - {"compressor", "nsamples", "seqlen"} - set(takes),
                 f"{args.compressor} has no such setting; leave it out, or use another --compressor")
    if args.pattern:
        refuse_given(args, {"sparsity"}, "--pattern says how many zeros there are; give one of the two")
    return args.compressor, {key: getattr(args, key) for key in takes}


def calibration_ids(ids, nsamples, seqlen, seed=0):
    """Random chunks of a text. ids (tokens,) -> (nsamples, seqlen) long.

    Raises UserError when the text is too short.
    """
    if len(ids) < seqlen:
        raise UserError(f"--seqlen {seqlen}: the text has only {len(ids)} tokens; use a longer --text or a "
                        "smaller --seqlen")
    starts = torch.randint(len(ids) - seqlen + 1, (nsamples,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(seqlen)]


def refuse_compressed(model, name):
    """Raise UserError for a model that is compressed already: its report would not name the first time."""
    if model.compression:
        raise UserError(f"--model {name}: is compressed already ({model.compression['compressor']}); give "
                        f"the dense model, {model.compression['base_model']}")


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    names = ["model", "device", "dtype", "seed", "text", *COMPRESSION_FLAGS, "packed", "out"]
    args = parse_flags(__doc__, names, argv, choices={"compressor": COMPRESSORS})
    args.compression = settings_from(args)
    check_text(args.text)
    if args.out is None:
        raise UserError("--out: missing; name the folder to write, for example --out runs/compressed")
    return args


def main(argv=None):
    """Compress a model and write a folder that any Hugging Face program loads."""
    args = parse(argv)
    name, settings = args.compression
    device = pick_device(args.device)
    with claim(args.out) as out:
        model, tokenizer = load_model(args.model, "cpu", pick_dtype(args.dtype, device, args.model))
        refuse_compressed(model, args.model)
        check_model(model, name, settings)                 # before the text is read and tokenized
        check_room(model, "--seqlen", args.seqlen)
        ids = load_text(args.text, tokenizer, "train")
        calibration, grids = calibration_ids(ids, args.nsamples, args.seqlen, args.seed), {}
        report = compress_model(model, tokenizer, name, calibration, device, grids, args.packed, **settings)
        report["calibration"].update(text=args.text, seed=args.seed)
        for path, row in report["layers"].items():
            print(f"{path}: error {row['error']:.4f}, {row['bits'] / row['weights']:.3f} bits, "
                  f"{100 * row['sparsity']:.2f} % zeros {row.get('note', '')}".rstrip())
        print(summary(report))
        with out.folder() as folder:
            write_model(folder, model, tokenizer, report, grids, args.packed)
            megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    print(f"wrote {args.out}: {megabytes:.2f} MB", file=sys.stderr)


def write_model(folder, model, tokenizer, report, grids, packed):
    """Weights (packed, or dequantized with their grids beside them), tokenizer, compression.json."""
    prunes = "sparsity" in COMPRESSORS[report["compressor"]].settings
    if packed:
        report["packed_bytes"] = packing.save_packed(model, grids, prunes, folder)
    else:
        model.save_pretrained(folder)
        packing.save_grids(grids, folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "compression.json", report)


if __name__ == "__main__":
    run(main)
