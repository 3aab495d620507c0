"""Packed folders: the same weights come back, in no more bytes than the report says."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import packing
from compress import COMPRESSORS, compress_model
from conftest import CONFIGS, tiny_model
from loading import UserError

IDS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0))


def pack(model, folder, name, **settings):
    """Compress a model, write it packed. -> report, bytes."""
    grids = {}
    report = compress_model(model, None, name, IDS, grids=grids, **settings)
    return report, packing.save_packed(model, grids, report, folder)


def load(folder, dtype):
    """As loading.py does: an empty model from config.json, then the file."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    packing.load_packed(model, folder)
    return model


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype, key


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_back(bits):
    for count in (1, 7, 8, 1001):
        codes = torch.randint(2 ** bits, (count,), generator=torch.Generator().manual_seed(count)).byte()
        packed = packing.pack_bits(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        assert torch.equal(packing.unpack_bits(packed, bits, count), codes)


def test_the_stream_by_hand():
    """Lowest bit first: 3-bit codes 1, 2, 7 are 100 010 111, read from the right 1101 0001 and then 1."""
    assert packing.pack_bits(torch.tensor([1, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11010001, 0b1]


@pytest.mark.parametrize("arch", sorted(CONFIGS))
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_weights_come_back_bit_for_bit(name, arch, tmp_path):
    model = tiny_model(arch)
    pack(model, tmp_path, name, group_size=12)             # 32 and 48 columns: the last group is short
    assert_same(load(tmp_path, torch.float32), model)


@pytest.mark.parametrize("name, settings", [
    *(("gptq", dict(bits=bits)) for bits in range(2, 9)), ("gptq", dict(act_order=True, group_size=-1)), ("gptq", dict(act_order=True, static_groups=True)), ("gptq", dict(mse=True)), ("rtn", dict(sym=True)),
    ("magnitude", dict(sparsity=0.0)), ("magnitude", dict(sparsity=0.9)), ("sparsegpt", dict(pattern="2:4")),
    ("sparsegpt_gptq", dict(sparsity=0.7, sym=True)), ("sparsegpt_gptq", dict(sparsity=0.1, bits=2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_setting_and_dtype(name, settings, dtype, tmp_path):
    for arch in ("llama", "gpt2"):
        model = tiny_model(arch).to(dtype)
        pack(model, tmp_path, name, **settings)
        assert_same(load(tmp_path, dtype), model)
        # a half-precision model read as float32 has the half-precision weights, as from a folder that is not packed
        assert_same(load(tmp_path, torch.float32), model.float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name, settings", [
    *(("rtn", dict(bits=bits)) for bits in (2, 3, 4, 8)), ("rtn", dict(sym=True)), ("rtn", dict(bits=2, group_size=-1)),
    ("gptq", dict(act_order=True)), ("magnitude", dict(sparsity=0.5)), ("magnitude", dict(sparsity=0.0)),
    ("sparsegpt", dict(pattern="2:4")), ("sparsegpt_gptq", dict(sparsity=0.5)),
    ("sparsegpt_gptq", dict(sparsity=0.5, bits=2))], ids=str)
def test_bytes_on_disk(name, settings, tied, tmp_path):
    """At most 1.02 times what the report calls weight_bytes, and never less: nothing is left out."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=256, intermediate_size=688, num_hidden_layers=2,
                                  num_attention_heads=4, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    report, size = pack(model, tmp_path, name, **settings)
    assert size == (tmp_path / packing.FILE).stat().st_size
    assert report["weight_bytes"] <= size <= 1.02 * report["weight_bytes"]
    assert ("lm_head.weight" in load_file(tmp_path / packing.FILE)) != tied
    assert_same(load(tmp_path, torch.bfloat16), model)


def test_a_damaged_file_is_a_mistake_in_words(tmp_path):
    pack(tiny_model("llama"), tmp_path, "rtn")
    whole, file = (tmp_path / packing.FILE).read_bytes(), tmp_path / packing.FILE
    metadata = {"packed": packing.safe_open(file, "pt").metadata()["packed"]}
    tensors = {key: value.clone() for key, value in load_file(file).items()}            # a copy: the file is overwritten below
    def without(name):
        save_file({key: value for key, value in tensors.items() if key != name}, file, metadata=metadata)
    for damage in (lambda: file.write_bytes(whole[:-500]), lambda: file.write_bytes(b"x" * 100), lambda: save_file(tensors, file),
                   lambda: without("model.norm.weight"), lambda: without("model.layers.1.mlp.up_proj.scales")):
        damage()
        with pytest.raises(UserError, match="packed.safetensors"):
            load(tmp_path, torch.float32)


def test_another_models_file_is_refused(tmp_path):
    pack(tiny_model("llama"), tmp_path, "rtn")
    with pytest.raises(UserError, match="packed.safetensors"):
        packing.load_packed(tiny_model("opt"), tmp_path)
