"""Packing: a compressed model in as many bits as it needs, in one safetensors file, and back.

    python compress.py --model toy --compressor gptq --bits 3 --packed --out runs/toy-gptq3
    model, tokenizer = load_model("runs/toy-gptq3")        # the same weights, bit for bit

What packed.safetensors holds for a layer of `out` rows, `in` columns and `groups` groups a row, by its name:

    .codes    out * in * bits               index on the grid, row by row, as one stream of bits
    .scales   out * groups * 16             float16
    .zeros    out * groups * bits           zero points, packed like codes; absent when symmetric
    .order    in * 32                       act-order's permutation; absent otherwise
    .mask     out * in                      1 where a weight is not zero, in the order of .codes; only where
                                            it takes fewer bits, and then .codes holds the nonzeros alone
    .values   nonzeros * 16 or 32           pruned, not quantized: what is left, in the model's dtype

All other tensors (embeddings, norms, biases, head) stand as they are, under their own names; tied ones once.
The header says how to read the file: {"dtype", "layers": {name: {"bits", "group_size", "sym", "parts"}}};
bits is null for .values.

A folder of plain weights has compression.grids beside them: .scales, .zeros and .order of every layer, by
which weights that were changed (a merged LoRA) are rounded back. It is a safetensors file too; its name says
otherwise because other programs read every *.safetensors of a folder as weights.

Nothing multiplies with packed weights: loading gives ordinary floating-point weights.
"""
import collections
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

from support.architectures import as_stored, linears_in_blocks, weight_of
from support.cli import DTYPES, UserError
from support.files import (
    BOOL, OBJECT, Tensors, list_of, one_of, or_null, parse_json, read_fields, whole_number)
from support.weights import fill, skeleton

FILE, GRIDS = "packed.safetensors", "compression.grids"
AGAIN = "write it again with compress.py"
HEADER = "packed"                                          # the key of our header in a file's metadata


# --- 1. Bits ------------------------------------------------------------------------------------------------

def bytes_for(count, bits):
    """Bytes of a stream of `count` numbers of `bits` bits."""
    return -(-count * bits // 8)


def pack_bits(codes, bits):
    """Whole numbers below 2^bits as one stream of bits. codes (...) uint8 or bool -> (bytes,) uint8."""
    codes = codes.reshape(-1).numpy().view(np.uint8)
    low = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")  # (count, bits), lowest first
    return torch.from_numpy(np.packbits(low, bitorder="little"))


def unpack_bits(packed, bits, count):
    """The inverse of pack_bits. packed (bytes,) uint8 -> (count,) uint8."""
    low = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(low, axis=1, bitorder="little")[:, 0])


def masked_bits(Q, value_bits):
    """Bits of Q with a mask: one a weight, and value_bits a nonzero."""
    return Q.numel() + int((Q != 0).sum()) * value_bits


def stored_bits(Q, grid, prunes):
    """Bits of what pack_matrix makes: codes or values, scales, zero points, order; a mask where that pays."""
    value_bits = grid.bits if grid else 8 * Q.element_size()
    bits = Q.numel() * value_bits
    if prunes:
        bits = min(bits, masked_bits(Q, value_bits))
    if grid:
        bits += grid.scale.numel() * (16 + (0 if grid.sym else grid.bits))
        bits += 0 if grid.order is None else 32 * len(grid.order)
    return bits


# --- 2. One matrix ------------------------------------------------------------------------------------------

def dequantize(code, scale, zero, group_size, order=None, dtype=torch.float32):
    """W[:, order[j]] = scale[:, j // group_size] * (code[:, j] - zero[:, j // group_size]). -> W (out, in).

    code (out, in) and zero (out, groups) uint8; scale (out, groups) float16; order (in,) long, None: as they
    stand.
    """
    group = torch.arange(code.shape[1], device=code.device) // group_size                       # (in,)
    W = scale.float()[:, group] * (code.float() - zero.float()[:, group])
    W = (W if order is None else W[:, order.argsort()]).to(dtype)
    return W.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)  # a grid may reach beyond float16's 65,504


def pack_grid(grid):
    """A Grid without its codes -> {suffix: tensor}."""
    tensors = {"scales": grid.scale.contiguous()}
    if not grid.sym:
        tensors["zeros"] = pack_bits(grid.zero, grid.bits)
    if grid.order is not None:
        tensors["order"] = grid.order.int()
    return tensors


def unpack_grid(tensors, bits, group_size, sym):
    """The inverse of pack_grid. -> what Grid(code=None, **it) takes."""
    scale = tensors["scales"]                              # (out, groups)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zero = unpack_bits(tensors["zeros"], bits, scale.numel()).view(scale.shape)
    order = tensors["order"].long() if "order" in tensors else None
    return {"scale": scale, "zero": zero, "group_size": group_size, "bits": bits, "sym": sym, "order": order}


