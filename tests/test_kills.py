"""Killed, interrupted, or out of disk at every file operation: what is there is whole, and the same command
goes on to the result of a run that nothing disturbed.

pytest -rP shows how many points each script was tried at.
"""
import functools
import json
import os
import shutil
import signal

import matplotlib.pyplot as plt
import pytest
from safetensors.torch import load_file

import compress
import evaluate
import recover
from conftest import tiny_model, tiny_tokenizer
from experiments import choosing, latency, patterns, sweep
from kill import kills, listing, neighbours, run_forked
from support.output import claim

FLAGS = ["--model", "tiny", "--text", "text.txt"]
SIZES = ["--compressor", "magnitude", "--nsamples", "2", "--seqlen", "16", "--train-seqlen", "8",
         "--batch-size", "4", "--limit", "2", "--tasks", "task.jsonl"]
TRAIN = [*FLAGS, *SIZES, "--method", "idp,lora", "--prompt-lengths", "2,2", "--rank", "2", "--steps", "4",
         "--out", "m"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a text, a task and files of the user's; in place of every model a tiny one that is in
    memory already, and a checkpoint every two steps. A child changes its own copy of the model."""
    small = tiny_model("llama", num_hidden_layers=1), tiny_tokenizer()
    small[0].compression = {}
    for module in (compress, recover, evaluate, choosing, latency, patterns):
        monkeypatch.setattr(module, "load_model", lambda *args: small)
    monkeypatch.setattr(recover, "train", functools.partial(recover.train, save_every=2))
    monkeypatch.setattr(patterns, "figure", lambda rows, caption: plt.figure(figsize=(1, 1)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97}" for i in range(300)))
    (tmp_path / "task.jsonl").write_text('{"context": "w3", "choices": ["w4", "w5"], "answer": 0}\n')
    neighbours(tmp_path)
    return tmp_path


def no_seconds(value):
    """The same JSON value without what a clock says."""
    if isinstance(value, dict):
        return {key: no_seconds(entry) for key, entry in value.items() if key != "seconds"}
    return [no_seconds(entry) for entry in value] if isinstance(value, list) else value


def result_of(out):
    """All that a run found: rows, items, and every tensor of its adapters as bytes."""
    tensors = {str(path): {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
               for path in out.rglob("adapter_model.safetensors")}
    files = {path.name: path.read_text() for path in (out / "items.json", out / "results.md")}
    return no_seconds(json.loads((out / "results.json").read_text())["rows"]), files, tensors


def undisturbed(here, main, argv):
    """What a run into "m" gives when nothing happens, and its files. The folder is gone afterwards."""
    code, text = run_forked(main, argv)
    assert code == 0, text
    result, names = result_of(here / "m"), sorted(listing(here / "m"))
    remove_m()
    return result, names


def remove_m():
    """Before each run: no folder "m"."""
    shutil.rmtree("m", ignore_errors=True)


def only_ours(here, before):
    """Assert that outside "m" all is as it was: nothing of the user's lost, nothing of ours left."""
    assert {name: data for name, data in listing(here).items() if not name.startswith("m/")} == before
    folders = {path.name for path in here.iterdir() if path.is_dir()}
    assert folders - {"m", "run"} == {"m.tmp", "m.old", ".m", "m.lock"}, "a temporary folder is left"


def tried_again(here, whole, seen):
    """After a recover.py that was cut off: a new run is told how to go on, or that all is done; with --resume
    it ends like an undisturbed one. That much is run once for each state of the disk; seen: those so far."""
    out = here / "m"
    done, begun = (out / "results.json").exists(), out.exists() and any(out.iterdir())
    if begun:
        code, text = run_forked(recover.main, TRAIN)
        assert code == 2 and text.count("\n") == 1, text
        assert ("holds" if done else "go on with --resume") in text, text
    else:
        claimed_and_left(here)
    state = str(sorted(listing(out).items())) if not done else "done"
    if not done and state not in seen:
        seen.add(state)
        code, text = run_forked(recover.main, [*TRAIN, "--resume"] if begun else TRAIN)
        assert code == 0, text
        done = True
    assert not done or result_of(out) == whole


def claimed_and_left(here, **settings):
    """What the next run does first: claim the folder, and clear away what was left."""
    with claim("m", **settings):
        pass


# --- 1. Killed at every file operation ----------------------------------------------------------------------

def test_recover_killed(here):
    before, seen = listing(here), set()
    whole, names = undisturbed(here, recover.main, TRAIN)
    assert len(whole[2]) == 3, "two prompts and a LoRA"
    for killed in kills(recover.main, TRAIN, remove_m):
        assert all(listing(here)[name] == data for name, data in before.items()), killed
        tried_again(here, whole, seen)
        only_ours(here, before)
        assert set(listing(here / "m")) <= set(names), killed
    print(f"recover: {killed} tried, {killed} whole, {len(seen)} states of the disk")
    assert killed >= 60 and len(seen) == 9


def test_sweep_killed(here):
    """Rows are files: the same command goes on with those that are there."""
    before, seen = listing(here), set()
    command = ["rates", *FLAGS, *SIZES, "--method", "lora", "--rates", "0.01,0.1", "--steps", "2", "--out", "m"]
    whole, names = undisturbed(here, sweep.main, command)
    assert len(names) == 4 + 3, "four rows, three tables"
    for killed in kills(sweep.main, command, remove_m):
        assert all(listing(here)[name] == data for name, data in before.items()), killed
        claimed_and_left(here, rows=True)
        there = listing(here / "m")
        if str(sorted(there)) not in seen:
            seen.add(str(sorted(there)))
            code, text = run_forked(sweep.main, command)
            assert code == 0 and result_of(here / "m") == whole, text
            assert sorted(listing(here / "m")) == names, killed
            rows = {row: data for row, data in there.items() if row.startswith("rows/")}
            assert rows.items() <= listing(here / "m").items(), "measured twice"
        only_ours(here, before)
    print(f"sweep: {killed} tried, {killed} whole, {len(seen)} states of the disk")
    assert killed >= 30 and len(seen) == 1 + 4 + 3


ONCE = {  # script -> its main, its flags, what it writes
    "evaluate": (evaluate, ["--tasks", "task.jsonl", "--eval-seqlen", "8", "--limit", "2", *FLAGS],
                 ["items.json", "results.json", "results.md"]),
    "choosing": (choosing, [*FLAGS, *SIZES, "--tables", "rules", "--steps", "1", "--m", "2", "--seeds", "1"],
                 ["choosing.json", "choosing.md"]),
    "latency": (latency, ["--model", "tiny", "--lengths", "4", "--repeats", "1", "--decode-tokens", "1"],
                ["latency.json", "latency.md"]),
    "patterns": (patterns, ["--adapter", "run/adapter/idp", *FLAGS, "--eval-seqlen", "8"],
                 ["patterns.json", "patterns.md", "patterns.png"])}


@pytest.mark.parametrize("script", sorted(ONCE))
def test_scripts_that_write_once_killed(script, here):
    """Nothing or all of it: a folder that is there is whole."""
    module, flags, names = ONCE[script]
    if script == "patterns":
        code, text = run_forked(recover.main, [*TRAIN[:-1], "run"])
        assert code == 0, text
    before, command = listing(here), [*flags, "--out", "m"]
    for killed in kills(module.main, command, remove_m):
        assert all(listing(here)[name] == data for name, data in before.items()), killed
        if (here / "m").exists():
            code, text = run_forked(module.main, command)
            assert code == 2 and "holds" in text and sorted(listing(here / "m")) == names, text
        else:
            claimed_and_left(here)
        only_ours(here, before)
    assert sorted(listing(here / "m")) == names
    print(f"{script}: {killed} tried, {killed} whole")
    assert killed >= 6


# --- 2. Ctrl-C and SIGTERM, a second run, a full disk -------------------------------------------------------

def after_steps(monkeypatch, count, act):
    """Call act() in recover.py's training when `count` steps have been made, over all methods."""
    one_step, made = recover.one_step, []
    def step(*args):
        """One step more."""
        made.append(1)
        if len(made) == count + 1:
            act()
        return one_step(*args)
    monkeypatch.setattr(recover, "one_step", step)


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("steps, kept", [(1, 0), (3, 2), (5, 4)])
def test_interrupted_in_training(steps, kept, sent, code, here, monkeypatch):
    """One line that says what is kept, nothing left over, and the run goes on."""
    before, (whole, _) = listing(here), undisturbed(here, recover.main, TRAIN)
    with monkeypatch.context() as patch:
        after_steps(patch, steps, lambda: os.kill(os.getpid(), sent))
        got, text = run_forked(recover.main, TRAIN)
        assert got == code and "Traceback" not in text, text
        words = f"{here / 'm'} holds a checkpoint of step {kept}; go on with the same command and --resume"
        assert text.splitlines()[-1] == "interrupted: " + (words if kept else "nothing was written to m")
        after_steps(patch, 0, lambda: os.kill(os.getpid(), sent))
        got, text = run_forked(recover.main, [*TRAIN, "--resume"])
        words = "m is as it was; the same command goes on with it" if kept else "nothing was written to m"
        assert got == code and text.splitlines()[-1] == f"interrupted: {words}"
    only_ours(here, before)
    tried_again(here, whole, set())


def test_a_second_run_is_refused_and_the_first_unharmed(here, monkeypatch):
    whole, _ = undisturbed(here, recover.main, TRAIN)
    def second():
        """The same command, and with --resume, while the first is in training."""
        for more in ([], ["--resume"]):
            code, text = run_forked(recover.main, [*TRAIN, *more])
            print(f"second: {code} {text.strip()}")
    after_steps(monkeypatch, 3, second)
    code, text = run_forked(recover.main, TRAIN)
    assert code == 0, text
    assert text.count("second: 2 error: --out m: another run is writing there (process ") == 2, text
    assert result_of(here / "m") == whole


def test_a_disk_that_fills_up(here):
    """At any file operation: one line, exit code 2, nothing half-written; with room again it goes on."""
    before, seen = listing(here), set()
    whole, names = undisturbed(here, recover.main, TRAIN)
    for tried in range(1, 300, 4):
        remove_m()
        code, text = run_forked(recover.main, TRAIN, tried, full=True)
        if code == 0:
            break
        assert code == 2 and text.count("error: ") == 1 and "Traceback" not in text, text
        assert "no space left" in text.lower(), text
        assert ("go on with" in text) == any((here / "m").glob("checkpoint*")), text
        only_ours(here, before)
        tried_again(here, whole, seen)
        only_ours(here, before)
        assert set(listing(here / "m")) <= set(names), tried
    print(f"full disk: {tried // 4} tried, {tried // 4} whole, {len(seen)} states of the disk")
    assert tried >= 40


@pytest.mark.parametrize("packed", [[], ["--packed"]])
@pytest.mark.parametrize("most", [0, 400, 3000, 20_000])
def test_what_the_system_says_when_no_more_can_be_written(most, packed, here):
    """Not a stand-in: a limit on the size of files, met by the writers of Python and safetensors."""
    resource = pytest.importorskip("resource")
    before = listing(here)
    def limited(argv):
        """compress.py, with no file larger than `most` bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        compress.main(argv)
    small = ["--compressor", "rtn", "--nsamples", "2", "--seqlen", "16"]
    code, text = run_forked(limited, [*FLAGS, *small, *packed, "--out", "m"])
    assert code == 2 and text.count("error: ") == 1 and "file too large" in text.lower(), text
    assert listing(here) == before and not (here / "m").exists()
