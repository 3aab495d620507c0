"""The command line: one table of flags for every script, mistakes in one line, progress on a terminal and in
log files.

    args = parse_flags(__doc__, ["model", "device", "bits"])                #  a parser, its checks and its --help from FLAGS
    run(main)                                                               # a mistake: `error: ...`, exit code 2, no traceback

A flag is one row of FLAGS: its group in --help, what it accepts (a Kind), its default and what it means.
Whatever a Kind refuses is refused before any model loads, in one line that names the flag, the value and what
is allowed.
"""
import argparse
import collections
import errno
import math
import os
import pathlib
import re
import signal
import sys

import torch
from tqdm import tqdm


class UserError(ValueError):
    """What a user can get wrong. The message names the flag, the value and the fix."""


# --- 1. Kinds of values: how to read one, and what is allowed, in words -------------------------------------

Kind = collections.namedtuple("Kind", "read words")


def whole(low, high=10**9):
    """A whole number from low to high."""
    return Kind(lambda text: inside(int(text), low, high), f"a whole number from {low:,} to {high:,}")


def real(low, high, words):
    """A finite number in [low, high]; `words` says the range as a reader would."""
    return Kind(lambda text: inside(float(text), low, high), words)


def inside(value, low, high):
    """The value itself, if it lies in [low, high] (a NaN does not); otherwise ValueError."""
    if not low <= value <= high:
        raise ValueError(value)
    return value


