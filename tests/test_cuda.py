"""On a GPU: what only a GPU can show, one test for each thing that once went wrong there or could.

Without one the tests of the first part are skipped; those of the second need none. The first GPU at hand, in
this order, within ten minutes:

    python -m pytest tests/test_cuda.py
    python -m pytest tests/test_idp.py tests/test_latency.py tests/test_compress.py -k "cuda or gpu"
    python recover.py --method prompt,prefix,idp,lora --steps 20 --limit 50 --device cpu --out runs/cpu
    python recover.py --method prompt,prefix,idp,lora --steps 20 --limit 50 --device cuda --out runs/cuda
    python evaluate.py --compare runs/cpu/results.json runs/cuda/results.json
    python -m experiments.latency --shape llama-7b --device cuda --lengths 128,1024
    python -m experiments.latency --shape opt-6.7b --device cuda --lengths 128,1024
    python -m experiments.memory idp --shape llama-7b --device cuda
    python -m experiments.memory lora --shape llama-7b --device cuda
    python -m experiments.memory compress --shape llama-7b --device cuda --layers 1

What to look at: both tables of the toy alike; in the latencies, IDP decodes as fast as dense and merged LoRA
peaks where dense does; the memories of idp and lora below 24 GB in bfloat16, of a compressed block below 8.
"""
import json
import math
import pathlib
import sys
from types import SimpleNamespace

import pytest
import torch

import compress
import recover
from conftest import ROOT, save_tiny, tiny_model
from experiments import latency, speed
from idp_minimal import CACHE, PromptBank, attach_idp
from methods.lora import LoRA
from methods.registry import METHODS
from support import scoring
from support.architectures import blocks_of, pick_device, pick_dtype, weight_of
from support.cli import UserError, run
from support.models import load_model
from test_recover import build

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
HALF = [torch.bfloat16, torch.float16]


def ids_on(device, rows=2, tokens=9):
    """Token ids, the same each time. -> (rows, tokens) long."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def groups_of(rows, tokens, continuations=((5, 6, 7), (8,), (9, 10))):
    """What scoring takes: `rows` contexts of up to `tokens` tokens."""
    ids = ids_on("cpu", rows, tokens).tolist()
    return [(row[i % 3:], [list(c) for c in continuations]) for i, row in enumerate(ids)]


def bank_of(model, lengths):
    """A bank of small random prompts on the model's device."""
    d, generator = model.config.hidden_size, torch.Generator().manual_seed(1)
    prompts = [torch.randn(n, d, generator=generator).to(model.device) for n in lengths]
    return PromptBank.from_prompts(model, prompts)


# --- 1. On a GPU --------------------------------------------------------------------------------------------

@needs_cuda
def test_the_main_job_prints_the_same_table_on_both_devices(tmp_path):
    """Every tensor is on the device it is used on, or this raises."""
    tables, flags = [], ["--method", ",".join(METHODS), "--steps", "20", "--limit", "20", "--merge"]
    for device in ("cpu", "cuda"):
        recover.main([*flags, "--device", device, "--out", str(tmp_path / device)])
        tables.append(json.loads((tmp_path / device / "results.json").read_text())["rows"])
    assert [row["row"] for row in tables[0]] == [row["row"] for row in tables[1]]
    for cpu, cuda in zip(*tables):
        assert math.log(cuda["ppl"]) == pytest.approx(math.log(cpu["ppl"]), abs=1e-3), cpu["row"]
        for name, task in cpu["tasks"].items():            # a near-tie may fall the other way: one item
            assert abs(cuda["tasks"][name]["acc"] - task["acc"]) * task["n"] < 1.5, (cpu["row"], name)


@needs_cuda
def test_a_model_comes_in_half_precision_and_the_toy_does_not(tmp_path):
    save_tiny(tiny_model("llama"), tmp_path / "model")
    assert load_model(str(tmp_path / "model"), "cuda")[0].dtype in HALF
    assert load_model(str(tmp_path / "model"), "cpu")[0].dtype == torch.float32
    assert load_model("toy", "cuda")[0].dtype == torch.float32


@needs_cuda
def test_memory_of_scoring_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS", 400)
    model, peaks = tiny_model("llama").to("cuda"), []
    for rows in (24, 24, 96):                              # the first time is warm-up: workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scoring.continuation_scores(model, groups_of(rows, 100), batch_size=64)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= 1.1 * peaks[1]


@needs_cuda
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda:99: not available here; use one of: auto cpu"):
        pick_device("cuda:99")


