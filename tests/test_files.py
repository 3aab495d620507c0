"""Reading what strangers wrote, and writing without losing anything."""
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT
from support import files, output
from support.cli import UserError
from support.files import Fields, Tensors, read_fields, read_jsonl, read_text
from support.output import claim


# --- reading -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw, word", [
    (b"", "not JSON"), (b"[1]", "list"), (b'"x"', "str"), (b"{", "not JSON"), (b'{"a": NaN}', "NaN"),
    (b'{"a": -Infinity}', "Infinity"), (b'{"a": "\\ud800"}', "half a character"), (b"\xff\xfe{}", "UTF-8"),
    (b"[" * 100_000, "nested"), (b'{"a": 1} x', "not JSON")])
def test_a_broken_json_file_is_one_line(raw, word, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="--adapter") as error:
        read_fields(path, "--adapter")
    assert word in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfMira")
    assert read_text(path, "--text") == "Mira"
    path.write_bytes(b'\xef\xbb\xbf{"text": "Mira"}\n')
    assert read_jsonl(path, "--text") == [{"text": "Mira"}]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")                           # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not a file"):
            read_text(path, "--text")


def test_fields_name_key_and_rule():
    fields = Fields({"r": True, "alpha": 10 ** 400, "name": 3, "list": [1, "x"]}, "f.json", "--adapter")
    for key, rule in (("r", files.whole_number(1, 8)), ("alpha", files.number(0, 1e6)), ("name", files.STRING),
                      ("list", files.list_of(files.whole_number(0, 5))), ("missing", files.BOOL), ("r", files.one_of(1))):
        with pytest.raises(UserError, match=f"--adapter f.json: {key} is"):
            fields(key, rule)
    assert fields("missing", files.BOOL, None) is None and fields("r", files.BOOL) is True


def test_tensors_are_checked_before_they_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.int32), "c": torch.tensor([float("nan")])}, path)
    with Tensors(path, "--adapter") as file:
        assert file.read("a", (2, 3)).sum() == 6
        for name, shape, word in (("a", (3, 2), "needed"), ("b", (2,), "I32"), ("c", (1,), "finite"), ("d", (1,), "lacks d")):
            with pytest.raises(UserError, match=word):
                file.read(name, shape)
        with pytest.raises(UserError, match="no place for b"):
            file.exactly(["a", "c"])
        with pytest.raises(UserError, match="lacks z"):
            file.exactly(["a", "b", "c", "z"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cannot be read"), Tensors(path, "--adapter"):
        pass


# --- writing -------------------------------------------------------------------------------------------------------------

def everything(folder):
    """All names below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_and_folders_appear_whole(tmp_path):
    with claim(str(tmp_path / "runs/x")) as out:
        out.json("results.json", {"a": 1})
        with out.folder("adapter") as folder:
            (folder / "w").write_text("w")
            assert not (tmp_path / "runs/x/adapter").exists()
        with pytest.raises(ZeroDivisionError), out.folder("half") as folder:
            1 / 0
    assert everything(tmp_path) == ["runs", "runs/x", "runs/x/adapter", "runs/x/adapter/w", "runs/x/results.json"]


def test_a_number_that_is_none_is_not_written(tmp_path):
    with claim(str(tmp_path / "x")) as out, pytest.raises(ValueError):
        out.json("results.json", {"ppl": float("nan")})
    assert everything(tmp_path) == []


def test_neighbours_and_contents_are_never_touched(tmp_path):
    for name in ("m.old", "m.tmp", ".m.tmp", "m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(UserError, match="holds notes.txt already"), claim(str(tmp_path / "m")):
        pass
    (tmp_path / "m/notes.txt").unlink()
    with claim(str(tmp_path / "m")) as out, out.folder() as folder:
        (folder / "notes.txt").write_text("ours")
    assert everything(tmp_path) == before and (tmp_path / "m.old/notes.txt").read_text() == "mine"


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with claim(str(tmp_path / "link")) as out, out.folder() as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/x").read_text() == "x"


@pytest.mark.parametrize("bad, word", [(".", "current folder"), ("/", "disk"), ("file", "is no folder"), ("file/x", "cannot be made"),
                                       ("x" * 300, "name another"), ("loop", "cannot be made|is no folder"),
                                       ("a\0b", "cannot be made"), ("a\udcff", "cannot be made")])
def test_what_would_fail_later_fails_at_once(bad, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=word) as error, claim(bad):
        pass
    assert "--out" in str(error.value)


def test_a_read_only_parent_is_said_at_once(tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is simulated where the system gives it."""
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(output, "open", refuse, raising=False)
    with pytest.raises(UserError, match="cannot be written to .permission denied"), claim(str(tmp_path / "x")):
        pass


def test_two_runs_one_folder(tmp_path):
    with claim(str(tmp_path / "x")):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), claim(str(tmp_path / "x")):
            pass
    with claim(str(tmp_path / "x")) as out:                # and free again
        out.text("a", "a")


def test_a_stranger_lock_file_is_left_alone(tmp_path):
    (tmp_path / ".x.lock").write_text("my notes")
    with pytest.raises(UserError, match="was not written by this program"), claim(str(tmp_path / "x")):
        pass
    assert (tmp_path / ".x.lock").read_text() == "my notes"


def test_the_next_run_clears_away_what_a_killed_one_left(tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from support.output import claim\n"
            "with claim(sys.argv[2]) as out:\n"
            "    (out.temporary / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)")
    run = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match=f"process {run.pid}"), claim(str(tmp_path / "x")):
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(everything(tmp_path)) == 3                  # lock, temporary folder and the half of a file in it
    with claim(str(tmp_path / "x")) as out:
        out.text("a", "a")
    assert everything(tmp_path) == ["x", "x/a"]


def test_only_a_sweeps_own_folder_is_gone_on_with(tmp_path):
    (tmp_path / "x/rows").mkdir(parents=True)
    (tmp_path / "x/rows/chairs.txt").write_text("mine")
    (tmp_path / "x/results.md").write_text("mine")
    with pytest.raises(UserError, match="holds results.md already"), claim(str(tmp_path / "x"), rows=True):
        pass
    with claim(str(tmp_path / "y"), rows=True) as out:
        out.text("rows/0123456789abcdef.json", "{}")
    with claim(str(tmp_path / "y"), rows=True) as out:
        out.text("results.md", "x")


def test_how_a_cut_off_run_goes_on(tmp_path):
    folder = str(tmp_path / "x")
    with claim(folder, going_on=("checkpoint-*",)) as out:
        out.text("checkpoint-idp.safetensors", "x")
    with pytest.raises(UserError, match="go on with --resume"), claim(folder, going_on=("checkpoint-*",)):
        pass
    with claim(folder, resume=True, going_on=("checkpoint-*",)) as out:
        out.text("results.json", "{}")
    with pytest.raises(UserError, match="finished"), claim(folder, resume=True, going_on=("checkpoint-*",)):
        pass
    with pytest.raises(UserError, match="holds checkpoint-idp.safetensors already"), claim(folder, going_on=("checkpoint-*",)):
        pass
    with claim(str(tmp_path / "new"), resume=True, going_on=("checkpoint-*",)):      # nothing yet: a queue starts with --resume
        pass