def items(kind):
    """Several values of a kind, comma-separated; at least one, and none twice."""
    def read(text):
        """'8,16' -> [8, 16]."""
        values = [kind.read(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ValueError("twice")
        return values
    return Kind(read, f"comma-separated, none twice, each {kind.words}")


def repeated(kind):
    """Like items, but a value may come twice: two prompts may be equally long."""
    return Kind(lambda text: [kind.read(part.strip()) for part in text.split(",")],
                f"comma-separated, each {kind.words}")


def not_empty(text):
    """The text itself, if there is something in it."""
    if not text.strip() or "\0" in text:
        raise ValueError("empty")
    return text


def group_size(text):
    """'64' -> 64; '-1' -> -1, the whole row."""
    return int(text) if int(text) == -1 else inside(int(text), 1, 10**9)


def n_of_m(text):
    """'2:4' as it is; ValueError for anything but N:M with 0 < N < M."""
    n, m = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text).groups() if re.fullmatch(r"\d{1,4}:\d{1,4}", text) else (0, 0)
    if not 0 < int(n) < int(m):
        raise ValueError(text)
    return text


TEXT = Kind(not_empty, "a name or a path, not empty")
ANY_TEXT = Kind(str, "comma-separated names or files; empty for none")
SWITCH = None                                              # a flag without a value
COUNT = whole(1)
TINY, HUGE = 1e-12, 1e6                                    # what a rate or a scale may sensibly be
POSITIVE = real(TINY, HUGE, f"a number from {TINY:g} to {HUGE:g}")


# --- 2. The table of flags ----------------------------------------------------------------------------------

Flag = collections.namedtuple("Flag", "group kind default help")

MODEL, COMPRESSION, METHOD, TRAINING, EVALUATION, OUTPUT = (
    "model and data", "compression", "method", "training", "evaluation", "output")

FLAGS = {
    "model": Flag(MODEL, TEXT, "toy", "toy | smollm2 | hub id | folder"),
    "device": Flag(MODEL, TEXT, "auto", "auto | cpu | cuda | cuda:N | mps"),
    "dtype": Flag(MODEL, TEXT, "auto", "of the frozen model; auto: float32 on a CPU and for the toy, else bfloat16 "
                                       "(float16 where the device has no bfloat16)"),
    "seed": Flag(MODEL, whole(0, 2**31 - 1), 0, "seed of every random choice"),
    "text": Flag(MODEL, TEXT, None, "calibration and training text: a name, FILE.txt or FILE.jsonl; "
                                    "toy for the toy model, wikitext2 for others"),
    "shape": Flag(MODEL, TEXT, None, "random weights of a published shape instead of --model"),

    "compressor": Flag(COMPRESSION, TEXT, None, "how to compress; magnitude for the toy model, gptq for others"),
    "bits": Flag(COMPRESSION, whole(2, 8), 3, "bits per weight"),
    "group_size": Flag(COMPRESSION, Kind(group_size, "a whole number of at least 1, or -1"), 64,
                       "columns that share a grid; -1: the whole row"),
    "sym": Flag(COMPRESSION, SWITCH, False, "symmetric grids, without zero points"),
    "mse": Flag(COMPRESSION, SWITCH, False, "fit grids by least squared error, clipping a few weights, instead of by min "
                                            "and max"),
    "act_order": Flag(COMPRESSION, SWITCH, False, "columns in descending order of diag H"),
    "static_groups": Flag(COMPRESSION, SWITCH, False, "fit all grids to the original weights"),
    "percdamp": Flag(COMPRESSION, real(TINY, 10, "a number above 0, at most 10"), 0.01,
                     "damping of H, relative to the mean of its diagonal"),
    "sparsity": Flag(COMPRESSION, real(0, 0.9999, "a number from 0 to below 1"), None,
                     "share of zeros; 0.6 for the toy model, 0.5 for others"),
    "pattern": Flag(COMPRESSION, Kind(n_of_m, "N:M with 0 < N < M, for example 2:4"), None,
                    "keep N of every M inputs, instead of --sparsity"),
    "nsamples": Flag(COMPRESSION, whole(1, 10**5), 32, "calibration chunks"),
    "seqlen": Flag(COMPRESSION, whole(2, 10**6), None, "tokens per calibration chunk; 64 for the toy model, 512 for others"),
    "packed": Flag(COMPRESSION, SWITCH, False, "write true bits, which only this project loads, instead of dequantized "
                                               "weights"),

    "method": Flag(METHOD, items(TEXT), ["idp"], "how to recover, one or several, comma-separated"),
    "prompt_length": Flag(METHOD, COUNT, 16, "n, the tokens of a prompt or prefix"),
    "prompt_lengths": Flag(METHOD, repeated(COUNT), [8, 16], "n_k of each of IDP's prompts, comma-separated"),
    "selector": Flag(METHOD, TEXT, "mean_attention", "the rule by which IDP chooses"),
    "layers": Flag(METHOD, TEXT, "every", "which layers choose: every one for itself, or the first for all"),
    "scores": Flag(METHOD, TEXT, "logits", "what IDP's attention is: before the softmax, or after it"),
    "rank": Flag(METHOD, COUNT, 8, "LoRA's r"),
    "alpha": Flag(METHOD, POSITIVE, 16.0, "LoRA's scaling is alpha / r"),
    "targets": Flag(METHOD, items(TEXT), None, "LoRA: names of linear layers, comma-separated; PEFT's defaults when absent"),
    "merge": Flag(METHOD, SWITCH, False, "LoRA: rows for the adapter merged into the weights, and merged then put back on "
                                         "the grid or under the mask"),
    "m": Flag(METHOD, whole(2, 1000), 4, "prompts in a set"),

    "steps": Flag(TRAINING, COUNT, 200, "optimizer steps"),
    "batch_size": Flag(TRAINING, whole(1, 65536), 16, "rows at a time: of a training step, shared out among IDP's prompts, or "
                                                       "contexts when scoring"),
    "train_seqlen": Flag(TRAINING, whole(4, 10**6), 64, "tokens per training row"),
    "lr": Flag(TRAINING, POSITIVE, None, "peak learning rate; the method's own when absent"),
    "accumulate": Flag(TRAINING, whole(1, 65536), 1, "micro-batches per step"),
    "checkpointing": Flag(TRAINING, SWITCH, False, "recompute blocks in the backward pass (less memory)"),
    "resume": Flag(TRAINING, SWITCH, False, "go on with the checkpoints that a run which was cut off left in --out"),
    "seeds": Flag(TRAINING, whole(1, 1000), 5, "how many seeds, from --seed on"),
    "rates": Flag(TRAINING, items(POSITIVE), [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], "peak learning rates, comma-separated"),

    "tasks": Flag(EVALUATION, ANY_TEXT, None, "comma-separated names or FILE.jsonl; toy tasks for the toy model"),
    "limit": Flag(EVALUATION, COUNT, None, "rows per task, chunks of text; all when absent"),
    "adapter": Flag(EVALUATION, TEXT, None, "an adapter/ folder of recover.py, or PEFT's"),
    "eval_text": Flag(EVALUATION, TEXT, None, "text for perplexity; the test split of a named --text when absent"),
    "eval_seqlen": Flag(EVALUATION, whole(2, 10**6), None, "tokens per perplexity chunk"),
    "eval_context": Flag(EVALUATION, whole(0, 10**6), None,
                         "tokens of each chunk that are read and not scored, by which IDP chooses; a quarter of "
                         "--eval-seqlen when absent; 0 is GPTQ's perplexity"),
    "eval_chunks": Flag(EVALUATION, COUNT, None, "chunks of text for perplexity; --limit when absent"),
    "word_ppl": Flag(EVALUATION, SWITCH, False, "the standard harness's word perplexity of --eval-text as well"),
    "lengths": Flag(EVALUATION, items(COUNT), [128, 256], "input lengths, comma-separated"),
    "decode_tokens": Flag(EVALUATION, whole(1, 10**5), 8, "decoded tokens per repeat"),
    "repeats": Flag(EVALUATION, whole(1, 10**4), 9, "counted repeats after one warm-up"),
    "tables": Flag(EVALUATION, items(TEXT), None, "which tables, comma-separated"),
    "only": Flag(EVALUATION, TEXT, None, "only rows whose name contains one of these, separated by ';', as in "
                                         "'group 64;50 %%'"),

    "out": Flag(OUTPUT, TEXT, None, "folder for what is written: new or empty"),
}

# What a flag means when it is not given. The paper's compressor is 3-bit GPTQ, which the toy model hardly
# feels; magnitude pruning at 60 % takes about a third of its knowledge, so that there is something to get
# back.
DEFAULTS = {
    "toy": dict(text="toy", tasks="toy_recall,toy_shown,toy_unknown", compressor="magnitude", sparsity=0.6, seqlen=64),
    "other": dict(text="wikitext2", tasks="", compressor="gptq", sparsity=0.5, seqlen=512),
}


# --- 3. From the table to a parser --------------------------------------------------------------------------

def flag_of(name):
    """'prompt_length' -> '--prompt-length'."""
    return "--" + name.replace("_", "-")


class Once(argparse.Action):
    """Store a value, and refuse the flag when it comes again: one of the two would be ignored."""

    def __call__(self, parser, namespace, values, option=None):
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, f"{values}: given twice; give it once")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse whose every mistake is a UserError instead of a usage block."""

    def error(self, message):
        raise UserError(re.sub(r"^argument (\S+): ", r"\1 ", message) + "; see --help")


def reader(kind, example):
    """An argparse type from a Kind. example: a value that is allowed."""
    def read(text):
        """The value, or what would be allowed."""
        try:
            return kind.read(text)
        except ValueError:
            example_words = f"; use for example {shown(example)}" if example not in (None, "") else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {kind.words}{example_words}") from None
    return read


def shown(value):
    """A default as a user would type it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def one_of(choices):
    """The Kind of a name out of a dict of them, and of several such names."""
    def read(text):
        """The name itself."""
        if text not in choices:
            raise ValueError(text)
        return text
    return Kind(read, f"one of: {' '.join(choices)}")