@needs_cuda
def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def too_large(*args):
        """More than the card has."""
        torch.empty(torch.cuda.mem_get_info()[1] + 1, dtype=torch.uint8, device="cuda")
        pytest.skip("this device gives more memory than it says it has")
    monkeypatch.setattr(recover, "one_step", too_large)
    with pytest.raises(SystemExit) as end:
        run(lambda: recover.main(["--method", "prompt", "--steps", "1", "--limit", "2", "--device", "cuda"]))
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --device: out of memory (")


@needs_cuda
def test_merging_takes_no_memory_on_the_device():
    model = tiny_model("llama").to("cuda")
    method = LoRA(model)
    with latency.merged(method):
        pass                                               # warm-up: the first product makes a workspace
    before = torch.cuda.memory_allocated()
    weights = [weight_of(layer.linear).clone() for layer in method.layers.values()]
    copies = torch.cuda.memory_allocated() - before
    with latency.merged(method):
        assert all(layer.unmerged.device.type == "cpu" for layer in method.layers.values())
        assert torch.cuda.memory_allocated() - before <= copies
    for layer, W in zip(method.layers.values(), weights):
        merged = weight_of(layer.linear)
        assert merged.device.type == "cuda" and torch.equal(merged, W)


@needs_cuda
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_logits_are_finite_under_left_padding(arch, dtype):
    """A padding row sees no token at all: SDPA may make a NaN of it, which must not reach the real ones."""
    model, ids = tiny_model(arch).to("cuda", dtype), ids_on("cuda", 3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert logits[mask.bool()].isfinite().all()
        with attach_idp(model, bank_of(model, (3, 6))):    # here every row sees a prompt
            assert model(ids, attention_mask=mask).logits.isfinite().all()


@needs_cuda
@pytest.mark.parametrize("name", sorted(compress.COMPRESSORS))
def test_one_block_at_a_time_is_on_the_device(name):
    model, seen = tiny_model("llama"), []
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: seen.append([b for b in blocks_of(model) if on_cuda(b)]))
    ids = ids_on("cpu", 4, 16)
    compress.compress_model(model, None, name, ids, device="cuda", grids={})
    # each block runs twice on each row: for H, then for what the next block is given
    assert seen == [[block] for block in blocks_of(model) for _ in range(2 * len(ids))]
    assert not on_cuda(model)


def on_cuda(module):
    """Is any parameter of a module on the GPU?"""
    return any(p.is_cuda for p in module.parameters())


@pytest.mark.skipif(not torch.version.cuda or not torch.cuda.is_available(), reason="needs NVIDIA's own CUDA")
@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_waits_for_nothing(name):
    method = build(name, tiny_model("llama").to("cuda"))
    optimizer = torch.optim.AdamW([{"params": group} for group in method.groups()], lr=1e-3)
    rows = ids_on("cuda", 4, 16)
    with method.training():
        recover.one_step(method, optimizer, rows, 1)       # the first makes what the optimizer keeps
        try:
            torch.cuda.set_sync_debug_mode("error")
            recover.one_step(method, optimizer, rows, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- 2. Where there is none, too ----------------------------------------------------------------------------

@pytest.fixture
def masks(monkeypatch):
    """[(numbers in the queries, is there a mask?)] of each call of PyTorch's attention."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        """The same, noted."""
        seen.append((query.numel(), attn_mask is not None))
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("lengths, needed", [((4, 4), False), ((2, 4), True)])
def test_no_mask_while_decoding_where_none_is_needed(lengths, needed, arch, device, masks):
    """A mask rules flash attention out; prompts of unequal length do need one."""
    model = tiny_model(arch).to(device)
    ids, bank = ids_on(device), bank_of(model, lengths)
    masks.clear()                                          # the bank's own
    with attach_idp(model, bank):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
        with torch.no_grad():
            out = model(ids, use_cache=True)
            model(ids[:, -1:], **{CACHE: out[CACHE]}, use_cache=True)
    one_token = len(ids) * model.config.hidden_size        # grouped heads may stand in the place of tokens
    decoding = [mask for numbers, mask in masks if numbers == one_token]
    assert len(decoding) >= 2 * len(blocks_of(model)) and set(decoding) == {needed}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_lora_computes_in_the_models_dtype(dtype, device, monkeypatch):
    model = tiny_model("llama").to(device, dtype)
    method, seen = LoRA(model), set()
    matmul = torch.Tensor.__matmul__

    def noted(a, b):
        """The same product, its dtypes noted."""
        seen.update([a.dtype, b.dtype])
        return matmul(a, b)
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    with torch.no_grad(), method.inference():
        layer, x = next(iter(method.layers.values())), torch.ones(1, 2, 32, dtype=dtype, device=device)
        assert layer(x).dtype == dtype
    assert seen == {dtype}
    assert all(t.dtype == torch.float32 for t in method.tensors().values()), "training stays in float32"


@pytest.mark.parametrize("device", DEVICES)
def test_the_tokens_of_a_batch_are_capped(device, monkeypatch):
    """Contexts and continuations; the same scores as without a cap."""
    model, groups, sizes = tiny_model("llama").to(device), groups_of(12, 30), []
    free = scoring.continuation_scores(model, groups)
    monkeypatch.setattr(scoring, "TOKENS", 100)
    note = lambda _, args, kwargs: sizes.append(kwargs["attention_mask"].numel())
    model.register_forward_pre_hook(note, with_kwargs=True)
    capped = scoring.continuation_scores(model, groups)
    assert max(sizes) <= 100
    for a, b in zip(free, capped):
        assert [score for score, _ in a] == pytest.approx([score for score, _ in b], abs=1e-3)


@pytest.fixture
def reads(monkeypatch):
    """Grows with each read of a tensor by a line of the project: on a GPU each of them is a wait."""
    seen = []

    def counted(name, plain):
        """The same, noted when one of our files asks."""
        def read(self, *args, **kwargs):
            """As the tensor's own."""
            if pathlib.Path(sys._getframe(1).f_code.co_filename).is_relative_to(ROOT):
                seen.append(name)
            return plain(self, *args, **kwargs)
        return read
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return seen


@pytest.mark.parametrize("device", DEVICES)
def test_scoring_reads_once_a_batch(device, reads):
    model, groups = tiny_model("llama").to(device), groups_of(12, 30)
    reads.clear()                                          # making the groups has read, too
    scoring.continuation_scores(model, groups, batch_size=4)
    assert reads == ["tolist"] * 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_training_reads_once_in_ten_steps(name, device, reads):
    """And as often with rows in parts and blocks recomputed. Batches are drawn on the CPU, and nothing of
    them is read.
    """
    method, ids = build(name, tiny_model("llama").to(device)), ids_on("cpu", 1, 200)[0]
    reads.clear()
    recover.train(method, ids, 20, 4, 8, 1e-3, accumulate=2, checkpointing=True, quiet=True)
    assert reads == ["tolist"] * 2


@pytest.mark.parametrize("has_it, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_half_precision_on_a_gpu_alone(has_it, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: has_it)
    assert pick_dtype("auto", torch.device("cuda:0"), "facebook/opt-125m") == dtype
    assert pick_dtype("auto", "cuda", None) == dtype       # random weights of a large shape
    assert pick_dtype("auto", "cuda", "toy") == torch.float32
    assert pick_dtype("auto", "cpu", "facebook/opt-125m") == torch.float32
    assert pick_dtype("float32", "cuda", "facebook/opt-125m") == torch.float32


def test_clocks_read_finished_work(monkeypatch):
    """Before and after whatever is timed, the device is waited for."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: events.append("wait"))
    latency.now(torch.device("cpu"))
    assert events == []
    latency.now(torch.device("cuda:0"))
    assert events == ["wait"]
    events.clear()
    work = lambda: events.append("work")
    speed.take_turns({"ours": work, "theirs": work}, 1, torch.device("cuda:0"))
    assert events == ["work", "work"] + ["wait", "work", "wait"] * 2

    def call(model, ids, cache):
        """A model's call, noted."""
        work()
        return {CACHE: None}
    events.clear()
    model = SimpleNamespace(device=torch.device("cuda:0"))
    latency.time_once(model, call, torch.zeros(1, 2), decode_tokens=2)
    assert events == ["wait", "work", "wait", "work", "work", "wait"]


def test_rows_are_told_as_they_are_measured(monkeypatch, capsys):
    """A run that takes an hour says after each row what it was, in a log file too."""
    told, measure = [], recover.Run.measure

    def noted(job, name, *args, **kwargs):
        """The same; then, what stands on stderr."""
        measure(job, name, *args, **kwargs)
        told.append((name, capsys.readouterr().err.splitlines()[-1]))
    monkeypatch.setattr(recover.Run, "measure", noted)
    recover.main(["--method", "prompt", "--steps", "1", "--limit", "4", "--device", "cpu"])
    assert [name for name, _ in told] == ["dense", "compressed", "prompt"]
    assert all(line.startswith(f"{name}: ppl ") and "toy_recall" in line for name, line in told)
