"""Sweeps: rows are named, distinct, on disk as they come, and not measured twice."""
import json
import math

import pytest

from compress import COMPRESSORS
from experiments import sweep
from support.cli import UserError

SMALL = ["--limit", "4", "--steps", "2", "--batch-size", "4", "--nsamples", "2"]


def rows_of(out):
    """results.json -> {row name: row}."""
    return {row["row"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def test_every_compression_has_a_name_of_its_own_and_settings_that_exist():
    names = [sweep.describe(*entry) for entry in sweep.COMPRESSIONS]
    assert len(set(names)) == len(names) and "gptq 3 bits, group row, act-order" in names and "rtn 2 bits, group 64, mse" in names
    assert all(set(settings) <= {key for entry in COMPRESSORS.values() for key in entry[2]} for _, settings in sweep.COMPRESSIONS)


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """Rows before the cut are on disk; the same command, or one that asks for more rows, measures only what is missing."""
    out = tmp_path / "out"
    flags = ["compressors", "--limit", "4", "--nsamples", "2", "--out", str(out)]
    measured, calls = sweep.recover.Run.measure, []

    def cut_at_sparsegpt(job, name, *args, **kwargs):
        if "sparse" in name:
            raise KeyboardInterrupt
        calls.append(name)
        return measured(job, name, *args, **kwargs)
    monkeypatch.setattr(sweep.recover.Run, "measure", cut_at_sparsegpt)
    with pytest.raises(KeyboardInterrupt):
        sweep.main([*flags, "--only", "30 %;50 %"])
    assert calls == ["dense", "magnitude 30 %"] and len(list((out / "rows").iterdir())) == 2
    assert not (out / "results.json").exists(), "half a table is no table"
    monkeypatch.undo()
    monkeypatch.setattr(sweep.recover.Run, "measure", lambda job, name, *a, **k: (calls.append(name), measured(job, name, *a, **k)))
    sweep.main([*flags, "--only", "50 %"])
    assert calls == ["dense", "magnitude 30 %", "magnitude 50 %", "sparsegpt 50 %"]
    assert list(rows_of(out)) == ["dense", "magnitude 50 %", "sparsegpt 50 %"]
    sweep.main([*flags, "--only", "30 %;50 %"])
    assert calls[4:] == ["sparsegpt 30 %"], "what is there is looked up"
    assert list(rows_of(out)) == ["dense", "magnitude 30 %", "sparsegpt 30 %", "magnitude 50 %", "sparsegpt 50 %"]
    assert set(json.loads((out / "items.json").read_text())) == set(rows_of(out))
    assert "| sparsegpt 50 % | 17.00 |" in capsys.readouterr().out


def test_rows_of_other_settings_are_not_mixed_in(tmp_path):
    """A rank is not in the names of the sweep of rates: other ranks are other rows, under another digest."""
    flags = ["rates", *SMALL, "--method", "lora", "--rates", "0.01", "--out", str(tmp_path / "out")]
    sweep.main(flags)
    first = rows_of(tmp_path / "out")["lora, lr 0.01"]
    sweep.main([*flags, "--rank", "16"])
    second = rows_of(tmp_path / "out")["lora, lr 0.01"]
    assert second["trainable_params"] == 2 * first["trainable_params"] and second["ppl"] != first["ppl"]
    sweep.main(flags)
    assert rows_of(tmp_path / "out")["lora, lr 0.01"] == first


@pytest.mark.parametrize("rates", ["0,0.1", "-1", "inf", "nan"])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(UserError, match="--rates"):
        sweep.parse(["rates", f"--rates={rates}"])


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds thesis.txt already"):
        sweep.main(["sizes", "--out", str(tmp_path)])


@pytest.mark.parametrize("flags", [["compressors", "--bits", "3"], ["compressors", "--method", "lora"], ["sizes", "--rates", "0.1"],
                                   ["rates", "--lr", "0.1"], ["compressors", "--steps", "3"], ["sizes", "--only", "lora"]])
def test_flags_that_a_sweep_would_ignore_are_refused(flags):
    with pytest.raises(UserError, match=f"{flags[1]} .*takes no such flag"):
        sweep.parse(flags)


def test_no_interval_no_bar(tmp_path):
    assert all(map(math.isnan, sweep.bar(2.0, None))) and sweep.bar(2.0, [1.5, 3.0]) == (0.5, 1.0)
    assert sweep.bar(2.0, [2.0000001, 2.0]) == (0, 0), "rounding makes no negative bar, a matplotlib error"
    task = {"toy": {"acc": 1.0, "ci95": [0.566, 1.0]}}
    row = {"ppl": 2.0, "ppl_ci95": [1.0, 3.0], "ppl_chunks": 6, "tasks": task, "trainable_params": 8}
    assert sweep.perplexity_interval(row) == [1.0, 3.0]
    assert sweep.perplexity_interval({**row, "ppl_chunks": 5}) is None
    rows = [{**row, "row": "dense"}, {**row, "row": "compressed"}, {**row, "row": "lora, rank 1"},
            {**row, "row": "lora, rank 2", "ppl_ci95": None, "ppl_chunks": 1}]
    sweep.figure(rows, "a title").savefig(tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name, flags, rows", [
    ("rates", ["--method", "lora,prompt", "--rates", "0.01,0.1"], ["lora, lr 0.01", "lora, lr 0.1", "prompt, lr 0.01", "prompt, lr 0.1"]),
    ("rates", ["--method", "eora,lora", "--rates", "0.01", "--loss", "distill"], ["eora", "lora, lr 0.01, distill"]),
    ("sizes", ["--method", "lora"], [f"lora, rank {r}" for r in (1, 2, 4, 8, 16)])])
def test_rows_of_the_training_sweeps(name, flags, rows, tmp_path):
    sweep.main([name, *flags, *SMALL, "--out", str(tmp_path / "out")])
    found = rows_of(tmp_path / "out")
    assert list(found) == ["dense", "compressed", *rows]
    assert (tmp_path / "out" / "sizes.png").exists() == (name == "sizes")
    assert len({row["ppl"] for row in found.values()}) == len(found), "two rows are the same model"
    if name == "sizes":
        sizes = [found[row]["trainable_params"] for row in rows]
        assert [size // sizes[0] for size in sizes] == [1, 2, 4, 8, 16]
