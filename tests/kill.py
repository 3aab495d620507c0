"""Kill a script at every file operation in turn, as kill -9 would, to see what it leaves.

    for k in kills(compress.main, ["--out", "m"], prepare):    # the run ended just before its k-th operation
        ...  # look at the disk; run it again with run_forked

A forked child runs main(argv) as the command line would: nothing is imported twice, so a run takes as long as
its work. It ends by os._exit(9): no `finally`, no buffer written, no lock file removed. File operations are
those that change the disk: opening a file for writing, renaming, removing, making folders, and safetensors'
writer, at which it also ends halfway.
"""
import builtins
import io
import os
import signal
import sys
import traceback

import safetensors.torch
import torch

from support import cli

KILLED = 9
CHANGES = ("replace", "rename", "renames", "mkdir", "rmdir", "unlink", "remove", "link", "symlink",
           "truncate")


class Operations:
    """Counts file operations, and ends the process before number `last`; 0: never."""

    def __init__(self, last):
        self.count, self.last = 0, last

    def step(self):
        """One operation is about to happen."""
        self.count += 1
        if self.count == self.last:
            os._exit(KILLED)

    def counted(self, function, counts=lambda *args, **settings: True):
        """The same function, counted where counts(its arguments)."""
        def call(*args, **settings):
            if counts(*args, **settings):
                self.step()
            return function(*args, **settings)
        return call

    def halfway(self, function):
        """safetensors' writer(tensors, file, ...): it is counted twice, the second time with half a file on
        the disk."""
        def call(tensors, file, *args, **settings):
            self.step()
            result = function(tensors, file, *args, **settings)
            if self.count + 1 == self.last:
                os.truncate(file, os.path.getsize(file) // 2)
            self.step()
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
            setattr(os, name, self.counted(getattr(os, name)))


def run_forked(main, argv, last=0, seconds=120):
    """main(argv) in a child that ends before its `last`-th file operation. -> exit code, what it printed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        run_child(main, argv, last, write, seconds)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def run_child(main, argv, last, write, seconds):
    """The child's part of run_forked: it never returns, so that no test goes on in two processes."""
    code = 1
    try:
        signal.alarm(seconds)                              # a hang ends by SIGALRM
        torch.set_num_threads(1)                           # the threads of the parent do not exist here
        for stream in (1, 2):
            os.dup2(write, stream)
        sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        Operations(last).watch()
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
