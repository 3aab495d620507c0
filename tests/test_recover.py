"""Contract tests over METHODS: a new remedy is graded here without editing a test."""
import argparse
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import compress
import recover
from conftest import CONFIGS, ROOT, tiny_model
from kill import run_forked
from support import cli
from support.cli import UserError
from support.output import claim
from methods.lora import LoRA
from methods.prompts import SoftPrompts
from methods.registry import METHODS
from recover import Checkpoint, batch_at, train

ARGS = argparse.Namespace(prompt_length=4, prompt_lengths=[2, 4], selector="mean_attention", layers="every",
                          scores="logits", rank=2, alpha=4, targets=None)


def build(method, model, seed=0):
    """A method with small settings, as the command line would build it."""
    if method == "lora_r4":
        return LoRA(model, r=4)
    entry = METHODS[method]
    return entry.build(model, **entry.settings(ARGS), seed=seed)


RECIPE = {"method": "lora", "settings": {"r": 2}, "lr": 0.1, "text": "0123", "steps": 2, "batch_size": 4, "weights": "cafe",
          "compression": {"compressor": "magnitude"}}


def text(tokens=600, seed=0):
    """Learnable text: a few tokens that follow each other in a fixed order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.arange(tokens) % 7 + 3 + torch.randint(0, 2, (tokens,), generator=generator)).long()


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
@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_every_method_trains_every_architecture(name, arch):
    method = build(name, tiny_model(arch))
    before = {k: t.detach().clone() for k, t in method.tensors().items()}
    fit(method, 2)
    assert all(t.isfinite().all() for t in method.tensors().values())
    moved = [k for k, t in method.tensors().items() if not torch.equal(before[k], t)]
    assert len(moved) == len(before), f"never moved: {set(before) - set(moved)}"


# --- prompts -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("learnt_from", [{}, {"teacher": tiny_model("llama", seed=1)}], ids=["text", "distill"])
def test_prompts_learn_separately(learnt_from):
    """m prompts side by side = m runs, each alone on every row [§3.3.1]. Also proves that padding leaks no gradient."""
    model = tiny_model("llama")
    both = SoftPrompts(model, [3, 5], seed=0)
    start = [P.detach().clone() for P in both.prompts]
    fit(both, 5, batch_size=4, **learnt_from)
    for k in range(2):
        alone = SoftPrompts(model, [len(start[k])])
        with torch.no_grad():
            alone.prompts[0].copy_(start[k])
        optimizer = torch.optim.AdamW(alone.prompts, lr=1e-2, weight_decay=0.0)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = recover.learning_rate(step, 5, 1e-2)
            alone.losses(batch_at(text(), step, 4, 12, 0), **learnt_from).mean().backward()
            nn.utils.clip_grad_norm_(alone.prompts, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(both.prompts[k], alone.prompts[0], atol=1e-5)


# --- distill -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(name for name, entry in METHODS.items() if entry.rates))
def test_distill_brings_a_method_nearer_to_the_dense_model(name):
    """From another model's distributions; that model and the base weights stay bit for bit."""
    model, teacher = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(parameter.abs() > parameter.abs().median())
    before = {k: v.clone() for m in (model, teacher) for k, v in m.state_dict(prefix=f"{id(m)}.").items()}
    method, ids = build(name, model), text()[:48].view(4, 12)
    divergence = lambda: method.losses(ids, teacher=teacher).mean().item()
    with torch.no_grad(), method.training():
        first = divergence()
    trained = fit(method, 40, lr=3e-2, teacher=teacher)
    with torch.no_grad(), method.training():
        assert divergence() < 0.95 * first and trained["loss"] < first
    after = {k: v for m in (model, teacher) for k, v in m.state_dict(prefix=f"{id(m)}.").items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_distill_accumulates_and_checkpoints_the_same():
    results = []
    for settings in ({}, {"accumulate": 2}, {"checkpointing": True}):
        method = build("idp", tiny_model("llama"))
        fit(method, 3, teacher=tiny_model("llama", seed=1), **settings)
        results.append(method.tensors())
    for other in results[1:]:
        assert all(torch.allclose(results[0][k], other[k], atol=1e-5) for k in other)


def test_the_teacher_is_dense_and_a_row_says_the_loss(tmp_path, monkeypatch):
    """The whole command: the copy is made before compression; a checkpoint of one loss is not the other's."""
    seen, plain = [], recover.train

    def noted(method, *args, teacher=None, **kwargs):
        """train(), with the share of zeros in what it learns from and in what it trains on."""
        zeros = [(m.model.layers[0].self_attn.q_proj.weight == 0).float().mean().item() for m in (teacher, method.model)]
        seen.append(zeros)
        return plain(method, *args, teacher=teacher, **kwargs)
    monkeypatch.setattr(recover, "train", noted)
    flags = ["--method", "eora,lora,idp", "--rank", "2", "--steps", "2", "--limit", "4", "--batch-size", "4", "--nsamples", "2"]
    out = ["--out", str(tmp_path / "run")]
    recover.main([*flags, "--loss", "distill", "--merge", *out])
    assert len(seen) == 2 and all(dense < 0.01 and model > 0.3 for dense, model in seen)
    rows = [row["row"] for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]]
    parts = [f"{part}, distill" for part in ("prompt 1 alone (8 tokens)", "prompt 2 alone (16 tokens)", "concatenated", "idp")]
    assert rows == ["dense", "compressed", "eora", "eora merged", "eora merged, masked", "lora, distill", "lora, distill merged",
                    "lora, distill merged, masked", *parts]
    (tmp_path / "run" / "results.json").unlink()
    monkeypatch.undo()
    with pytest.raises(UserError, match='--resume.*loss was "distill", now null'):
        recover.main([*flags, "--resume", *out])


