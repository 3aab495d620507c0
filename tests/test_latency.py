"""The latency table: its variants compute what their names say, and its ratios are right."""
import contextlib
import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_model
from experiments import latency
from idp_minimal import CACHE, PromptBank, attach_idp
from support.cli import UserError


@pytest.fixture(scope="module")
def table():
    """A tiny model and its variants with prompts of 4 tokens."""
    model = tiny_model("llama")
    return model, latency.variants(model, 4)


def logits_of(model, variant, ids):
    """Last logits at prefill and after one decoded token."""
    attached, call = variant
    with torch.no_grad(), attached():
        first = call(model, ids, None)
        return first.logits[:, -1], call(model, ids[:, -1:], first[CACHE]).logits[:, -1]


@pytest.mark.parametrize("name", ["prompt as cached prefix", "IDP every, logits, m = 2", "IDP first, probabilities, m = 4"])
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


def test_every_reading_of_the_claim_has_a_row(table):
    wanted = {"dense", "prompt as embeddings", "prompt as cached prefix", "IDP every, logits, m = 2", "IDP every, logits, m = 4",
              "IDP every, logits, m = 8", "IDP first, logits, m = 4", "IDP every, probabilities, m = 4",
              "IDP first, probabilities, m = 4", "LoRA r 8 on q,v, unmerged", "LoRA r 8 on all linears, unmerged", "LoRA, merged"}
    assert set(table[1]) == wanted


@pytest.mark.parametrize("layers, scores, m", latency.READINGS)
def test_a_variant_has_the_reading_of_its_name(table, layers, scores, m):
    model, variants = table
    attached, call = variants[f"IDP {layers}, {scores}, m = {m}"]
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attached() as idp:
        call(model, ids, None)
    assert attached.keywords == {"layers": layers, "scores": scores} and idp.bank.m == m
    assert idp.choice.shape == ((len(idp.bank.keys), 2) if layers == "every" else (2,))


def test_all_linears_finds_each_kind():
    assert latency.all_linears(tiny_model("llama")) == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert latency.all_linears(tiny_model("gpt2")) == sorted(["c_attn", "c_proj", "c_fc"])


def test_a_ratio_is_the_median_of_ratios_within_a_repeat():
    """A machine that slows down in the middle changes both times of a repeat, and so no ratio."""
    times = {"a": {"prefill": [1.0, 2.0, 30.0]}, "b": {"prefill": [2.0, 4.0, 60.0]}}
    assert latency.ratio(times, "a", "b", "prefill") == 0.5


def test_fastest_by_fastest():
    """A repeat that something disturbed changes nothing, whichever of the two it hit."""
    times = {"a": {"prefill": [1.0, 9.0, 1.0]}, "b": {"prefill": [30.0, 2.0, 2.0]}}
    assert latency.fastest(times, "a", "b", "prefill") == 0.5


def test_measure_counts_repeats_without_the_warm_up():
    calls = []

    def call(model, ids, cache):
        calls.append(ids.shape)
        return model(ids, **{CACHE: cache}, use_cache=True)
    model = tiny_model("llama")
    seen = latency.measure(model, {"x": (contextlib.nullcontext, call)}, torch.randint(3, 97, (1, 6)), repeats=2, decode_tokens=3)
    assert len(seen["x"]["prefill"]) == len(seen["x"]["decode"]) == 2
    assert calls == [(1, 6), (1, 1), (1, 1), (1, 1)] * 3


def test_the_clock_counts_this_thread_alone():
    """On one CPU thread sleeping costs nothing; with more threads the clock is the one on the wall."""
    def slept():
        start = latency.now(torch.device("cpu"))
        time.sleep(0.2)
        return latency.now(torch.device("cpu")) - start
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert slept() < 0.1
        torch.set_num_threads(2)
        assert slept() >= 0.2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", ["every", "first"])
@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_what_a_choice_costs_on_paper_is_what_torch_counts(name, layers, scores):
    """Matrix products that torch counts in a pass with a choice, less those with the prompt there already. One token is
    hidden, since only then the mean query is such a product.
    """
    model, T, lengths = tiny_model(name), 11, [3, 3, 3]
    ids = torch.randint(3, 97, (1, T), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] + [1] * (T - 1)])
    table = latency.variants(model, 3)
    bank = PromptBank.from_prompts(model, [torch.randn(n, model.config.hidden_size) for n in lengths])
    with torch.no_grad():
        with attach_idp(model, bank, layers=layers, scores=scores), FlopCounterMode(display=False) as chosen:
            model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
        with FlopCounterMode(display=False) as prefix:
            table[latency.PREFIX][1](model, ids, None)
    expected = latency.choice_flops(model.config, T, 3, 9, layers, scores)
    assert chosen.get_total_flops() - prefix.get_total_flops() == expected


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_what_a_pass_costs_on_paper_is_what_torch_counts(name):
    model, T, N = tiny_model(name), 11, 3
    ids = torch.randint(3, 97, (1, T), generator=torch.Generator().manual_seed(0))
    _, call = latency.variants(model, N)[latency.PREFIX]
    model.set_attn_implementation("eager")                 # its products show: those of the fused one are not counted on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        call(model, ids, None)
    head = 2 * model.config.hidden_size * model.config.vocab_size          # of the last token's logits
    width = model.config.hidden_size // model.config.num_attention_heads
    angles = width * T if name == "llama" else 0           # RoPE's, which some versions of torch count as a matrix product
    assert counted.get_total_flops() - head - latency.pass_flops(model, T, N) in (0, angles)


def test_llama_7b_by_hand():
    """[Fig. 4] 32 layers of 2 T d for the mean query and 2 m d for its product with m mean keys, d = 4096."""
    large = latency.random_model("llama-7b", "meta", torch.float32)
    flops = latency.choice_flops(large.config, 512, 2, 150)
    assert flops == 32 * 2 * 4096 * (512 + 2) == 134_742_016
    assert flops < 3e-5 * latency.pass_flops(large, 512, 100)
    assert "a choice under every, logits 1.35e+08 (0.002 %)" in latency.on_paper("LLaMA-7B", large, 512, [50, 100])


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
    assert "| 8 | IDP every, logits, m = 4 |" in printed and "On paper, LLaMA-7B, 512 tokens" in printed and (out / "latency.md").read_text() == printed
    assert json.loads((out / "latency.json").read_text())["times"]["8"]["dense"]["prefill"][0] > 0
    with pytest.raises(UserError, match="--lengths 600: the model reads 488 tokens beside 24"):
        latency.main(["--lengths", "600"])
    with pytest.raises(UserError, match="--model toy: --shape"):
        latency.main(["--shape", "llama-7b", "--model", "toy"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reports_peak_memory():
    model = tiny_model("llama").to("cuda")
    table = latency.variants(model, 2)
    seen = latency.measure(model, table, torch.randint(3, 97, (1, 6), device="cuda"), repeats=1, decode_tokens=1)
    assert all(times["peak"] > 0 for times in seen.values())
