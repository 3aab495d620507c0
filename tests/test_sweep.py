"""Sweeps: rows are named, distinct, on disk as they come, and not measured twice."""
import json

import pytest

import sweep
from compress import COMPRESSORS
from loading import UserError

SMALL = ["--limit", "4", "--steps", "2", "--batch-size", "4", "--nsamples", "2"]


def rows_of(out):
    """results.json -> {row name: row}."""
    return {row["row"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def test_every_compression_has_a_name_of_its_own_and_settings_that_exist():
    names = [sweep.describe(*entry) for entry in sweep.COMPRESSIONS]
    assert len(set(names)) == len(names) and "gptq 3 bits, group row, act-order" in names and "rtn 2 bits, group 64, mse" in names
    assert all(set(settings) <= {key for entry in COMPRESSORS.values() for key in entry[2]} for _, settings in sweep.COMPRESSIONS)


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "out", ["compressors", *SMALL, "--out", str(tmp_path / "out")]
    sweep.main([*flags, "--only", "magnitude 50 %"])
    first = rows_of(out)
    assert list(first) == ["dense", "magnitude 50 %"] and first["magnitude 50 %"]["ppl"] > first["dense"]["ppl"]

    def cut(*args, **kwargs):
        raise KeyboardInterrupt
    measured = sweep.recover.Run.measure
    monkeypatch.setattr(sweep.recover.Run, "measure", lambda run, name, *a, **k: (cut if "sparse" in name else measured)(run, name, *a, **k))
    with pytest.raises(KeyboardInterrupt):                 # rows before the cut are on disk
        sweep.main([*flags, "--only", "magnitude 30 %;sparsegpt 50 %", "--resume"])
    assert list(rows_of(out)) == ["dense", "magnitude 50 %", "magnitude 30 %"]
    monkeypatch.undo()
    sweep.main([*flags, "--only", "50 %", "--resume"])
    assert list(rows_of(out)) == ["dense", "magnitude 50 %", "magnitude 30 %", "sparsegpt 50 %"]
    assert all(rows_of(out)[name] == row for name, row in first.items()), "measured twice"
    assert set(json.loads((out / "items.json").read_text())) == set(rows_of(out))
    assert "| sparsegpt 50 % | 17.00 |" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["command"].count(" && ") == 2 and results["settings"]["out"] == str(out)
    with pytest.raises(UserError, match="nsamples is 2, here 3"):
        sweep.main(["compressors", *SMALL[:-1], "3", "--out", str(out), "--resume"])
    with pytest.raises(UserError, match="holds rows already"):
        sweep.main(flags)
    (out / "items.json").unlink()
    with pytest.raises(UserError, match="items.json"):
        sweep.main([*flags, "--resume"])


def test_rows_of_other_settings_are_not_mixed_in(tmp_path):
    """A size of the other sweep, a rate: they are not in the rows' names, so they must not differ."""
    flags = ["rates", *SMALL, "--method", "lora", "--out", str(tmp_path / "out")]
    sweep.main([*flags, "--rates", "0.01"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["lr"] is None
    with pytest.raises(UserError, match="rank is 8, here 16"):
        sweep.main([*flags, "--rates", "0.1", "--resume", "--rank", "16"])


@pytest.mark.parametrize("rates", ["0,0.1", "-1", "inf", "nan"])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(UserError, match="--rates"):
        sweep.parse(["rates", f"--rates={rates}"])


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match="not written by this command"):
            sweep.parse(["sizes", "--out", str(tmp_path), *more])


@pytest.mark.parametrize("name, flags, rows", [
    ("rates", ["--method", "lora,prompt", "--rates", "0.01,0.1"], ["lora, lr 0.01", "lora, lr 0.1", "prompt, lr 0.01", "prompt, lr 0.1"]),
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