# --- the loop ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(METHODS))
def test_resume_gives_the_same_weights(name, tmp_path):
    whole = build(name, tiny_model("llama"))
    fit(whole, 12)
    killed = build(name, tiny_model("llama"))
    losses = killed.losses
    def die_at_step_8(ids, calls=[]):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return losses(ids)
    killed.losses = die_at_step_8
    with claim(str(tmp_path / "run")) as out, pytest.raises(KeyboardInterrupt):
        fit(killed, 12, saved=Checkpoint(out, name, RECIPE), save_every=5)
    resumed = build(name, tiny_model("llama"), seed=3)     # whatever it starts from, the checkpoint decides
    with claim(str(tmp_path / "run"), True, ("checkpoint-*",)) as out:
        fit(resumed, 12, saved=Checkpoint(out, name, RECIPE), resume=True)
    for k, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[k]), k


def checkpoint_of(tmp_path, recipe=RECIPE, name="lora", method="lora"):
    """A run that was cut off after two steps, and one that goes on with `recipe`. -> what the second one raises."""
    with claim(str(tmp_path / "run")) as out:
        fit(build("lora", tiny_model("llama")), 2, saved=Checkpoint(out, "lora", RECIPE), save_every=1)
    with claim(str(tmp_path / "run"), True, ("checkpoint-*",)) as out, pytest.raises(UserError) as error:
        fit(build(method, tiny_model("llama")), 2, saved=Checkpoint(out, name, recipe), resume=True)
    return str(error.value)


@pytest.mark.parametrize("changed, word", [
    ({"lr": 0.5}, "lr was 0.1, now 0.5"), ({"text": "other"}, "text was"), ({"compression": {"compressor": "rtn"}}, "compressor was"),
    ({"settings": {"r": 4}}, "r was 2, now 4"), ({"weights": "beef"}, "weights was"), ({"batch_size": 8}, "batch_size was")])
def test_resume_names_the_setting_that_differs(changed, word, tmp_path):
    message = checkpoint_of(tmp_path, {**RECIPE, **changed})
    assert "--resume" in message and word in message


def test_resume_reads_what_it_is_given_with_care(tmp_path):
    assert "needed" in checkpoint_of(tmp_path, method="lora_r4")


@pytest.mark.parametrize("damage", ["cut", "no metadata", "step", "nan", "pickle"])
def test_a_damaged_checkpoint_is_one_line(damage, tmp_path):
    with claim(str(tmp_path / "run")) as out:
        fit(build("prompt", tiny_model("llama")), 2, saved=Checkpoint(out, "prompt", RECIPE), save_every=1)
    path = tmp_path / "run" / "checkpoint-prompt.safetensors"
    state = {name: t.clone() for name, t in load_file(path).items()}      # the file itself is mapped into memory
    good = json.dumps({"step": 2, "loss": 1.0, "recipe": RECIPE})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "no metadata":
        save_file(state, path)
    elif damage == "step":
        save_file(state, path, {"training": good.replace('"step": 2', '"step": -2')})
    elif damage == "nan":
        save_file({name: torch.full_like(t, float("nan")) for name, t in state.items()}, path, {"training": good})
    else:
        torch.save(state, path)
    with claim(str(tmp_path / "run"), True, ("checkpoint-*",)) as out, pytest.raises(UserError, match="--resume"):
        fit(build("prompt", tiny_model("llama")), 2, saved=Checkpoint(out, "prompt", RECIPE), resume=True)


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
    (["--sparsity", "1.0"], "--sparsity"), (["--text", "nonsense"], "--text"), (["--batch-size", "6", "--accumulate", "4"], "--batch-size"),
    (["--resume"], "--resume"), (["--prompt-lengths", "4,0"], "--prompt-lengths"), (["--steps", "0"], "--steps"),
    (["--method", "lora", "--targets", "lm_head"], "--targets"), (["--seqlen", "x"], "--seqlen"), (["--lr", "-1"], "--lr")])
