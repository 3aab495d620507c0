"""The latency table: its variants compute what their names say, and its ratios are right."""
import contextlib
import json

import pytest
import torch

from conftest import tiny_model
from experiments import latency
from idp_minimal import CACHE
from support.cli import UserError


@pytest.fixture(scope="module")
def table():
    """A tiny model and its variants with prompts of 4 tokens."""
    model = tiny_model("llama")
    return model, latency.variants(model, 4, with_compressed=True)


def logits_of(model, variant, ids):
    """Last logits at prefill and after one decoded token."""
    attached, call = variant
    with torch.no_grad(), attached():
        first = call(model, ids, None)
        return first.logits[:, -1], call(model, ids[:, -1:], first[CACHE]).logits[:, -1]


@pytest.mark.parametrize("name", ["prompt as cached prefix", "IDP, m = 2"])
def test_prompt_variants_compute_the_same(table, name):
    """Embeddings, cached prefix, and IDP (whose chosen prompt is one of the same kind) differ in cost only."""
    model, variants = table
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, variants["prompt as embeddings"], ids)
    got = logits_of(model, variants[name], ids)
    if name.startswith("IDP"):                             # it may have chosen the second prompt: only its shape is fixed
        assert got[0].shape == expected[0].shape and not torch.allclose(got[0], logits_of(model, variants["dense"], ids)[0])
    else:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, expected))


def test_variants_leave_the_model_as_it_was(table):
    model, variants = table
    ids = torch.randint(3, 97, (1, 5))
    before = model(ids).logits
    for name in variants:
        logits_of(model, variants[name], ids)
        assert torch.equal(model(ids).logits, before), name


def test_compressed_variant_is_compressed(table):
    model, variants = table
    ids = torch.randint(3, 97, (1, 5))
    dense, small = (logits_of(model, variants[name], ids)[0] for name in ("dense", "compressed (dequantized 3-bit)"))
    assert not torch.allclose(dense, small, atol=1e-3)


def test_every_reading_of_the_claim_has_a_row(table):
    wanted = {"dense", "compressed (dequantized 3-bit)", "prompt as embeddings", "prompt as cached prefix", "IDP, m = 2", "IDP, m = 4",
              "IDP, m = 8", "LoRA r 8 on q,v, unmerged", "LoRA r 8 on all linears, unmerged", "LoRA, merged"}
    assert set(table[1]) == wanted


def test_all_linears_finds_each_kind():
    assert latency.all_linears(tiny_model("llama")) == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert latency.all_linears(tiny_model("gpt2")) == sorted(["c_attn", "c_proj", "c_fc"])


def test_a_ratio_is_the_median_of_ratios_within_a_repeat():
    """A machine that slows down in the middle changes both times of a repeat, and so no ratio."""
    times = {"a": {"prefill": [1.0, 2.0, 30.0]}, "b": {"prefill": [2.0, 4.0, 60.0]}}
    assert latency.ratio(times, "a", "b", "prefill") == 0.5


def test_measure_counts_repeats_without_the_warm_up():
    calls = []

    def call(model, ids, cache):
        calls.append(ids.shape)
        return model(ids, **{CACHE: cache}, use_cache=True)
    model = tiny_model("llama")
    seen = latency.measure(model, {"x": (contextlib.nullcontext, call)}, torch.randint(3, 97, (1, 6)), repeats=2, decode_tokens=3)
    assert len(seen["x"]["prefill"]) == len(seen["x"]["decode"]) == 2
    assert calls == [(1, 6), (1, 1), (1, 1), (1, 1)] * 3


@pytest.mark.parametrize("shape", sorted(latency.SHAPES))
def test_shapes_are_the_published_ones(shape):
    """Parameter counts of the published models, without making any weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**latency.SHAPES[shape]))
    assert model.num_parameters() == {"llama-7b": 6_738_415_616, "opt-6.7b": 6_658_473_984, "smollm2-135m": 134_515_008}[shape]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "run"
    latency.main(["--lengths", "8", "--repeats", "1", "--decode-tokens", "1", "--prompt-length", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "| 8 | IDP, m = 4 |" in printed and (out / "latency.md").read_text() == printed
    assert json.loads((out / "latency.json").read_text())["times"]["8"]["dense"]["prefill"][0] > 0
    with pytest.raises(UserError, match="--lengths 600: the model reads 488 tokens beside 24"):
        latency.main(["--lengths", "600"])
    with pytest.raises(UserError, match="--model toy: --shape"):
        latency.main(["--shape", "llama-7b", "--model", "toy"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reports_peak_memory():
    model = tiny_model("llama").to("cuda")
    table = latency.variants(model, 2, with_compressed=False)
    seen = latency.measure(model, table, torch.randint(3, 97, (1, 6), device="cuda"), repeats=1, decode_tokens=1)
    assert all(times["peak"] > 0 for times in seen.values())