def build_parser(doc, names, choices, defaults, several=()):
    """An argparse parser with these flags, grouped as in FLAGS. Every default is None, so that what was
    given shows.
    """
    about = " ".join(doc.strip().split("\n\n")[0].split())
    parser = Parser(description=about, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for name, flag in FLAGS.items():                  # in the table's order, so that every --help reads alike
        if name not in names:
            continue
        group = groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        default, words = defaults.get(name, flag.default), flag.help
        if flag.kind is SWITCH:
            group.add_argument(flag_of(name), action="store_true", default=None, help=words)
            continue
        kind = flag.kind
        if name in choices:
            kind = items(one_of(choices[name])) if isinstance(flag.default, list) or name == "tables" else one_of(choices[name])
            words += ": " + " | ".join(choices[name])
        words += f" (default: {shown(default)})" if default not in (None, "") else ""
        example = default if default is not None else next(iter(choices.get(name, [])), None)
        group.add_argument(flag_of(name), type=reader(kind, example), action="append" if name in several else Once,
                           metavar=name.split("_")[-1].upper(), help=words)
    return parser


def parse_flags(doc, names, argv=None, choices=None, defaults=None, several=(), add=None):
    """Read a command line. -> argparse.Namespace with every flag of `names`, and `given`, the names that were
    typed; `toy`: is it the toy model?

    names: keys of FLAGS. choices: {name: allowed names}. defaults: {name: value} where a script differs from
    FLAGS. several: flags that may come more than once (their value is a list). add: called with the parser
    for what only one script has. Raises UserError for everything that a Kind refuses.
    """
    defaults = {"dtype": "auto", **(defaults or {})}
    choices = {"dtype": ["auto", *DTYPES], **(choices or {})}
    parser = build_parser(doc, names, choices, defaults, several)
    if add:
        add(parser)
    args = parser.parse_args(argv)
    args.given = sorted(name for name, value in vars(args).items() if value is not None)
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, defaults.get(name, FLAGS[name].default))
    args.toy = is_toy(getattr(args, "model", "toy"))
    for name, value in DEFAULTS["toy" if args.toy else "other"].items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    return args


