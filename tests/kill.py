"""Kill a script at every file operation in turn, as kill -9 would, to see what it leaves.

    for k in kills(compress.main, ["--out", "m"], prepare):    # the run ended just before its k-th operation
        ...  # look at the disk; run it again with run_forked
    run_forked(compress.main, ["--out", "m"], last=5, full=True)     # the disk is full from the 5th on

A forked child runs main(argv) as the command line would: nothing is imported twice, so a run takes as long as
its work. It ends by os._exit(9): no `finally`, no buffer written, no lock file removed. File operations are
those that change the disk: opening a file for writing, renaming, removing, making folders, and safetensors'
writer, at which it also ends halfway.
"""
import builtins
import errno
import io
import os
import pathlib
import signal
import sys
import traceback
from os import truncate                                  # os.truncate itself is counted

import safetensors
import safetensors.torch
import torch

from support import cli

KILLED = 9
CHANGES = ("replace", "rename", "renames", "mkdir", "rmdir", "unlink", "remove", "link", "symlink",
           "truncate")
FREES = ("rmdir", "unlink", "remove", "truncate")          # what a full disk still does


class Operations:
    """Counts file operations, and ends the process before number `last`; 0: never.

    full: instead, that one and all that follow find the disk full, except those that make room.
    """

    def __init__(self, last, full=False):
        self.count, self.last, self.full = 0, last, full

    def step(self, frees=False, error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        """One operation is about to happen. error: what it raises on a full disk."""
        self.count += 1
        if self.full and self.count >= self.last and not frees:
            raise error
        if not self.full and self.count == self.last:
            os._exit(KILLED)

    def counted(self, function, counts=lambda *args, **settings: True, frees=False):
        """The same function, counted where counts(its arguments)."""
        def call(*args, **settings):
            if counts(*args, **settings):
                self.step(frees)
            return function(*args, **settings)
        return call

    def halfway(self, function):
        """safetensors' writer(tensors, file, ...): it is counted twice, the second time with half a file on
        the disk."""
        error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

        def call(tensors, file, *args, **settings):
            self.step(error=error)
            result = function(tensors, file, *args, **settings)
            if self.count + 1 == self.last:
                truncate(file, os.path.getsize(file) // 2)
            self.step(error=error)
            return result
        return call

    def watch(self):
        """Count from here on. For the whole process: call it in a child."""
        safetensors.torch.serialize_file = self.halfway(safetensors.torch.serialize_file)
        writes = lambda file, mode="r", *args, **settings: bool(set(mode) & set("wax+"))
        flags = lambda path, flags, *args, **settings: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0
        io.open = builtins.open = self.counted(io.open, writes)
        os.open = self.counted(os.open, flags)
        for name in CHANGES:
            setattr(os, name, self.counted(getattr(os, name), frees=name in FREES))
        accessor = getattr(pathlib, "_NormalAccessor", None)         # Python 3.10 keeps functions of its own
        for name, module in (("open", io), *((name, os) for name in CHANGES)):
            if hasattr(accessor, name):
                setattr(accessor, name, staticmethod(getattr(module, name)))


def neighbours(folder):
    """Files of the user's beside --out, under names that a program might think its own."""
    for name in ("m.tmp", "m.old", ".m", "m.lock"):
        (folder / name).mkdir()
        (folder / name / "n.txt").write_text("mine")
    for name in (".m.tmp", "m.tmp.json", ".m.0123456789abcdef.tmp", "n.txt"):
        (folder / name).write_text("mine")


def listing(folder):
    """{path: bytes} of every file below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def run_forked(main, argv, last=0, seconds=120, full=False):
    """main(argv) in a child that ends before its `last`-th file operation, or finds the disk full from there
    on. -> exit code, what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        run_child(main, argv, Operations(last, full), write, seconds)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def run_child(main, argv, operations, write, seconds):
    """The child's part of run_forked: it never returns, so that no test goes on in two processes."""
    code = 1
    try:
        signal.alarm(seconds)                              # a hang ends by SIGALRM
        torch.set_num_threads(1)                           # the threads of the parent do not exist here
        for stream in (1, 2):
            os.dup2(write, stream)
        sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        operations.watch()
        cli.run(lambda: main(argv))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:                                  # a traceback is what the test must see
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kills(main, argv, prepare=lambda: None, most=300):
    """Yields 1, 2, ...: main(argv) was killed just before that file operation. Ends with an unkilled run.

    prepare: called before each run. Raises AssertionError when the unkilled run fails, or there is no end.
    """
    for last in range(1, most):
        prepare()
        code, text = run_forked(main, argv, last)
        if code != KILLED:
            assert code == 0, text
            return
        yield last
    raise AssertionError(f"more than {most} file operations")