def test_a_mistake_is_one_line(flags, word, capsys):
    """One line `error: ...` that names the flag, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: recover.main(flags + (["--limit", "1"] if "--targets" in flags else [])))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and word in err[0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_command(method, tmp_path):
    """The whole job on the toy model with a tiny budget; then the adapter it wrote. One method in a process
    of its own, which imports everything anew, the others each in a child of this one."""
    out = tmp_path / "run"
    flags = ["--method", method, "--limit", "8", "--out", str(out), "--nsamples", "4"]
    flags += ["--steps", "3", "--batch-size", "4"] if METHODS[method].rates else []
    if method == "idp":
        command = [sys.executable, str(ROOT / "recover.py"), *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        code, text = result.returncode, result.stdout + result.stderr
    else:
        code, text = run_forked(recover.main, flags)
    assert code == 0, text
    results = json.loads((out / "results.json").read_text())
    assert {"command", "settings", "versions", "device", "seconds", "rows"} <= set(results)
    parts = ["prompt 1 alone (8 tokens)", "prompt 2 alone (16 tokens)", "concatenated"] if method == "idp" else []
    assert [row["row"] for row in results["rows"]] == ["dense", "compressed", *parts, method]
    for row in results["rows"]:
        assert {"ppl", "tasks", "trainable_params", "extra_bytes", "weight_bytes"} <= set(row)
        assert all({"acc", "n", "ci95"} <= set(task) for task in row["tasks"].values())
    assert (out / "results.md").read_text().strip() in text
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


def merged_rows(name, settings, monkeypatch):
    """What every row of --merge is measured on: {row: W of one layer}, the compressed W, and its adapter."""
    model, seen = tiny_model("llama"), {}
    job, layer = recover.Run.__new__(recover.Run), model.model.layers[0].self_attn.q_proj
    job.model, job.grids = model, {}
    ids = text(64).view(2, 32)
    report = compress.compress_model(model, None, name, ids, grids=job.grids, codes=False, **settings)
    job.grids = {path: grid for path, grid in job.grids.items() if grid}
    method, Q = LoRA(model, r=2, targets=["q_proj"]), layer.weight.detach().clone()
    monkeypatch.setattr(job, "measure", lambda row, weight_bytes: seen.update({row: layer.weight.detach().clone()}), raising=False)
    return job, method, report, Q, seen


@pytest.mark.parametrize("name, settings, row", [
    ("rtn", dict(bits=2, group_size=16), "rounded"), ("gptq", dict(bits=3, group_size=16, act_order=True), "rounded"),
    ("magnitude", dict(sparsity=0.5), "masked"), ("sparsegpt", dict(pattern="2:4"), "masked"),
    ("sparsegpt_gptq", dict(sparsity=0.5, bits=3, group_size=16), "rounded and masked")])
def test_a_merged_weight_put_back_is_compressed_again(name, settings, row, monkeypatch):
    """On the compressed weight's own grid, under its own mask: so an adapter that learnt nothing changes nothing."""
    job, method, report, Q, seen = merged_rows(name, settings, monkeypatch)
    job.merge("lora", method, report)                      # B is 0: nothing learnt
    assert torch.equal(seen["lora merged"], Q) and torch.equal(seen[f"lora merged, {row}"], Q)
    for tensor in method.tensors().values():
        nn.init.normal_(tensor)
    job.merge("lora", method, report)
    back, dense = seen[f"lora merged, {row}"], seen["lora merged"]
    assert not torch.equal(back, Q) and not torch.equal(back, dense)
    if "masked" in row:
        assert (back[Q == 0] == 0).all() and (dense[Q == 0] != 0).any()
    if "rounded" in row:
        grid = next(grid for path, grid in job.grids.items() if path.endswith("0.self_attn.q_proj"))
        assert torch.equal(grid.round(back), back) and not torch.equal(grid.round(dense), dense)


def test_resume_of_a_finished_run_trains_no_more(tmp_path):
    with claim(str(tmp_path / "run")) as out:
        first = fit(build("lora", tiny_model("llama")), 7, saved=Checkpoint(out, "lora", RECIPE))
    again = build("lora", tiny_model("llama"), seed=5)
    again.losses = None                                    # calling it would raise
    with claim(str(tmp_path / "run"), True, ("checkpoint-*",)) as out:
        assert fit(again, 7, saved=Checkpoint(out, "lora", RECIPE), resume=True)["loss"] == first["loss"]
