"""The folder of --out: one way to write that loses nothing.

    with claim("runs/x") as out:                           # one run a folder; what is there is never replaced
        out.json("results.json", {...})                    # each file whole or not at all
        with out.folder("adapter") as folder: ...          # a folder likewise; "" is runs/x itself

What a run writes is made in one temporary folder beside --out and moved when it is complete. The lock file
beside --out names that folder, so the next run clears away what a killed one left there, and nothing else.
"""
import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil

from safetensors.torch import save_file

from support.cli import Kept, UserError
from support.files import why

try:
    import fcntl
except ImportError:                              # Windows: no lock is held there, two runs are not told apart
    fcntl = None


def json_text(obj):
    """Indented JSON. Raises ValueError for a number that is not finite: no result may look so."""
    return json.dumps(obj, indent=2, sort_keys=False, allow_nan=False) + "\n"


def write_json(path, obj):
    """A JSON file inside a folder that is still temporary."""
    pathlib.Path(path).write_text(json_text(obj), encoding="utf-8")


class Output:
    """The folder of --out, claimed: made of whole files and whole folders."""

    def __init__(self, path, temporary):
        self.path, self.temporary = path, temporary

    def move(self, name):
        """From the temporary folder to its place, at once."""
        self.path.mkdir(exist_ok=True)
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.temporary / "whole", self.path / name)

    def text(self, name, text):
        """A text file. One of ours of that name is replaced."""
        (self.temporary / "whole").write_text(text, encoding="utf-8", errors="backslashreplace")
        self.move(name)

    def json(self, name, obj):
        """A JSON file."""
        self.text(name, json_text(obj))

    def tensors(self, name, tensors, metadata):
        """A safetensors file."""
        save_file(tensors, self.temporary / "whole", metadata=metadata)
        self.move(name)

    def figure(self, name, fig):
        """A PNG file of a matplotlib figure."""
        fig.savefig(self.temporary / "whole", dpi=150, format="png")
        self.move(name)

    @contextlib.contextmanager
    def folder(self, name=""):
        """`with out.folder("adapter") as folder:` fill it; it becomes that folder, or --out itself."""
        made = self.temporary / "folder"
        made.mkdir()
        yield made
        target = self.path / name if name else self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and os.name == "nt":
            target.rmdir()                                 # empty, or claim() would have refused it
        os.replace(made, target)


@contextlib.contextmanager
def claim(out, resume=False, going_on=(), rows=False, part=""):
    """Claim the folder `out` for one run, before slow work. Yields an Output, or None when out is None.

    out: a new or an empty folder. resume: it holds a run that was cut off. going_on: names of files by which
    such a run is recognised, so that a new run is told how to go on. rows: the run keeps each row under a
    digest in rows/, so that it may go on in a folder that has one; tables made of rows are then written anew.
    part: this run makes a part of the rows, beside runs that make other parts; each has a lock of its own.
    Raises UserError for anything that would fail later or lose something: a folder that holds something, no
    right to write, a file in the way, another run at work there.
    """
    if out is None:
        yield None
        return
    path = resolve(out)
    with locked(path, out, part) as temporary:
        if not (rows and has_rows(path)):
            check_contents(path, out, resume, going_on)
        begun = path.is_dir() and any(path.iterdir())
        Kept.words = f"nothing was written to {out}"
        if begun:
            Kept.words = f"{out} is as it was; the same command goes on with it"
        yield Output(path, temporary)


def has_rows(path):
    """Does a folder hold rows of ours, each under its digest? An empty rows/ alone: a run killed at once."""
    if not (path / "rows").is_dir():
        return False
    names = [entry.name for entry in (path / "rows").iterdir()]
    ours = all(re.fullmatch("[0-9a-f]{16}[.]json", name) for name in names)
    return ours and (bool(names) or len(list(path.iterdir())) == 1)


def resolve(out):
    """The folder that --out means, links followed. Its parent exists afterwards. Raises UserError."""
    try:
        path = pathlib.Path(out).expanduser().resolve()
        str(path).encode("utf-8")                          # safetensors and tokenizers take no other names
        taken = path.is_symlink() or path.exists() and not path.is_dir()     # a link: Python 3.13, of a loop
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--out {out}: cannot be made ({why(error)}); name another folder") from error
    if taken:
        raise UserError(f"--out {out}: is no folder; name a new one")
    if path == pathlib.Path.cwd() or path.is_mount() or not path.name:
        raise UserError(f"--out {out}: is the current folder, or a whole disk; name a new folder in it")
    return path


@contextlib.contextmanager
def locked(path, out, part=""):
    """Hold the lock file (of this part) beside `path` and a temporary folder; yield that folder."""
    lock = path.with_name(f".{path.name}{part and '.' + part}.lock")
    temporary = lock.with_name(f"{lock.name.removesuffix('lock')}{secrets.token_hex(8)}.tmp")
    try:
        file = open(lock, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--out {out}: {lock.parent} cannot be written to ({why(error)}); name another "
                        "folder") from error
    with file:
        take(file, lock, out)
        clear_leftover(file, lock, out)
        try:
            os.write(file.fileno(), f"{os.getpid()} {temporary.name}".encode())
            temporary.mkdir()                    # first the name, then the folder: a kill leaves no orphan
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.unlink(missing_ok=True)


def take(file, lock, out):
    """Take the lock, or say who holds it. The system frees it when a process ends, however it ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino
    except OSError:
        alone = False
    if not alone:
        raise UserError(f"--out {out}: another run is writing there (process {note(file, lock)[0]}); wait, "
                        "or name another")


def note(file, lock):
    """What a lock file says: (its run's process, its temporary folder); ("?", None) if it is not ours."""
    file.seek(0)
    stem = re.escape(lock.name.removesuffix("lock"))
    found = re.fullmatch(f"([0-9]+) ({stem}[0-9a-f]{{16}}[.]tmp)", file.read())
    return found.groups() if found else ("?", None)


def clear_leftover(file, lock, out):
    """Remove the temporary folder of a killed run, which its lock file names. Raises UserError."""
    _, left = note(file, lock)
    if not left and lock.stat().st_size:
        raise UserError(f"--out {out}: {lock} was not written by this program; remove it if no run writes "
                        "there, or name another folder")
    if left:
        shutil.rmtree(lock.with_name(left), ignore_errors=True)
        file.seek(0)
        file.truncate()


def check_contents(path, out, resume, going_on):
    """Refuse a folder that holds something, or with resume one that holds nothing to go on with."""
    there = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    cut_off = [name for name in there if any(pathlib.PurePath(name).match(pattern) for pattern in going_on)]
    if resume and "results.json" in there:
        raise UserError(f"--resume: the run in {out} is finished; name a new --out for another one")
    if resume and there and not cut_off:
        raise UserError(f"--resume: {out} holds no checkpoint of a run that was cut off; leave --resume out")
    if there and not resume and cut_off and "results.json" not in there:
        raise UserError(f"--out {out}: holds a run that was cut off; go on with --resume, or a new folder")
    if there and not resume:
        raise UserError(f"--out {out}: holds {there[0]} already, and nothing is replaced; name a new folder")
