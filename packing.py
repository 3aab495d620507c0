"""Packing: a compressed model in as many bits as it needs, in one safetensors file, and back.

    python compress.py --model toy --compressor gptq --bits 3 --packed --out runs/toy-gptq3      # writes packed.safetensors
    model, tokenizer = loading.load_model("runs/toy-gptq3")                                      # the same weights, bit for bit

What is stored for a layer of `out` rows, `in` columns and `groups` groups a row, under the layer's name:

    .codes    out * in * bits               index on the grid, row by row, as one stream of bits
    .scales   out * groups * 16             float16
    .zeros    out * groups * bits           zero points, packed like codes; absent when symmetric
    .order    in * 32                       act-order's permutation; absent otherwise
    .mask     out * in                      1 where a weight is not zero; only where it pays (compress.py:mask_pays), and then
                                            .codes holds the nonzeros alone
    .values   nonzeros * 16 or 32           pruned, not quantized: the weights that are left, in the model's dtype

All other tensors (embeddings, norms, biases, head) stand as they are, under their own names; tied ones once. The header says
how to read the file: {"dtype", "layers": {name: {"bits", "group_size", "sym", "parts"}}}; bits is null for .values.

What it does not do: multiply with packed weights. Loading gives ordinary floating-point weights.
"""
import json
import pathlib

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import compress
from compressors import COMPRESSORS, Grid
from loading import DTYPES, UserError

FILE = "packed.safetensors"


# --- 1. Bits --------------------------------------------------------------------------------------------------------------

def pack_bits(codes, bits):
    """Whole numbers below 2^bits as one stream of bits. codes (...) uint8 or bool -> (ceil(count * bits / 8),) uint8."""
    codes = codes.reshape(-1).numpy().view(np.uint8)
    low = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")                 # (count, bits), lowest first
    return torch.from_numpy(np.packbits(low, bitorder="little"))


def unpack_bits(packed, bits, count):
    """The inverse of pack_bits. packed (bytes,) uint8 -> (count,) uint8."""
    low = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(low, axis=1, bitorder="little")[:, 0])


# --- 2. One matrix --------------------------------------------------------------------------------------------------------

def pack_matrix(Q, grid, prunes):
    """Q (out, in) and its Grid (None: not quantized) -> {suffix: tensor}. prunes: may zeros be left out?"""
    tensors, value_bits = {}, grid.bits if grid else 8 * Q.element_size()
    values = grid.code if grid else Q                      # (out, in)
    if prunes and compress.mask_pays(Q, value_bits):
        mask = Q != 0
        tensors["mask"], values = pack_bits(mask, 1), values[mask]                             # (nonzeros,)
    if not grid:
        return {**tensors, "values": values.contiguous()}
    tensors.update(codes=pack_bits(values, grid.bits), scales=grid.scale.contiguous())
    if not grid.sym:
        tensors["zeros"] = pack_bits(grid.zero, grid.bits)
    if grid.order is not None:
        tensors["order"] = grid.order.int()
    return tensors


def unpack_matrix(tensors, shape, bits, group_size, sym):
    """The inverse of pack_matrix. -> Q (out, in), float32 if quantized, else in the dtype it had."""
    mask = torch.ones(shape, dtype=torch.bool)
    if "mask" in tensors:
        mask = unpack_bits(tensors["mask"], 1, mask.numel()).bool().view(shape)
    if bits is None:
        return torch.zeros(shape, dtype=tensors["values"].dtype).masked_scatter_(mask, tensors["values"])
    scale = tensors["scales"]                              # (out, groups)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zero = unpack_bits(tensors["zeros"], bits, scale.numel()).view(scale.shape)
    # where there is no code, the zero point stands for the weight 0
    code = zero.repeat_interleave(group_size, dim=1)[:, :shape[1]].contiguous()                 # (out, in)
    code.masked_scatter_(mask, unpack_bits(tensors["codes"], bits, int(mask.sum())))
    order = tensors["order"].long() if "order" in tensors else None
    return Grid(code, scale, zero, group_size, bits, sym, order).dequantize()


# --- 3. A whole model --------------------------------------------------------------------------------------------------------

def save_packed(model, grids, report, folder):
    """Write packed.safetensors and config.json into `folder`. -> bytes of packed.safetensors.

    grids: {layer name: Grid or None}, as compress.py:compress_model fills it.
    """
    prunes, tensors, layers = "sparsity" in COMPRESSORS[report["compressor"]][2], {}, {}
    for path, grid in grids.items():
        parts = pack_matrix(compress.weight_of(model.get_submodule(path)).cpu(), grid, prunes)
        tensors.update({f"{path}.{suffix}": tensor for suffix, tensor in parts.items()})
        layers[path] = {"bits": grid and grid.bits, "group_size": grid and grid.group_size, "sym": grid and grid.sym,
                        "parts": sorted(parts)}
    stored = set()                                         # where tied tensors lie in memory
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in grids and tensor.data_ptr() not in stored:
            stored.add(tensor.data_ptr())
            tensors[name] = tensor.cpu().contiguous()
    header = json.dumps({"dtype": str(model.dtype).removeprefix("torch."), "layers": layers}, separators=(",", ":"))
    save_file(tensors, pathlib.Path(folder) / FILE, metadata={"format": "pt", "packed": header})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return (pathlib.Path(folder) / FILE).stat().st_size


@torch.no_grad()
def load_packed(model, folder):
    """Fill a model built from the folder's config. Raises UserError for a file that is damaged or belongs to another model."""
    path = pathlib.Path(folder) / FILE
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["packed"])
            names = fill(model, header["layers"], DTYPES[header["dtype"]], file)
    except (SafetensorError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model {folder}: {FILE} cannot be read ({error}); write it again with compress.py --packed") from error
    missing = [name for name, _ in model.named_parameters() if name not in names]              # tied ones are listed once
    if missing:
        raise UserError(f"--model {folder}: {FILE} lacks {missing[0]}; write it again with compress.py --packed")


def fill(model, layers, dtype, file):
    """Copy everything in an open file into the model. dtype: what the model had when it was packed. -> the names filled."""
    packed = set()
    for path, how in layers.items():
        W = compress.weight_of(model.get_submodule(path))                                      # (out, in), a view
        suffixes = how.pop("parts")
        tensors = {suffix: file.get_tensor(f"{path}.{suffix}") for suffix in suffixes}
        W.copy_(unpack_matrix(tensors, W.shape, **how).to(dtype))
        packed.update(f"{path}.{suffix}" for suffix in suffixes)
    rest = {name: file.get_tensor(name) for name in file.keys() if name not in packed}
    model.load_state_dict(rest, strict=False)
    return set(rest) | {f"{path}.weight" for path in layers}
