"""Contract tests over METHODS: a new remedy is graded here without editing a test."""
import argparse
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from transformers import DynamicCache

import recover
from conftest import CONFIGS, ROOT, tiny_model
from idp_minimal import CACHE, PromptBank, attach_idp
from loading import UserError
from methods import METHODS, LoRA, LoRALinear, SoftPrompts, TokenLosses, load_adapter, row_losses
from recover import batch_at, train

ARGS = argparse.Namespace(prompt_length=4, prompt_lengths=[2, 4], selector="mean_attention", rank=2, alpha=4, targets=None)


def build(method, model, seed=0):
    """A method with small settings, as the command line would build it."""
    cls, settings = METHODS[method]
    return cls(model, **settings(ARGS, None), seed=seed)


def text(tokens=600, seed=0):
    """Learnable text: a few tokens that follow each other in a fixed order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.arange(tokens) % 7 + 3 + torch.randint(0, 2, (tokens,), generator=generator)).long()


def slow_losses(logits, ids):
    """The twin of methods.row_losses: from the logits (B, T, V) of the whole row. -> (B,)."""
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return -logp[..., 0].mean(1)


def fit(method, steps=20, **settings):
    """train() with small settings."""
    return train(method, text(), steps, **{**dict(batch_size=4, seqlen=12, lr=1e-2, quiet=True), **settings})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_base_weights_stay_bit_for_bit_and_loss_falls(name):
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = build(name, model)
    ids = text()[:48].view(4, 12)
    with torch.no_grad(), method.training():
        first = method.losses(ids).mean()
    fit(method, 40, lr=3e-2)
    with torch.no_grad(), method.training():
        last = method.losses(ids).mean()
    assert last < first - 0.05
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_save_load_same_logits(name, any_model, tmp_path):
    method = build(name, any_model)
    with torch.no_grad():
        for tensor in method.tensors().values():           # away from the initialisation, LoRA's B included
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    ids = torch.randint(3, 97, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), method.inference():
        expected = any_model(ids).logits
    method.save(tmp_path / "adapter")
    with torch.no_grad(), load_adapter(any_model, tmp_path / "adapter").inference():
        assert torch.equal(any_model(ids).logits, expected)
    with torch.no_grad():
        assert not torch.allclose(any_model(ids).logits, expected, atol=1e-3), "the adapter does nothing"


def test_trainable_count_is_the_formula():
    model = tiny_model("llama")                            # d 32, 3 layers, h_kv d_k = 16
    count = {name: sum(t.numel() for t in build(name, model).tensors().values()) for name in METHODS}
    assert count["prompt"] == 4 * 32                       # n d
    assert count["idp"] == (2 + 4) * 32                    # sum n_k d
    assert count["prefix"] == 3 * 2 * 16 * 4               # L 2 h_kv d_k n
    assert count["lora"] == 3 * 2 * ((32 + 32) + (32 + 16))  # L r (in + out), q_proj and v_proj


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_every_method_trains_every_architecture(name, arch):
    method = build(name, tiny_model(arch))
    before = {k: t.detach().clone() for k, t in method.tensors().items()}
    fit(method, 2)
    assert all(t.isfinite().all() for t in method.tensors().values())
    moved = [k for k, t in method.tensors().items() if not torch.equal(before[k], t)]
    assert len(moved) == len(before), f"never moved: {set(before) - set(moved)}"


@pytest.mark.parametrize("tokens", [5, TokenLosses.CHUNK, 2 * TokenLosses.CHUNK + 3])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_equal_cross_entropy_and_so_do_their_gradients(tokens, bias):
    torch.manual_seed(0)
    head, targets = nn.Linear(6, 50, bias=bias).double().requires_grad_(False), torch.randint(50, (tokens,))
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, dtype=torch.float64)      # rows count differently, as in an unequal batch
    ours = TokenLosses.apply(hidden, targets, head)
    gradient, = torch.autograd.grad((ours * weights).sum(), hidden)
    slow = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(ours.double(), slow, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad((slow * weights).sum(), hidden)[0], atol=1e-6)


def test_uniform_model_loses_log_vocabulary():
    head = nn.Linear(6, 50, bias=False).requires_grad_(False)
    nn.init.zeros_(head.weight)
    assert torch.allclose(TokenLosses.apply(torch.randn(9, 6), torch.randint(50, (9,)), head), torch.tensor(50.0).log())


def test_which_tokens_count():
    """counted picks among the tokens that follow another: of the last one alone, the loss is that token's."""
    model, ids = tiny_model("llama"), torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.allclose(row_losses(model, ids), slow_losses(logits, ids), atol=1e-5)
        assert torch.allclose(row_losses(model, ids, slice(-1, None)), slow_losses(logits[:, -2:], ids[:, -2:]), atol=1e-5)