def is_toy(name):
    """The toy model, or a folder that compress.py made of it: both have the toy's text and tasks as
    defaults.
    """
    report = pathlib.Path(name, "compression.json")
    return name == "toy" or (report.is_file() and '"base_model": "toy"' in report.read_text(errors="ignore"))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def refuse_given(args, names, why):
    """Raise UserError if a flag of `names` was typed that would be ignored. why: the reason and the fix, in
    words.
    """
    for name in args.given:
        if name in names:
            value = getattr(args, name)
            raise UserError(f"{flag_of(name)}{'' if value is True else f' {shown(value)}'}: {why}")


def check_limits(**settings):
    """Raise UserError, naming the flag, for a setting of a function call outside what its Kind allows. None
    is no value.
    """
    for name, value in settings.items():
        if value is None or FLAGS[name].kind is SWITCH:
            continue
        try:
            FLAGS[name].kind.read(str(value))
        except (ValueError, TypeError):
            raise UserError(f"{flag_of(name)} {value}: must be {FLAGS[name].kind.words}; "
                            f"use for example {shown(FLAGS[name].default)}") from None


# --- 4. Running a script: what ends it, in one line ---------------------------------------------------------

class Kept:
    """What an interrupted run leaves, in words; output.claim keeps it true."""
    words = "nothing was written"


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, so that what is half written is cleared away."""


def terminate(signum, frame):
    """The handler of SIGTERM."""
    raise Terminated


def say(kind, words):
    """One line on stderr."""
    print(f"{kind}: " + " ".join(str(words).split()), file=sys.stderr, flush=True)


def out_of_memory(error):
    """Is this what torch raises when a device, or the machine, has no memory left?"""
    signs = ("not enough memory", "out of memory", "allocate memory", "ALLOC_FAILED")      # the last is cuBLAS's
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def run(main):
    """Call main(). Every foreseeable end is one line on stderr and an exit code: 2 mistakes, 130 Ctrl-C, 143
    SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):        # a terminal without Unicode shows escapes, not a traceback
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        say("error", error)
        sys.exit(2)
    except KeyboardInterrupt as error:
        say("interrupted", Kept.words)
        sys.exit(143 if isinstance(error, Terminated) else 130)
    except BrokenPipeError:                                # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        say("error", f"{error.filename or 'a file'}: {os.strerror(error.errno) if error.errno else error}; "
                     + ("make room on the disk" if error.errno == errno.ENOSPC else "choose another --out, or mend that file"))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say("error", f"--device: out of memory ({str(error).splitlines()[0][:120] if str(error) else 'no words'}); use a smaller "
                     "--batch-size, --train-seqlen or --seqlen, --checkpointing, or --dtype bfloat16")
        sys.exit(2)


# --- 5. Progress --------------------------------------------------------------------------------------------

class progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, in a log file say, one line a minute and none for short work."""

    def __init__(self, *args, **kwargs):
        self.live = sys.stderr.isatty()
        slow = {} if self.live else {"mininterval": 60, "maxinterval": math.inf, "delay": 60, "miniters": 1}
        super().__init__(*args, **{"leave": False, "dynamic_ncols": self.live, **slow, **kwargs})

    def display(self, msg=None, pos=None):
        """Draw the bar, or print it as a line."""
        if self.live:
            return super().display(msg, pos)
        if msg is None:
            print(str(self), file=sys.stderr, flush=True)
