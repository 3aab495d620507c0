"""Files that strangers wrote, read with care: one checked reader per kind of file.

    config = read_fields(path, "--adapter")                # UTF-8, no NaN, no lone surrogates
    r = config("r", whole_number(1, 4096))                 # the value, or one line that names flag and file
    with Tensors(path, "--adapter") as file:               # shapes are known before memory is asked for
        P = file.read("prompt_embeddings", (16, 64))
"""
import json
import math
import os
import pathlib

import torch
from safetensors import SafetensorError, safe_open

from support.cli import UserError

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # one cannot compute in eight bits
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
         "U8": torch.uint8, "I32": torch.int32}            # by safetensors' names
MAX_JSON = 2**28                           # bytes; the largest we write ourselves (items.json) is far smaller


def why(error):
    """An OSError's reason in words, without its number."""
    return (os.strerror(error.errno) if getattr(error, "errno", None) else str(error)).lower()


def user_path(text, flag):
    """The path that a user typed, ~ expanded. -> pathlib.Path. Raises UserError for what can be no path."""
    try:
        path = pathlib.Path(text).expanduser()
        path.exists()
        str(path).encode("utf-8")                          # safetensors and tokenizers take no other names
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag} {str(text)[:80]}: is no path ({why(error)}); use another one") from error


def regular_file(path, flag, most=None):
    """The path, if it is a file of at most `most` bytes. Raises UserError: a folder, a pipe, too large."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: is not a file; name an existing one")
    size = path.stat().st_size
    if most and size > most:
        raise UserError(f"{flag} {path}: has {size:,} bytes, more than {most:,}; name a smaller file")
    return path


def read_text(path, flag, most=None):
    """The text of a UTF-8 file, without a byte order mark. Raises UserError."""
    path = regular_file(path, flag, most)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def no_constant(name):
    """NaN and infinities are not JSON, and nothing here may be one."""
    raise ValueError(f"{name} is not JSON")


def parse_json(text, path, flag):
    """JSON text of one object -> Fields. path: of the file, and where in it. Raises UserError."""
    where = f"{flag} {path}"
    try:
        obj = json.loads(text, parse_constant=no_constant)
        # "\ud800" is half a character, which no tokenizer takes; 1e999 is read as infinity
        json.dumps(obj, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; it was not written by this project") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character, a lone surrogate; remove it") from None
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); write it again") from None
    return Fields(obj, path, flag)


def read_fields(path, flag):
    """The object in a JSON file, as Fields. Raises UserError for anything else."""
    return parse_json(read_text(path, flag, MAX_JSON), path, flag)


def read_jsonl(path, flag):
    """One JSON object a line -> list of dicts. Raises UserError naming the line that is not one."""
    rows = []
    # splitlines() would also cut at U+2028 in a string
    for number, line in enumerate(read_text(path, flag).split("\n"), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path}: line {number}", flag).obj)
    if not rows:
        raise UserError(f"{flag} {path}: the file has no rows; write one JSON object a line")
    return rows


class Fields:
    """The keys of a JSON object, each checked when it is read: fields(key, rule) -> value.

    A rule is (test, words): what is true of every allowed value, and how the message says it.
    """

    def __init__(self, obj, path, flag):
        self.obj, self.where = obj, f"{flag} {path}"
        if not isinstance(obj, dict):
            raise UserError(f"{self.where}: holds a {type(obj).__name__}, not an object; name another file")

    def __call__(self, key, rule, *default):
        """The value of `key`, or the default if it is absent. Raises UserError when it breaks the rule."""
        if key not in self.obj and default:
            return default[0]
        test, words = rule
        value = self.obj.get(key)
        if not test(value):
            raise UserError(f"{self.where}: {key} is {json.dumps(value)[:60]}; it must be {words}")
        return value

    def within(self, key):
        """The object under `key`, as Fields."""
        return Fields(self(key, OBJECT), key, self.where)


def is_whole(value):
    """A whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_number(low, high):
    """The rule for a whole number from low to high."""
    return lambda value: is_whole(value) and low <= value <= high, f"a whole number from {low} to {high}"


def number(low, high):
    """The rule for a finite number from low to high."""
    return (lambda value: (is_whole(value) or isinstance(value, float)) and low <= value <= high,
            f"a number from {low} to {high}")


def one_of(*allowed):
    """The rule for one of a few values."""
    return lambda value: any(value is a or (value == a and type(value) is type(a)) for a in allowed), (
        "one of: " + " ".join(json.dumps(value) for value in allowed))


def list_of(rule):
    """The rule for a list whose every entry keeps a rule."""
    return lambda value: isinstance(value, list) and all(map(rule[0], value)), f"a list, each {rule[1]}"


def or_null(rule):
    """The rule for a value that may be null."""
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


STRING = (lambda value: isinstance(value, str), "a text")
BOOL = (lambda value: isinstance(value, bool), "true or false")
OBJECT = (lambda value: isinstance(value, dict), "an object")


class Tensors:
    """An open safetensors file: shapes and types from its header, a tensor only when it fits."""

    def __init__(self, path, flag):
        self.path, self.where = regular_file(path, flag), f"{flag} {path}"

    def __enter__(self):
        try:
            self.file = safe_open(self.path, "pt")
            self.metadata = self.file.metadata() or {}
            self.names = dict.fromkeys(self.file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.where}: cannot be read ({str(error)[:120]}); "
                            "write or download it again") from error
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def form(self, name):
        """A tensor's shape and type ("F32" say), from the header. Raises UserError when there is none."""
        if name not in self.names:
            raise UserError(f"{self.where}: lacks {name}; write or download it again")
        part = self.file.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name, shape, dtypes=FLOATING):
        """A tensor of this shape and one of these dtypes, all its numbers finite. Raises UserError."""
        found, kind = self.form(name)
        if found != tuple(shape):
            raise UserError(f"{self.where}: {name} is {found}, and {tuple(shape)} is needed; "
                            "it belongs to another model or other settings")
        if TYPES.get(kind) not in dtypes:
            raise UserError(f"{self.where}: {name} holds {kind}; it was not written by this project")
        tensor = self.file.get_tensor(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise UserError(f"{self.where}: {name} holds numbers that are not finite; make it again")
        return tensor

    def exactly(self, names):
        """Raise UserError when tensors are missing or left over."""
        wanted, found = set(names), set(self.names)
        wrong = [f"{words} {min(left)}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
                 for words, left in (("lacks", wanted - found), ("has no place for", found - wanted)) if left]
        if wrong:
            raise UserError(f"{self.where}: {'; '.join(wrong)}; "
                            "it belongs to another model or other settings")


def finite(value, what):
    """The number itself. Raises UserError when it is none: a broken model must not get a row of results."""
    if not math.isfinite(value):
        raise UserError(f"--model: {what} is {value}, not a number: the model or the adapter is broken; "
                        "use --dtype float32, or another one")
    return value


def all_finite(tensor):
    """Is no number of a tensor a NaN or an infinity? -> bool. 40 times as fast as isfinite().all()."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
