"""One table of flags, mistakes in one line, ends of a run, progress in log files."""
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from conftest import ROOT
from kill import run_forked
from support import cli
from support.cli import FLAGS, UserError, check_limits, parse_flags, refuse_given
from support.progress import progress

DOC = "Test: a script."


@pytest.mark.parametrize("flag, value, word", [
    ("bits", "9", "from 2 to 8"), ("bits", "1", "from 2 to 8"), ("bits", "3.5", "whole"), ("bits", "x", "whole"), ("bits", "", "whole"),
    ("group_size", "0", "-1"), ("group_size", "-2", "-1"), ("percdamp", "0", "above 0"), ("percdamp", "nan", "above 0"),
    ("percdamp", "inf", "above 0"), ("sparsity", "1", "below 1"), ("sparsity", "-0.1", "0 to"), ("pattern", "4:2", "N:M"),
    ("pattern", "0:4", "N:M"), ("pattern", "2:4:8", "N:M"), ("nsamples", "0", "1 to"), ("nsamples", "10000000000", "1 to"),
    ("seqlen", "1", "2 to"), ("seed", "-1", "0 to"), ("seed", "9223372036854775808", "0 to"), ("lr", "0", "number"),
    ("lr", "-1", "number"), ("lr", "inf", "number"), ("lr", "nan", "number"), ("alpha", "inf", "number"), ("rank", "0", "1 to"),
    ("prompt_length", "1000000000000", "1 to"), ("prompt_lengths", "8,0", "each"), ("prompt_lengths", "", "each"),
    ("lengths", "-1", "each"), ("lengths", "8,8", "twice"), ("rates", "0.01,0.01", "twice"), ("rates", "0,1", "each"),
    ("targets", "q_proj,", "empty"), ("out", "", "not empty"), ("out", " ", "not empty"), ("model", "", "not empty"),
    ("limit", "0", "1 to"), ("eval_seqlen", "-700", "2 to"), ("eval_chunks", "0", "1 to"), ("eval_context", "-1", "0 to"),
    ("dtype", "int8", "one of"), ("text", "", "not empty"), ("steps", "1e3", "whole"), ("batch_size", "0", "1 to")])
def test_a_value_out_of_range_names_flag_value_and_range(flag, value, word):
    with pytest.raises(UserError, match=word) as error:
        parse_flags(DOC, list(FLAGS), [cli.flag_of(flag), value])
    assert cli.flag_of(flag) in str(error.value) and "\n" not in str(error.value)
    if value.strip():
        assert value in str(error.value)


def test_defaults_and_what_was_given():
    args = parse_flags(DOC, ["model", "bits", "seqlen", "sym", "lr"], ["--bits", "4", "--sym"])
    assert (args.model, args.bits, args.seqlen, args.sym, args.lr) == ("toy", 4, 64, True, None)
    assert args.given == ["bits", "sym"]
    assert parse_flags(DOC, ["model", "seqlen"], ["--model", "a/b"]).seqlen == 512


@pytest.mark.parametrize("argv, word", [(["--bits", "3", "--bits", "4"], "given twice"), (["--bit", "3"], "unrecognized"),
                                        (["--rank", "3"], "unrecognized"), (["--bits"], "expected one argument"), (["x"], "unrecognized"),
                                        (["--sym", "1"], "unrecognized")])
def test_nothing_asked_is_ignored(argv, word):
    with pytest.raises(UserError, match=word):
        parse_flags(DOC, ["bits", "sym"], argv)


def test_refuse_given_shows_what_was_typed():
    args = parse_flags(DOC, ["bits", "sym", "sparsity"], ["--sparsity", "0.5"])
    refuse_given(args, {"bits", "sym"}, "no")
    with pytest.raises(UserError, match="--sparsity 0.5: no such"):
        refuse_given(args, {"sparsity"}, "no such")


