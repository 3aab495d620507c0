"""Packed folders: the same weights come back, in no more bytes than the report says; damaged ones are refused
in words."""
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compress import COMPRESSORS, compress_model, write_model
from conftest import CONFIGS, tiny_model, tiny_tokenizer
from methods.rounding import Grid, rtn
from support import architectures, models, packing
from support.cli import UserError

IDS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0))


def pack(model, folder, name, **settings):
    """Compress a model, write it packed. -> report, bytes."""
    grids = {}
    report = compress_model(model, None, name, IDS, grids=grids, **settings)
    return report, packing.save_packed(model, grids, "sparsity" in COMPRESSORS[name].settings, folder)


def load(folder, dtype=torch.float32):
    """As models.py does."""
    return packing.load_packed(AutoConfig.from_pretrained(folder), folder, dtype)


def one_block(arch):
    """A tiny model of a single block: what depends on the settings alone needs no more."""
    return tiny_model(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 1})


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype, key


# --- bits ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_back(bits):
    for count in (1, 7, 8, 1001):
        codes = torch.randint(2 ** bits, (count,), generator=torch.Generator().manual_seed(count)).byte()
        packed = packing.pack_bits(codes, bits)
        assert packed.dtype == torch.uint8
        assert len(packed) == -(-count * bits // 8) == packing.bytes_for(count, bits)
        assert torch.equal(packing.unpack_bits(packed, bits, count), codes)


def test_the_stream_by_hand():
    """Lowest bit first: 3-bit codes 1, 2, 7 are 100 010 111, read from the right 1101 0001 and then 1."""
    assert packing.pack_bits(torch.tensor([1, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11010001, 0b1]


# --- whole models -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", sorted(CONFIGS))
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_weights_come_back_bit_for_bit(name, arch, tmp_path):
    model = tiny_model(arch)
    pack(model, tmp_path, name, group_size=12)             # 32 and 48 columns: the last group is short
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("name, settings", [
    *(("gptq", dict(bits=bits)) for bits in range(2, 9)), ("gptq", dict(act_order=True, group_size=-1)),
    ("gptq", dict(act_order=True, static_groups=True)), ("gptq", dict(mse=True)), ("rtn", dict(sym=True)),
    ("magnitude", dict(sparsity=0.0)), ("magnitude", dict(sparsity=0.9)), ("sparsegpt", dict(pattern="2:4")),
    ("sparsegpt_gptq", dict(sparsity=0.7, sym=True)), ("sparsegpt_gptq", dict(sparsity=0.1, bits=2))],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_setting_and_dtype(name, settings, dtype, tmp_path):
    for arch in ("llama", "gpt2"):
        model = one_block(arch).to(dtype)
        pack(model, tmp_path, name, **settings)
        assert_same(load(tmp_path, dtype), model)
        # half-precision weights read as float32 are the half-precision weights, as from a folder that is not
        # packed
        assert_same(load(tmp_path), model.float())


@pytest.mark.parametrize("name, settings, tied", [
    *(("rtn", dict(bits=bits), bits == 3) for bits in (2, 3, 4, 8)), ("rtn", dict(sym=True), True),
    ("rtn", dict(bits=2, group_size=-1), False), ("gptq", dict(act_order=True), True),
    ("magnitude", dict(sparsity=0.5), False), ("magnitude", dict(sparsity=0.0), True),
    ("sparsegpt", dict(pattern="2:4"), False), ("sparsegpt_gptq", dict(sparsity=0.5), True),
    ("sparsegpt_gptq", dict(sparsity=0.5, bits=2), False)], ids=str)
def test_bytes_on_disk(name, settings, tied, tmp_path):
    """At most 1.02 times what the report calls weight_bytes, and never less: nothing is left out."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=256, intermediate_size=688,
                                  num_hidden_layers=2,
                                  num_attention_heads=4, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    report, size = pack(model, tmp_path, name, **settings)
    assert size == (tmp_path / packing.FILE).stat().st_size
    assert report["weight_bytes"] <= size <= 1.02 * report["weight_bytes"]
    assert ("lm_head.weight" in load_file(tmp_path / packing.FILE)) != tied
    loaded = load(tmp_path, torch.bfloat16)
    assert_same(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_packed_model_computes_and_ends_as_the_one_that_was_packed(tmp_path):
    """What is computed and not stored (rotary frequencies) is there too, and generation_config.json
    counts."""
    for arch in CONFIGS:
        model = tiny_model(arch)
        model.generation_config.eos_token_id = [2, 7]
        pack(model, tmp_path, "rtn")
        loaded = load(tmp_path)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits), arch
        assert loaded.generation_config.eos_token_id == [2, 7] and not loaded.training


@pytest.mark.parametrize("act_order", [False, True])
def test_pruned_and_act_ordered_at_once(act_order):
    """No compressor here does both; the mask then lies in the order of the codes."""
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1)) if act_order else None
    W[torch.rand(6, 32, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
    details = {}
    rtn(W if order is None else W[:, order], 8, 12, details=details)
    grid = details["grid"]
    grid.order = order
    Q = grid.dequantize()
    tensors = packing.pack_matrix(Q, grid, prunes=True)
    assert "mask" in tensors and torch.equal(packing.unpack_matrix(tensors, (6, 32), 8, 12, False), Q)


def test_the_bits_of_a_report_are_those_of_the_parts():
    W = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    for bits, sym, zeros, prunes in ((2, False, 0.5, True), (8, True, 0.5, True), (3, False, 0.0, False),
                                     (8, False, 0.0, True)):
        details = {}
        Q = rtn(W.masked_fill(torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < zeros, 0),
                bits, 16, sym,
                details=details)
        tensors = packing.pack_matrix(Q, details["grid"], prunes)
        size = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert 0 <= size - packing.stored_bits(Q, details["grid"], prunes) < 8 * len(tensors)


# --- grids --------------------------------------------------------------------------------------------------

SETTINGS = [("rtn", {}), ("rtn", dict(bits=8, sym=True)), ("rtn", dict(bits=2, group_size=-1)),
            ("rtn", dict(mse=True, group_size=12)),
            ("gptq", dict(act_order=True)), ("gptq", dict(act_order=True, group_size=12, bits=4)),
            ("gptq", dict(act_order=True, static_groups=True, group_size=20)),
            ("gptq", dict(static_groups=True, sym=True)),
            ("gptq", dict(group_size=1, bits=8)), 
            ("sparsegpt_gptq", dict(sparsity=0.5, group_size=12, mse=True)),
            ("sparsegpt_gptq", dict(pattern="2:4", sym=True, group_size=-1))]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, settings", SETTINGS, ids=str)
def test_grids_round_their_own_weights_to_themselves(name, settings, packed, arch, tmp_path):
    """Bit for bit, in every dtype; and what is near goes back to where it was."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[:2 if packed else 3]:
        model, grids, folder = one_block(arch).to(dtype), {}, tmp_path / str(dtype)
        folder.mkdir()
        report = compress_model(model, None, name, IDS, grids=grids, codes=packed, **settings)
        assert all((grid.code is None) != packed for grid in grids.values())
        write_model(folder, model, tiny_tokenizer(), report, grids, packed)
        assert (folder / packing.GRIDS).exists() != packed
        loaded = models.load_model(str(folder), dtype=str(dtype).removeprefix("torch."))[0]
        found = packing.read_grids(loaded, folder)
        assert found.keys() == report["layers"].keys()
        for path, grid in found.items():
            assert set(grid) == {"scale", "zero", "group_size", "bits", "sym", "order"}
            grid, W = Grid(code=None, **grid), architectures.weight_of(loaded.get_submodule(path))
            assert torch.equal(W, architectures.weight_of(model.get_submodule(path)))
            back = grid.round(W)
            assert torch.equal(back, W) and back.dtype == dtype, path
            assert dtype != torch.float32 or torch.equal(grid.round(W * 1.000001), W)


@pytest.mark.parametrize("name", ["magnitude", "sparsegpt"])
def test_no_grids_where_nothing_was_quantized(name, tmp_path):
    for packed in (False, True):
        model, grids, folder = tiny_model("llama"), {}, tmp_path / str(packed)
        folder.mkdir()
        report = compress_model(model, None, name, IDS, grids=grids, codes=packed)
        write_model(folder, model, tiny_tokenizer(), report, grids, packed)
        assert packing.read_grids(model, folder) == {} and not (folder / packing.GRIDS).exists()


def test_lost_grids_are_missed(tmp_path):
    """A quantized folder without its grids: a merged LoRA would be left off the grid in silence."""
    model, grids = tiny_model("llama"), {}
    report = compress_model(model, None, "rtn", IDS, grids=grids, codes=False)
    write_model(tmp_path, model, tiny_tokenizer(), report, grids, False)
    (tmp_path / packing.GRIDS).unlink()
    with pytest.raises(UserError, match=f"^--model .*{packing.GRIDS}"):
        packing.read_grids(model, tmp_path)


def test_a_float16_grid_may_reach_beyond_what_float16_holds(tmp_path):
    """[0, 65504] in seven steps of 9360, rounded to float16, ends at 65,520, which float16 calls infinity."""
    model, grids = tiny_model("llama").half(), {}
    for path in ("q_proj", "o_proj"):
        getattr(model.model.layers[1].self_attn, path).weight.data[0, :2] = torch.tensor([65504.0, 0.0])
    reference = {}
    Q = rtn(model.model.layers[1].self_attn.q_proj.weight.data, 3, -1, details=reference)
    assert Q.isfinite().all() and Q[0, 0] == 65504 and reference["grid"].scale[0, 0] * 7.0 > 65519
    for path, layer in packing.layer_shapes(model).items():
        W = model.get_submodule(path).weight
        details = {}
        W.data = rtn(W.data, 3, -1, details=details)
        grids[path] = details["grid"]
        assert torch.equal(details["grid"].round(W.data), W.data)
    packing.save_packed(model, grids, False, tmp_path)
    assert_same(load(tmp_path, torch.float16), model)
    assert_same(load(tmp_path), model.float())


# --- damaged ones -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder of each kind: {"packed" (act-ordered), "pruned", "masked" (both), "grids"}."""
    folders = {}
    for kind, name, settings in (("packed", "gptq", dict(act_order=True)),
                                 ("pruned", "magnitude", dict(sparsity=0.8)),
                                 ("masked", "sparsegpt_gptq", dict(sparsity=0.8, bits=4)),
                                 ("grids", "gptq", dict(act_order=True))):
        model, grids, folders[kind] = tiny_model("llama"), {}, tmp_path_factory.mktemp(kind)
        report = compress_model(model, None, name, IDS, grids=grids, **settings)
        write_model(folders[kind], model, tiny_tokenizer(), report, grids, kind != "grids")
    return folders


LAYER = "model.layers.1.mlp.up_proj"                       # (48, 32)
NORM = "model.norm.weight"


def tensors(change):
    """Damage: change(tensors) edits what the file holds."""
    def damage(file):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(found)
        save_file(found, file, metadata=metadata)
    return damage


def put(suffix, change):
    """Damage: one part of LAYER, changed."""
    return tensors(lambda found: found.update({f"{LAYER}.{suffix}": change(found[f"{LAYER}.{suffix}"])}))


def header(change):
    """Damage: change(header) edits the header; what it returns is written instead, unless it is None."""
    def damage(file):
        with safe_open(file, "pt") as opened:
            obj = json.loads(opened.metadata()[packing.HEADER])
        found = {name: tensor.clone() for name, tensor in load_file(file).items()}
        other = change(obj)
        obj = obj if other is None else other
        save_file(found, file, metadata={packing.HEADER: obj if isinstance(obj, str) else json.dumps(obj)})
    return damage


def line(**changes):
    """Damage: LAYER's line of the header."""
    return header(lambda obj: obj["layers"][LAYER].update(changes))


def number(value, place=(0, 0)):
    """One number of a tensor, changed."""
    def change(tensor):
        tensor[place] = value
        return tensor
    return change


def file_bytes(change):
    """Damage: change(bytes of the file)."""
    return lambda file: file.write_bytes(change(file.read_bytes()))


cut = lambda tensor: tensor[:-1].clone()
longer = lambda tensor: torch.cat([tensor, tensor[:1]])
PARTS = ["codes", "order", "scales", "zeros"]
DAMAGED = {  # name -> (kind of folder, damage, words of the message)
    "cut": ("packed", file_bytes(lambda data: data[:-500]), "cannot be read"),
    "no safetensors": ("packed", file_bytes(lambda data: b"x" * 100), "cannot be read"),
    "empty": ("packed", file_bytes(lambda data: b""), "cannot be read"),
    "no header": ("packed", header(lambda obj: "null"), "header"),
    "header: not JSON": ("packed", header(lambda obj: "{"), "not JSON"),
    "header: a list": ("packed", header(lambda obj: [1]), "header"),
    "header: nested": ("packed", header(lambda obj: "[" * 100_000), "nested|not JSON"),
    "header: no dtype": ("packed", header(lambda obj: obj.pop("dtype") and obj), "dtype"),
    "header: another dtype": ("packed", header(lambda obj: obj.update(dtype="int8")), "dtype"),
    "header: dtype is a list": ("packed", header(lambda obj: obj.update(dtype=["float32"])), "dtype"),
    "header: layers are a list": ("packed", header(lambda obj: obj.update(layers=[])), "layers"),
    "header: a layer is missing": ("packed", header(lambda obj: obj["layers"].pop(LAYER) and obj), LAYER),
    "header: a layer is a number": ("packed", header(lambda obj: obj["layers"].update({LAYER: 3})), LAYER),
    "bits: 2 for 3": ("packed", line(bits=2), f"{LAYER}.codes"),
    "bits: 4 for 3": ("packed", line(bits=4), f"{LAYER}.codes"),
    "bits: 9": ("packed", line(bits=9), "bits"),
    "bits: a text": ("packed", line(bits="3"), "bits"),
    "bits: 10^12": ("packed", line(bits=10**12), "bits"),
    "bits: none": ("packed", line(bits=None), f"{LAYER}: parts"),
    "group: 0": ("packed", line(group_size=0), "group_size"),
    "group: -1": ("packed", line(group_size=-1), "group_size"),
    "group: larger than the row": ("packed", line(group_size=10**9), "group_size"),
    "group: half as large": ("packed", line(group_size=16), f"{LAYER}.scales"),
    "group: true": ("packed", line(group_size=True), "group_size"),
    "sym: true": ("packed", line(sym=True), f"{LAYER} has the parts"),
    "sym: a number": ("packed", line(sym=0), "sym"),
    "parts: unknown": ("packed", line(parts=[*PARTS, "extra"]), "parts"),
    "parts: one twice": ("packed", line(parts=[*PARTS, "codes"]), f"{LAYER} has the parts"),
    "parts: no codes": ("packed", line(parts=["scales", "zeros", "order"]), f"{LAYER} has the parts"),
    "parts: none": ("packed", line(parts=[]), f"{LAYER} has the parts"),
    "parts: order left out": ("packed", line(parts=["codes", "scales", "zeros"]),
                              f"no place for {LAYER}.order"),
    "parts: values too": ("packed", line(parts=[*PARTS, "values"]), "parts"),
    "parts: a mask that is not there": ("packed", line(parts=[*PARTS, "mask"]), f"lacks {LAYER}.mask"),
    "parts: lists": ("packed", line(parts=[["codes"]]), "parts"),
    "codes: cut": ("packed", put("codes", cut), f"{LAYER}.codes"),
    "codes: longer": ("packed", put("codes", longer), f"{LAYER}.codes"),
    "codes: signed": ("packed", put("codes", lambda t: t.view(torch.int8)), f"{LAYER}.codes"),
    "codes: floating": ("packed", put("codes", torch.Tensor.float), f"{LAYER}.codes"),
    "codes: missing": ("packed", tensors(lambda found: found.pop(f"{LAYER}.codes")), f"lacks {LAYER}.codes"),
    "scales: NaN": ("packed", put("scales", number(float("nan"))), f"{LAYER}.scales"),
    "scales: infinite": ("packed", put("scales", number(float("inf"))), f"{LAYER}.scales"),
    "scales: 0": ("packed", put("scales", number(0)), f"{LAYER}.scales"),
    "scales: below 0": ("packed", put("scales", number(-1)), f"{LAYER}.scales"),
    "scales: float32": ("packed", put("scales", torch.Tensor.float), f"{LAYER}.scales"),
    "scales: integers": ("packed", put("scales", torch.Tensor.int), f"{LAYER}.scales"),
    "scales: a row fewer": ("packed", put("scales", cut), f"{LAYER}.scales"),
    "scales: flat": ("packed", put("scales", lambda t: t.flatten()), f"{LAYER}.scales"),
    "scales: one for all": ("packed", put("scales", lambda t: t[:1, :1].clone()), f"{LAYER}.scales"),
    "zeros: cut": ("packed", put("zeros", cut), f"{LAYER}.zeros"),
    "zeros: missing": ("packed", tensors(lambda found: found.pop(f"{LAYER}.zeros")), f"lacks {LAYER}.zeros"),
    "order: one twice": ("packed", put("order", number(5, (0,))), f"{LAYER}.order"),
    "order: below 0": ("packed", put("order", lambda t: t - 1), f"{LAYER}.order"),
    "order: beyond": ("packed", put("order", lambda t: t + 1), f"{LAYER}.order"),
    "order: cut": ("packed", put("order", cut), f"{LAYER}.order"),
    "order: long": ("packed", put("order", torch.Tensor.long), f"{LAYER}.order"),
    "mask: cut": ("masked", put("mask", cut), f"{LAYER}.mask"),
    "mask: one weight more": ("masked", put("mask", lambda t: t | 1 << 7 if t[0] < 128 else t & 127),
                              f"{LAYER}.codes"),
    "mask: everything": ("masked", put("mask", lambda t: torch.full_like(t, 255)), f"{LAYER}.codes"),
    "mask: nothing": ("masked", put("mask", torch.zeros_like), f"{LAYER}.codes"),
    "values: cut": ("pruned", put("values", cut), f"{LAYER}.values"),
    "values: longer": ("pruned", put("values", longer), f"{LAYER}.values"),
    "values: NaN": ("pruned", put("values", number(float("nan"), (0,))), f"{LAYER}.values"),
    "values: half": ("pruned", put("values", torch.Tensor.half), f"{LAYER}.values"),
    "values: integers": ("pruned", put("values", torch.Tensor.int), f"{LAYER}.values"),
    "values: bits as well": ("pruned", line(bits=3, group_size=32, sym=True), "parts"),
    "norm: missing": ("packed", tensors(lambda found: found.pop(NORM)), f"lacks {NORM}"),
    "head: missing": ("packed", tensors(lambda found: found.pop("lm_head.weight")), "lacks lm_head.weight"),
    "a tensor too many": ("packed", tensors(lambda found: found.update(extra=torch.ones(1))),
                          "no place for extra"),
    "a layer twice": ("packed", tensors(lambda found: found.update({f"{LAYER}.weight": torch.ones(48, 32)})),
                      f"no place for {LAYER}.weight"),
    "norm: cut": ("packed", tensors(lambda found: found.update({NORM: torch.ones(31)})), NORM),
    "norm: would broadcast": ("packed", tensors(lambda found: found.update({NORM: torch.ones(1)})), NORM),
    "norm: NaN": ("packed", tensors(lambda found: found[NORM].__setitem__(3, float("nan"))), NORM),
    "norm: integers": ("packed", tensors(lambda found: found.update({NORM: torch.ones(32).int()})), NORM),
    "norm: eight-bit floats": ("packed", tensors(lambda found: found.update(
        {NORM: torch.ones(32).to(torch.float8_e4m3fn)})), NORM),
    "norm: double": ("packed", tensors(lambda found: found.update({NORM: torch.ones(32).double()})), NORM),
    "grids: cut": ("grids", file_bytes(lambda data: data[:-9]), "cannot be read"),
    "grids: scales NaN": ("grids", put("scales", number(float("nan"))), f"{LAYER}.scales"),
    "grids: zeros missing": ("grids", tensors(lambda found: found.pop(f"{LAYER}.zeros")),
                             f"lacks {LAYER}.zeros"),
    "grids: a tensor too many": ("grids", tensors(lambda found: found.update(extra=torch.ones(1))),
                                 "no place for extra"),
    "grids: order twice": ("grids", put("order", number(5, (0,))), f"{LAYER}.order"),
    "grids: a layer missing": ("grids", header(lambda obj: obj["layers"].pop(LAYER) and obj), LAYER),
    "grids: codes": ("grids", line(parts=PARTS), f"{LAYER} has the parts"),
    "grids: 99 bits": ("grids", line(bits=99), "bits"),
    "grids: 2 bits": ("grids", line(bits=2), f"{LAYER}.zeros"),
    "grids: other groups": ("grids", line(group_size=5), f"{LAYER}.scales"),
    "grids: not quantized": ("grids", line(bits=None), f"{LAYER} has the parts|parts"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(name, whole, tmp_path):
    kind, damage, words = DAMAGED[name]
    folder = shutil.copytree(whole[kind], tmp_path / "m")
    file = folder / (packing.GRIDS if kind == "grids" else packing.FILE)
    damage(file)
    with pytest.raises(UserError, match=f"^--model .*{file.name}.*({words})") as refused:
        if kind == "grids":
            packing.read_grids(models.load_model(str(folder))[0], folder)
        else:
            models.load_model(str(folder))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 700


OF_GRIDS = [name for name in DAMAGED if DAMAGED[name][0] == "packed"
            and name.split(":")[0] in ("scales", "zeros", "order", "header", "bits", "group")]


@pytest.mark.parametrize("name", OF_GRIDS)
def test_grids_out_of_a_damaged_packed_file_are_refused(name, whole, tmp_path):
    """read_grids reads packed.safetensors too, and believes it as little."""
    model = models.load_model(str(whole["packed"]))[0]
    folder = shutil.copytree(whole["packed"], tmp_path / "m")
    DAMAGED[name][1](folder / packing.FILE)
    if name.startswith("bits"):                            # the codes, whose length tells, are not read
        with pytest.raises(UserError, match="^--model"):
            packing.read_grids(model, folder)
        return
    with pytest.raises(UserError, match=f"^--model .*({DAMAGED[name][2]})"):
        packing.read_grids(model, folder)


def test_there_are_enough_of_them():
    assert sum(kind != "grids" for kind, _, _ in DAMAGED.values()) >= 25


def test_another_models_file_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole["packed"], tmp_path / "m")
    for arch, changes in (("opt", {}), ("gpt2", {}), ("llama", dict(num_hidden_layers=4)),
                          ("llama", dict(vocab_size=98)),
                          ("llama", dict(intermediate_size=52)), ("llama", dict(tie_word_embeddings=True))):
        tiny_model(arch, **changes).config.save_pretrained(folder)
        with pytest.raises(UserError, match="^--model .*packed.safetensors"):
            models.load_model(str(folder))


@pytest.mark.parametrize("file", ["compression.json", "packed.safetensors", "config.json", "tokenizer.json"])
def test_a_folder_without_one_of_its_files_is_refused(file, whole, tmp_path):
    folder = shutil.copytree(whole["packed"], tmp_path / "m")
    (folder / file).unlink()
    with pytest.raises(UserError, match="^--model"):
        models.load_model(str(folder))