def test_a_head_to_be_trained_is_refused_rather_than_left_out():
    model = tiny_model("opt")
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head"):
        row_losses(model, torch.randint(3, 97, (2, 6)))


# --- prompts -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_training_and_inference_see_the_same_prompt(arch):
    """The loss under training (embeddings) equals the loss under inference (bank), for each prompt of unequal lengths."""
    model = tiny_model(arch)
    method, ids = build("idp", model), torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for k in range(2):
            trained = method.losses(ids, owner=torch.full((4,), k))
            with attach_idp(model, PromptBank.from_prompts(model, [P.detach() for P in method.prompts]), "fixed", k=k):
                used = slow_losses(model(ids).logits, ids)
            assert torch.allclose(trained, used, atol=1e-4, rtol=1e-5)


def test_prompts_learn_separately():
    """Side by side in one batch = each alone on its own rows. Also proves that padding leaks no gradient."""
    model = tiny_model("llama")
    both = SoftPrompts(model, [3, 3], seed=0)
    start = [P.detach().clone() for P in both.prompts]
    fit(both, 5, batch_size=4)
    for k in range(2):
        alone = SoftPrompts(model, [3])
        with torch.no_grad():
            alone.prompts[0].copy_(start[k])
        optimizer = torch.optim.AdamW(alone.prompts, lr=1e-2, weight_decay=0.0)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = recover.learning_rate(step, 5, 1e-2)
            alone.losses(batch_at(text(), step, 4, 12, 0)[k::2]).mean().backward()
            nn.utils.clip_grad_norm_(alone.prompts, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(both.prompts[k], alone.prompts[0], atol=1e-5)


def test_init_text_repeats_its_tokens():
    model = tiny_model("llama")
    method = SoftPrompts(model, [5], text_ids=torch.tensor([7, 9]))
    assert torch.equal(method.prompts[0], model.get_input_embeddings().weight[[7, 9, 7, 9, 7]])


def test_prefix_equals_a_plain_cache():
    model = tiny_model("llama")
    method, ids = build("prefix", model), torch.randint(3, 97, (3, 8))
    cache = DynamicCache([(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in zip(method.keys, method.values)])
    with torch.no_grad():
        assert torch.allclose(method.losses(ids), slow_losses(model(ids, **{CACHE: cache}).logits, ids), atol=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_loss_that_is_trained_is_the_loss_that_is_used(name, any_model):
    """losses() has its own fast way for each method; inference() is what evaluation sees. One prompt, so that none is chosen."""
    method = SoftPrompts(any_model, [5]) if name == "idp" else build(name, any_model)
    ids = torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with method.inference():
            used = slow_losses(any_model(ids).logits, ids)
        with method.training():
            assert torch.allclose(method.losses(ids), used, atol=1e-4, rtol=1e-5)


# --- LoRA --------------------------------------------------------------------------------------------------------------------

def test_lora_is_the_identity_at_step_0(any_model):
    ids = torch.randint(3, 97, (2, 7))
    before = any_model(ids).logits
    with build("lora", any_model).inference():
        assert torch.equal(any_model(ids).logits, before)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lora_by_hand_and_merged(arch):
    """y = x (W + alpha/r B A)^T; merging gives the same outputs, twice is once, unmerging returns W bit for bit."""
    torch.manual_seed(0)
    linear = tiny_model(arch).transformer.h[0].attn.c_attn if arch == "gpt2" else nn.Linear(6, 5)
    d_in = 32 if arch == "gpt2" else 6
    layer, x = LoRALinear(linear, r=2, alpha=4), torch.randn(3, d_in)
    nn.init.normal_(layer.B)
    W = linear.weight.T if arch == "gpt2" else linear.weight
    by_hand = x @ (W + 4 / 2 * layer.B @ layer.A).T + linear.bias
    assert torch.allclose(layer(x), by_hand, atol=1e-4)
    before = linear.weight.clone()
    layer.merge()
    layer.merge()
    assert torch.allclose(layer(x), by_hand, atol=1e-4) and not torch.equal(linear.weight, before)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(linear.weight, before)


def test_merge_can_keep_a_mask():
    linear = nn.Linear(8, 4)
    linear.weight.data[:, ::2] = 0
    mask, layer = linear.weight.data != 0, LoRALinear(linear, r=2)
    nn.init.normal_(layer.B)
    layer.merge()
    assert (linear.weight.data[:, ::2] != 0).any(), "a plain merge fills the zeros"
    layer.unmerge()
    layer.merge(recompress=lambda W: W * mask)
    assert (linear.weight.data[:, ::2] == 0).all() and not torch.equal(linear.weight.data, layer.unmerged)


def test_lora_refuses_unknown_targets_and_the_head():
    for target in ("nonsense", "lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=target):
            LoRA(tiny_model("llama"), targets=[target])
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(2, 2), r=0)


# --- the loop ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(METHODS))
def test_resume_gives_the_same_weights(name, tmp_path):
    whole = build(name, tiny_model("llama"))
    fit(whole, 12)
    state, killed = tmp_path / "state.safetensors", build(name, tiny_model("llama"))
    losses = killed.losses
    def die_at_step_8(ids, calls=[]):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return losses(ids)
    killed.losses = die_at_step_8
    with pytest.raises(KeyboardInterrupt):
        fit(killed, 12, state_file=state, save_every=5)
    resumed = build(name, tiny_model("llama"), seed=3)     # whatever it starts from, the checkpoint decides
    fit(resumed, 12, state_file=state, resume=True)
    for k, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[k]), k


def test_resume_refuses_other_settings(tmp_path):
    fit(build("lora", tiny_model("llama")), 2, state_file=tmp_path / "s.safetensors", save_every=1)
    with pytest.raises(UserError, match="other settings"):
        fit(build("prompt", tiny_model("llama")), 2, state_file=tmp_path / "s.safetensors", resume=True)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_accumulation_and_checkpointing_change_nothing(name, arch):
    results = []
    for settings in ({}, {"accumulate": 2}, {"checkpointing": True}):
        method = build(name, tiny_model(arch))
        fit(method, 3, **settings)
        results.append(method.tensors())
    for other in results[1:]:
        assert all(torch.allclose(results[0][k], other[k], atol=1e-5) for k in other)


def test_nan_stops_with_a_word_and_keeps_the_last_good_state():
    method = build("prompt", tiny_model("llama"))
    losses, calls = method.losses, []
    def breaks_at_step_15(ids):
        calls.append(1)
        return losses(ids) * (float("nan") if len(calls) == 15 else 1.0)
    method.losses = breaks_at_step_15
    with pytest.raises(UserError, match="--lr"):
        fit(method, 30)
    assert method.prompts[0].isfinite().all()


def test_seeds_decide_everything():
    first, same, other = (SoftPrompts(tiny_model("llama"), [3], seed=s) for s in (0, 0, 1))
    assert torch.equal(first.prompts[0], same.prompts[0]) and not torch.equal(first.prompts[0], other.prompts[0])
    assert torch.equal(batch_at(text(), 3, 4, 8, 0), batch_at(text(), 3, 4, 8, 0))
    assert not torch.equal(batch_at(text(), 3, 4, 8, 0), batch_at(text(), 4, 4, 8, 0))


def test_batch_at_takes_real_chunks_to_the_last_token():
    ids = torch.arange(20)
    rows = torch.cat([batch_at(ids, step, 8, 5, 0) for step in range(50)])
    assert all(row.tolist() == list(range(row[0], row[0] + 5)) for row in rows)
    assert rows.min() == 0 and rows.max() == 19


def test_schedule():
    rates = [recover.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0 and rates[-1] < 0.02


# --- the command --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    (["--method", "magic"], "--method"), (["--model", "no/such/folder"], "--model"), (["--compressor", "zip"], "--compressor"),
    (["--tasks", "nonsense"], "--tasks"), (["--device", "tpu"], "--device"), (["--bits", "9"], "--bits"),
    (["--sparsity", "1.0"], "--sparsity"), (["--text", "nonsense"], "--text"), (["--batch-size", "6"], "--batch-size"),
    (["--resume"], "--resume"), (["--prompt-lengths", "4,0"], "--prompt-lengths"), (["--steps", "0"], "--steps"),
    (["--method", "lora", "--targets", "lm_head"], "--targets"), (["--seqlen", "x"], "--seqlen"), (["--lr", "-1"], "--lr")])
def test_a_mistake_is_one_line(flags, word, capsys):
    """One line `error: ...` that names the flag, exit code 2, no traceback."""
    import loading
    with pytest.raises(SystemExit) as stop:
        loading.run(lambda: recover.main(flags + (["--limit", "1"] if "--targets" in flags else [])))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and word in err[0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_command(method, tmp_path):
    """The whole job on the toy model with a tiny budget, in a process of its own; then the adapter it wrote."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "recover.py"), "--method", method, "--steps", "3", "--limit", "8", "--out", str(out),
               "--nsamples", "4", "--batch-size", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((out / "results.json").read_text())
    assert {"command", "settings", "versions", "device", "seconds", "rows"} <= set(results)
    assert [row["row"] for row in results["rows"]] == ["dense", "compressed", method]
    for row in results["rows"]:
        assert {"ppl", "tasks", "trainable_params", "extra_bytes", "weight_bytes"} <= set(row)
        assert all({"acc", "n", "ci95"} <= set(task) for task in row["tasks"].values())
    assert (out / "results.md").read_text().strip() in result.stdout
    stored = [p for p in (out / "adapter").rglob("adapter_model.safetensors")]
    assert sum(t.numel() for p in stored for t in load_file(p).values()) == results["rows"][-1]["trainable_params"]


def test_several_methods_share_one_table_and_lora_is_merged(tmp_path, capsys):
    """One compression, one row a method, the merged rows: the same outputs unmerged and merged, a mask kept when asked."""
    out = tmp_path / "run"
    recover.main(["--method", "prompt,lora", "--merge", "--steps", "4", "--limit", "8", "--batch-size", "4", "--out", str(out)])
    rows = {row["row"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert list(rows) == ["dense", "compressed", "prompt", "lora", "lora merged", "lora merged, masked"]
    assert rows["lora merged"]["ppl"] == pytest.approx(rows["lora"]["ppl"], rel=1e-4)
    assert rows["lora merged"]["weight_bytes"] == rows["dense"]["weight_bytes"] > rows["lora merged, masked"]["weight_bytes"]
    assert rows["lora merged, masked"]["ppl"] != pytest.approx(rows["lora"]["ppl"], rel=1e-6)
    assert sorted(path.name for path in (out / "adapter").iterdir()) == ["lora", "prompt"]


def test_a_merged_weight_put_back_is_compressed_again():
    """What --merge calls masked has the compressed weight's zeros; what it calls rounded lies on a grid of 2^bits points."""
    import compress
    run = recover.Run.__new__(recover.Run)
    run.model, run.rows, seen = tiny_model("llama"), [], {}
    layer = run.model.model.layers[0].self_attn.q_proj
    for name, settings, Q in (("magnitude", {}, compress.magnitude(layer.weight, 0.5)),
                              ("rtn", dict(bits=2, group_size=16, sym=False, mse=False), compress.rtn(layer.weight, 2, 16))):
        layer.weight.data = Q
        method = LoRA(run.model, r=2, targets=["q_proj"])
        for tensor in method.tensors().values():
            nn.init.normal_(tensor)
        run.args = argparse.Namespace(compression=(name, settings))
        run.measure = lambda row, weight_bytes: seen.update({row: layer.weight.detach().clone()})
        run.merge(method, 0)
        assert torch.equal(layer.weight, Q)
        if name == "magnitude":
            assert (seen["lora merged, masked"][Q == 0] == 0).all() and (seen["lora merged"][Q == 0] != 0).any()
        else:
            assert all(len(group.unique()) <= 4 for row in seen["lora merged, rounded"] for group in row.split(16))
            assert any(len(group.unique()) > 4 for row in seen["lora merged"] for group in row.split(16))


def test_resume_of_a_finished_run_trains_no_more(tmp_path):
    state = tmp_path / "s.safetensors"
    first = fit(build("lora", tiny_model("llama")), 7, state_file=state)
    again = build("lora", tiny_model("llama"), seed=5)
    again.losses = None                                    # calling it would raise
    assert fit(again, 7, state_file=state, resume=True)["loss"] == first["loss"]