def pack_matrix(Q, grid, prunes):
    """Q (out, in) and its Grid (None: not quantized) -> {suffix: tensor}. prunes: may zeros be left out?"""
    tensors, value_bits = {}, grid.bits if grid else 8 * Q.element_size()
    values = grid.code if grid else Q                      # (out, in)
    if prunes and masked_bits(Q, value_bits) < Q.numel() * value_bits:
        # column j of the codes is column order[j] of Q, so the mask of the codes is permuted as they are
        mask = (Q if not grid or grid.order is None else Q[:, grid.order]) != 0
        tensors["mask"], values = pack_bits(mask, 1), values[mask]                              # (nonzeros,)
    if not grid:
        return {**tensors, "values": values.contiguous()}
    return {**tensors, "codes": pack_bits(values, grid.bits), **pack_grid(grid)}


def unpack_matrix(tensors, shape, bits, group_size, sym, dtype=torch.float32):
    """The inverse of pack_matrix. dtype: what Q had. -> Q (out, in)."""
    mask, count = None, shape[0] * shape[1]
    if "mask" in tensors:
        mask = unpack_bits(tensors["mask"], 1, count).bool().view(shape)
        count = int(mask.sum())
    if bits is None:
        values = tensors["values"]
        return torch.zeros(shape, dtype=dtype).masked_scatter_(mask, values) if mask is not None else values
    grid, code = unpack_grid(tensors, bits, group_size, sym), unpack_bits(tensors["codes"], bits, count)
    if mask is not None:                                   # no code: the zero point stands for the weight 0
        all_zero = grid["zero"].repeat_interleave(group_size, dim=1)[:, :shape[1]].contiguous()
        code = all_zero.masked_scatter_(mask, code)
    code = code.view(shape)                                # (out, in)
    return dequantize(code, grid["scale"], grid["zero"], group_size, grid["order"], dtype)


# --- 3. Writing a model -------------------------------------------------------------------------------------

def write(file, layers, dtype, rest):
    """A safetensors file with our header. layers: {path: (Grid or None, {suffix: tensor})}; rest: others."""
    tensors, lines = dict(rest), {}
    for path, (grid, parts) in layers.items():
        tensors.update({f"{path}.{suffix}": tensor for suffix, tensor in parts.items()})
        lines[path] = {key: getattr(grid, key, None) for key in ("bits", "group_size", "sym")}
        lines[path]["parts"] = sorted(parts)
    header = {"dtype": str(dtype).removeprefix("torch."), "layers": lines}
    save_file(tensors, file, metadata={"format": "pt", HEADER: json.dumps(header, separators=(",", ":"))})


def save_packed(model, grids, prunes, folder):
    """Write packed.safetensors and the config's two files into `folder`. -> bytes of packed.safetensors.

    grids: {path: Grid with its codes, or None}, as compress_model fills it. prunes: as in pack_matrix.
    """
    file = pathlib.Path(folder) / FILE
    layers = {path: (grid, pack_matrix(weight_of(model.get_submodule(path)).cpu(), grid, prunes))
              for path, grid in grids.items()}
    rest = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()
            if name.removesuffix(".weight") not in grids}
    write(file, layers, model.dtype, rest)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return file.stat().st_size


def save_grids(grids, folder):
    """Write compression.grids into `folder`, unless nothing was quantized. grids: {path: Grid or None}."""
    layers = {path: (grid, pack_grid(grid) if grid else {}) for path, grid in grids.items()}
    if any(grids.values()):
        write(pathlib.Path(folder) / GRIDS, layers, torch.float16, {})


# --- 4. Reading one: nothing is believed that does not fit the model ----------------------------------------

Stored = collections.namedtuple("Stored", "bits group_size sym parts")     # a layer's line of the header


def layer_shapes(model):
    """{path: (out, in)} of every linear layer inside the blocks."""
    return {path: tuple(weight_of(layer).shape) for path, layer in linears_in_blocks(model).items()}


def read_header(file, shapes, codes):
    """An open file's header, checked. codes: is it of codes, or of grids alone?

    -> dtype, {path: Stored}, one for each of `shapes`. Raises UserError.
    """
    fields = parse_json(file.metadata.get(HEADER, ""), f"{file.path}: its header", "--model")
    dtype = DTYPES[fields("dtype", one_of(*DTYPES))]
    lines = fields.within("layers")
    layers = {path: read_line(lines.within(path), columns) for path, (_, columns) in shapes.items()}
    for path, stored in layers.items():
        check_parts(file, path, stored, codes)
    return dtype, layers


def read_line(line, columns):
    """A layer's line of the header, checked. line: Fields; columns: inputs of the layer. -> Stored."""
    bits = line("bits", or_null(whole_number(2, 8)))
    if bits is None:
        return Stored(None, None, None, line("parts", list_of(one_of("mask", "values"))))
    return Stored(bits, line("group_size", whole_number(1, columns)), line("sym", BOOL),
                  line("parts", list_of(one_of("codes", "mask", "order", "scales", "zeros"))))


