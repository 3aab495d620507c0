"""Flips of a real model and their noise floor: counts by hand, restarts, shards, mistakes."""
import json

import pytest

from experiments import flips
from support.cli import UserError
from support.uncertainty import mcnemar

TINY = ["--limit", "4", "--steps", "1", "--batch-size", "2", "--nsamples", "1", "--eval-seqlen", "16",
        "--seqlen", "16", "--train-seqlen", "16", "--rank", "1", "--tasks", "toy_recall,toy_unknown",
        "--compressor", "gptq", "--bits", "2"]


def row(values, task="a"):
    """A row of one task."""
    return {"ppl": 2.0, "tasks": {task: {"acc": 0, "n": len(values)}}, "items": {task: {"values": values}}}


def test_counts_by_hand():
    dense = [True, True, True, True, False, False, False]
    compressed = [False, False, True, True, False, False, True]
    other = [True, False, False, True, True, False, False]
    assert flips.counts(dense, compressed, other) == {
        "lost": 2, "back": 1, "kept": 2, "newly_lost": 1, "never": 2, "gained": 1}
    same = flips.counts(dense, compressed, compressed)
    assert same["back"] == same["newly_lost"] == same["gained"] == 0, "the compressed row is its own base"


def test_what_comes_back_is_tested_against_another_sample():
    rows = {"dense": row([True] * 12 + [False]), "compressed": row([False] * 10 + [True] * 3),
            flips.SAMPLE: row([True] * 2 + [False] * 8 + [True] * 3), "new": row([True] * 8 + [False] * 5)}
    test = flips.beyond_noise(rows, "new")
    assert test["difference"] == pytest.approx(0.6), "8 of the 10 lost items against 2"
    assert test["p"] == mcnemar([True] * 2 + [False] * 8, [True] * 8 + [False] * 2)
    assert flips.beyond_noise(rows, flips.SAMPLE)["p"] == 1
    for one in rows.values():
        one["ppl"] = 3
    lines = flips.table(rows, [flips.Model("new", 0, False, "lora", 0), flips.Model(flips.SAMPLE, 1)]).splitlines()
    # dense has the first 12 of 13 right, the compressed one the last 3
    assert lines[2].startswith("| new | 3.00 | 61.5 | 4 / 0 | 3 / 8, p 0.23 | 8/10 80.0 % ")
    assert lines[3].startswith(f"| {flips.SAMPLE} | 3.00 | 38.5 | 8 / 1 | 0 / 2, p 0.5 | 2/10 20.0 % ")


def test_every_model_is_asked_and_each_compression_once():
    plan = flips.plan(["lora", "prompt"], 3)
    assert [model.label for model in plan] == [
        "dense", "lora on the dense model", "prompt on the dense model", "compressed", "lora, seed 3",
        "lora, seed 4", "prompt, seed 3", "prompt, seed 4", flips.SAMPLE, "compressed, other threads"]
    assert {model.sample for model in plan} == {None, 3, 4}
    weights = [(model.sample, model.other) for model in plan]
    assert len(set(weights)) == 1 + sum(a != b for a, b in zip(weights, weights[1:])), "they stand together"


def test_shards_fill_one_table_and_the_command_goes_on(tmp_path, capsys, monkeypatch):
    out, trained = tmp_path / "out", []
    train = flips.recover.train
    monkeypatch.setattr(flips.recover, "train", lambda *args, **kw: trained.append(1) or train(*args, **kw))
    flips.main([*TINY, "--shard", "2/2", "--out", str(out)])
    assert "not there yet" in capsys.readouterr().out
    flips.main([*TINY, "--shard", "1/2", "--out", str(out)])
    text = (out / "flips.md").read_text()
    assert "Not there yet" not in text and len(trained) == 3
    before = json.loads((out / "flips.json").read_text())
    flips.main([*TINY, "--out", str(out)])
    assert len(trained) == 3, "nothing is measured twice"
    after = json.loads((out / "flips.json").read_text())
    assert after["counts"] == before["counts"] and after["rows"] == before["rows"]
    count = after["counts"]["compressed"]
    assert count["back"] == 0 < count["lost"] and list(after["tests"]) == ["lora, seed 0", "lora, seed 1"]
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(after["rows"]) == 9


@pytest.mark.parametrize("flags, words", [
    (["--tasks", ""], "--tasks: missing"), (["--shard", "1/2"], "--shard 1/2: needs --out"),
    (["--shard", "3/2", "--out", "x"], "--shard 3/2"), (["--merge"], "--merge"), (["--compressor", "rtn"], "reads no calibration text")])
def test_mistakes(flags, words):
    with pytest.raises(UserError, match=words):
        flips.parse(flags if "--compressor" in flags else ["--compressor", "gptq", *flags])


def test_rows_of_another_machine_are_not_taken(tmp_path, monkeypatch):
    """What other threads are depends on how many there were."""
    first = flips.parse([*TINY, "--out", str(tmp_path / "out")])
    one = flips.Flips(first, None).recipe
    monkeypatch.setattr(flips, "device_name", lambda device: "cpu (another, 7 threads)")
    assert flips.Flips(first, None).recipe != one
