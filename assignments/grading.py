"""What graders share: reading the student's file, one message a failure, the toy model's numbers."""
import contextlib
import importlib.util
import sys

import pytest
import torch

import compress
from methods.registry import COMPRESSORS, Compressor
from support import toy_world
from support.data import encode, load_text
from support.models import load_model


# --- 1. The student's file ----------------------------------------------------------------------------------

def fail(message):
    """End a test with this message alone."""
    pytest.fail(message, pytrace=False)


def must(condition, message):
    """Go on, or end the test with the message."""
    if not condition:
        fail(message)


@contextlib.contextmanager
def load(path, asked):
    """Import a file of any name. asked: what it must define. Yields the module."""
    name = f"submission_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    must(spec is not None, f"--submission {path}: not a Python file; its name must end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)   # dataclasses look their module up
    sys.path.append(str(path.parent))                      # last: a file beside it may not hide a library
    try:
        run(spec, module, path)
        missing = [wanted for wanted in asked if not hasattr(module, wanted)]
        must(not missing, f"--submission {path}: has no {', '.join(missing)}; keep the starter's names")
        yield module
    finally:
        sys.path.remove(str(path.parent))
        sys.modules.pop(name, None)


def run(spec, module, path):
    """Run the file's top level; whatever stops it is one line."""
    message = None
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        message = f"--submission {path}{line}: cannot be imported: {type(error).__name__}: {error}"
    must(message is None, message)                         # outside the except: without the file's own trace


# --- 2. Checks ----------------------------------------------------------------------------------------------

def check_tensor(value, shape, what):
    """A finite tensor of this shape."""
    must(isinstance(value, torch.Tensor), f"{what} must be a tensor, got {type(value).__name__}")
    must(tuple(value.shape) == tuple(shape), f"{what} must have shape {tuple(shape)}, got "
                                             f"{tuple(value.shape)}")
    must(bool(value.isfinite().all()), f"{what} holds a NaN or an infinity")


def check_close(value, right, what, tolerance=1e-5):
    """Equal to the slow version, up to `tolerance` of its largest number. Says where they differ first."""
    check_tensor(value, right.shape, what)
    gap = (value.double() - right.double()).abs()
    if gap.max() > tolerance * max(1.0, right.abs().max().item()):
        at = tuple((gap > tolerance).nonzero()[0].tolist())
        fail(f"{what} differs from the slow version by up to {gap.max():.3g}, first at {at}: "
             f"got {value[at]:.6g}, should be {right[at]:.6g}")


@contextlib.contextmanager
def unchanged(**tensors):
    """Within the block the inputs may not change."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        must(torch.equal(tensor, before[name]), f"{name} was changed in place: work on a copy")


def numbers(seed, *shape, dtype=torch.float32):
    """Random normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian(seed, columns, rows=512, dtype=torch.float32):
    """H (in, in) = mean of x x^T for inputs that are correlated and differ in size."""
    X = numbers(seed, rows, columns, dtype=dtype) @ (numbers(seed + 1, columns, columns, dtype=dtype) / 4)
    X = X * torch.linspace(0.2, 3, columns, dtype=dtype)   # (tokens, in)
    return X.T @ X / rows


# --- 3. The toy model ---------------------------------------------------------------------------------------

def toy_ids(tokenizer):
    """The recovery text: facts of shown people. -> (tokens,)."""
    return load_text("toy", tokenizer, "train")


def compressed_toy(function, takes_H, seed=0, chunks=32, **settings):
    """The toy model with every linear layer of its blocks replaced by function(W[, H], **settings).

    -> (model, tokenizer, report); report["mean_error"] is the relative error of the layers' outputs.
    """
    model, tokenizer = load_model("toy")
    calibration = compress.calibration_ids(toy_ids(tokenizer), chunks, 64, seed)
    call = lambda *tensors, details=None: function(*tensors, **settings)
    COMPRESSORS["submission"] = Compressor(call, takes_H, ())
    try:
        report = compress.compress_model(model, tokenizer, "submission", calibration)
    finally:
        del COMPRESSORS["submission"]
    return model, tokenizer, report


@torch.no_grad()
def recall(model, tokenizer, rows=None):
    """Percent of the questions whose right answer has the highest logit among the choices.

    Every choice is one token here, so this is evaluate.py's accuracy at a sixteenth of the work.
    """
    rows = toy_world.tasks()["toy_recall"] if rows is None else rows
    by_length, correct = {}, 0
    for row in rows:
        by_length.setdefault(len(encode(tokenizer, row["context"])), []).append(row)
    for group in by_length.values():
        ids = torch.tensor([encode(tokenizer, row["context"]) for row in group])           # (B, T)
        logits = model(ids, logits_to_keep=1).logits[:, -1]                                # (B, V)
        choices = torch.tensor([[encode(tokenizer, word)[0] for word in row["choices"]] for row in group])
        best = logits.gather(1, choices).argmax(1)                                         # (B,)
        correct += sum(int(b) == row["answer"] for b, row in zip(best, group))
    return 100 * correct / len(rows)