def check_parts(file, path, stored, codes):
    """Refuse a layer whose parts are not those that its bits ask for."""
    quantized = stored.bits is not None
    must = {"scales": quantized, "zeros": stored.sym is False,
            "codes": quantized and codes, "values": codes and not quantized}
    may = {"order": quantized, "mask": codes}
    needed, others = ({part for part, yes in parts.items() if yes} for parts in (must, may))
    if not needed <= set(stored.parts) <= needed | others or len(stored.parts) > len(set(stored.parts)):
        raise UserError(f"{file.where}: {path} has the parts {' '.join(stored.parts) or 'none'}, and needs "
                        f"{' '.join(sorted(needed)) or 'none'}; {AGAIN}")


def part_names(layers):
    """Names of the tensors that a header speaks of. layers: {path: Stored}."""
    return [f"{path}.{suffix}" for path, stored in layers.items() for suffix in stored.parts]


def read_parts(file, path, stored, shape, dtype):
    """The tensors of a layer, checked against its shape (out, in). -> {suffix: tensor}. Raises UserError."""
    tensors, count = {}, shape[0] * shape[1]
    if "mask" in stored.parts:                             # it says how many codes or values there are
        tensors["mask"] = file.read(f"{path}.mask", (bytes_for(count, 1),), [torch.uint8])
        count = int(unpack_bits(tensors["mask"], 1, count).sum())
    bits, groups = stored.bits or 0, -(-shape[1] // (stored.group_size or 1))
    forms = {"codes": ((bytes_for(count, bits),), torch.uint8),
             "values": ((count,) if "mask" in tensors else shape, dtype),
             "scales": ((shape[0], groups), torch.float16), "order": ((shape[1],), torch.int32),
             "zeros": ((bytes_for(shape[0] * groups, bits),), torch.uint8)}
    for suffix in sorted(set(stored.parts) - {"mask"}):
        form, kind = forms[suffix]
        tensors[suffix] = file.read(f"{path}.{suffix}", form, [kind])
    if "scales" in tensors and not bool((tensors["scales"] > 0).all()):
        raise UserError(f"{file.where}: {path}.scales holds numbers that are not above 0; {AGAIN}")
    order = tensors.get("order")
    if order is not None and order.sort().values.tolist() != list(range(len(order))):
        raise UserError(f"{file.where}: {path}.order does not name every column once; {AGAIN}")
    return tensors


@torch.no_grad()
def load_packed(config, folder, dtype):
    """The model of a packed folder, its weights in `dtype`, on the CPU. Raises UserError.

    The file is compared with the model that config describes, tensor by tensor, before that tensor is read.
    """
    empty = skeleton(config, folder)                       # names and shapes, no memory
    shapes, weights = layer_shapes(empty), {}
    with Tensors(pathlib.Path(folder) / FILE, "--model") as file:
        stored_dtype, layers = read_header(file, shapes, codes=True)
        rest = {name: tuple(tensor.shape) for name, tensor in empty.named_parameters()
                if name.removesuffix(".weight") not in layers}
        file.exactly([*part_names(layers), *rest])
        for name, shape in rest.items():
            weights[name] = file.read(name, shape, list(DTYPES.values())).to(dtype)
        for path, stored in layers.items():
            tensors = read_parts(file, path, stored, shapes[path], stored_dtype)
            # first as it was before it was packed, whose dtype may hold less than the one that is asked for
            Q = unpack_matrix(tensors, shapes[path], *stored[:3], stored_dtype).to(dtype)       # (out, in)
            weights[f"{path}.weight"] = as_stored(empty.get_submodule(path), Q)
    return fill(empty, weights, dtype, folder)


def read_grids(model, folder):
    """The grids of a compressed folder: {path: dict(scale, zero, group_size, bits, sym, order)}, for a Grid.

    model: as loaded from `folder`, or any of its shape. {} where nothing was quantized. Raises UserError for
    a file that is damaged or belongs to another model, and for a quantized folder that has lost it.
    """
    folder, shapes = pathlib.Path(folder), layer_shapes(model)
    packed = (folder / FILE).exists()
    path, report = folder / (FILE if packed else GRIDS), folder / "compression.json"
    if not path.exists():
        if report.exists() and "bits" in read_fields(report, "--model")("settings", OBJECT, {}):
            raise UserError(f"--model {folder}: is quantized and has lost {GRIDS}, its grids; {AGAIN}")
        return {}
    with Tensors(path, "--model") as file:
        dtype, layers = read_header(file, shapes, codes=packed)
        if not packed:
            file.exactly(part_names(layers))
        layers = {name: stored._replace(parts=set(stored.parts) - {"codes", "mask"})
                  for name, stored in layers.items() if stored.bits}
        return {name: unpack_grid(read_parts(file, name, stored, shapes[name], dtype), *stored[:3])
                for name, stored in layers.items()}