def test_functions_have_the_same_limits():
    check_limits(bits=3, group_size=-1, sym=True, pattern=None)
    for name, value in (("bits", 9), ("bits", 2.5), ("bits", True), ("group_size", 0), ("percdamp", float("nan")), ("pattern", "4:2")):
        with pytest.raises(UserError, match=cli.flag_of(name)):
            check_limits(**{name: value})


SCRIPTS = ["idp_minimal.py", "compress.py", "recover.py", "evaluate.py"]
EXPERIMENTS = ["latency", "patterns", "choosing", "sweep", "reproduce"]


@pytest.mark.parametrize("module", ["compress", "recover", "evaluate", *(f"experiments.{name}" for name in EXPERIMENTS)])
def test_every_script_has_help_with_defaults(module, capsys):
    import importlib
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--model" in text and "(default: toy)" in text and "model and data:" in text


def ended(code, *argv, send=None, **kwargs):
    """Run `code` (it may use run and UserError) in a process of its own. -> (exit code, stdout, stderr)."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom support.cli import *\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    if send:
        assert process.stdout.readline()
        process.send_signal(send)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def raising(error):
    """A main() that ends so."""
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize("main, code, word", [
    (raising(UserError("--bits 9:\n  no")), 2, "error: --bits 9: no"),
    (raising(torch.OutOfMemoryError("CUDA out of memory. Tried")), 2, "error: --device: out of memory"),
    (lambda argv: torch.empty(2**48), 2, "error: --device: out of memory"),
    (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), 2, "error: --device: out of memory"),
    (lambda argv: open("/nothing/here"), 2, "error: /nothing/here: No such file"),
    (raising(OSError(28, "No space left on device", "x/y")), 2, "make room on the disk; nothing was written"),
    (raising(SafetensorError("I/O error: No space (os error 28)")), 2, "No space left on device; make room"),
    (raising(KeyboardInterrupt()), 130, "interrupted: nothing was written"),
    (raising(BrokenPipeError()), 141, "")], ids=range(9))
def test_every_end_is_one_line(main, code, word):
    """In a child of this process, which has imported everything already."""
    got, text = run_forked(main, [])
    assert got == code and word in text and text.count("\n") == bool(word) and "Traceback" not in text


def test_a_bug_still_shows_its_traceback():
    assert run_forked(lambda argv: 1 / 0, [])[0] == 1
    assert "ZeroDivisionError" in run_forked(lambda argv: 1 / 0, [])[1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, code):
    rc, _, err = ended("import time\ndef main():\n    print('ready', flush=True); time.sleep(30)\nrun(main)", send=number)
    assert rc == code and err == "interrupted: nothing was written\n"


def test_an_ascii_terminal_and_a_closed_pipe():
    rc, out, err = ended("def main():\n    print('\\u00e9'); raise UserError('\\u00e9')\nrun(main)",
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert rc == 2 and out == "\\xe9\n" and err == "error: \\xe9\n"
    command = f"{sys.executable} -c \"import sys; sys.path.insert(0, '{ROOT}'); from support.cli import *\n" \
              "def main():\n    for i in range(100000): print(i)\nrun(main)\" | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n" and done.stderr == ""


def test_a_closed_stdout():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom support.cli import *\nrun(lambda: print('x'))"
    command = ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""


def test_a_home_that_no_shell_has_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/disk/mira")
    args = parse_flags("A script.", ["out", "model"], ["--out=~/x y", "--model", "a~b"])
    assert (args.out, args.model) == ("/disk/mira/x y", "a~b")


def test_progress_in_a_log_file_is_a_line_now_and_then(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress(range(3), desc="short")) == [0, 1, 2]
    assert log.getvalue() == ""                            # done within a minute: nothing to say
    for _ in progress(range(5), desc="long", mininterval=0, delay=0.01):
        time.sleep(0.02)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= 6 and all("long" in line and "/5" in line for line in lines) and "\r" not in log.getvalue()
