"""The command line: one table of flags for every script, and mistakes in one line.

    args = parse_flags(__doc__, ["model", "device", "bits"])   # a parser, its checks and its --help
    run(main)                                                  # a mistake: one line and exit code 2

A flag is one row of TABLE: what it accepts (a Kind), its default and what it means, under its group in
--help. Whatever a Kind refuses is refused before any model loads, in one line that names the flag, the value
and what is allowed.
"""
import argparse
import collections
import errno
import os
import pathlib
import re
import signal
import sys

import torch

# a stream that the shell has closed (`>&-`) is None; nobody reads it
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


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


def items(kind, repeated=False):
    """Several values of a kind, comma-separated; repeated: a value may come twice."""
    def read(text):
        """'8,16' -> [8, 16]."""
        values = [kind.read(part.strip()) for part in text.split(",")]
        if len(set(values)) < len(values) and not repeated:
            raise ValueError("twice")
        return values
    return Kind(read, f"comma-separated, {'' if repeated else 'none twice, '}each {kind.words}")


def one_of(choices):
    """A name out of a few, or out of the keys of a dict."""
    names = list(choices)
    return Kind(lambda text: names[names.index(text)], f"one of: {' '.join(names)}")


def not_empty(text):
    """The text itself, if there is something in it; ~ expanded, which no shell does after --out=."""
    if not text.strip() or "\0" in text:
        raise ValueError("empty")
    return os.path.expanduser(text)


def pair(mark, gap, words):
    """Two whole numbers with a mark between, as 2:4; the first from 1, the second larger by at least gap."""
    def read(text):
        """'2:4' as it is, blanks and leading zeros taken off."""
        low, high = map(int, text.split(mark))
        inside(low, 1, inside(high, 1, 10**4) - gap)
        return f"{low}{mark}{high}"
    return Kind(read, words)


TEXT = Kind(not_empty, "a name or a path, not empty")
ANY_TEXT = Kind(str, "comma-separated names or files; empty for none")
SWITCH = None                                              # a flag without a value
COUNT = whole(1)
TINY, HUGE = 1e-12, 1e6                                    # what a rate or a scale may sensibly be
POSITIVE = real(TINY, HUGE, f"a number from {TINY:g} to {HUGE:g}")


# --- 2. The table of flags ----------------------------------------------------------------------------------

TABLE = {  # group in --help -> {name: (kind, default, help)}
    "model and data": {
        "model": (TEXT, "toy", "toy | smollm2 | hub id | folder"),
        "device": (TEXT, "auto", "auto | cpu | cuda | cuda:N | mps"),
        "dtype": (TEXT, "auto", "auto: float32 on a CPU and for the toy, else bfloat16, else float16"),
        "seed": (whole(0, 2**31 - 1), 0, "seed of every random choice"),
        "text": (TEXT, None, "to calibrate and train: a name, FILE.txt, FILE.jsonl; toy, or else wikitext2"),
        "shape": (TEXT, None, "random weights of a published shape instead of --model"),
        "people": (whole(2, 546), 240, "the toy world: known people per domain, five facts each"),
    },
    "compression": {
        "compressor": (TEXT, None, "how to compress; magnitude for the toy model, gptq for others"),
        "bits": (whole(2, 8), 3, "bits per weight"),
        "group_size": (Kind(lambda text: -1 if int(text) == -1 else inside(int(text), 1, 10**9),
                            "a whole number of at least 1, or -1"), 64,
                       "columns that share a grid; -1: the whole row"),
        "sym": (SWITCH, False, "symmetric grids, without zero points"),
        "mse": (SWITCH, False, "fit grids by squared error, clipping a few weights, not by min and max"),
        "act_order": (SWITCH, False, "columns in descending order of diag H"),
        "static_groups": (SWITCH, False, "fit all grids to the original weights"),
        "percdamp": (real(TINY, 10, "a number above 0, at most 10"), 0.01,
                     "damping of H, relative to the mean of its diagonal"),
        "sparsity": (real(0, 0.9999, "a number from 0 to below 1"), None, "share of zeros; 0.6 (toy) or 0.5"),
        "pattern": (pair(":", 1, "N:M with 0 < N < M, for example 2:4"), None,
                    "keep N of every M inputs, instead of --sparsity"),
        "nsamples": (whole(1, 10**5), 32, "calibration chunks"),
        "seqlen": (whole(2, 10**6), None, "tokens per calibration chunk; 64 (toy) or 512"),
        "packed": (SWITCH, False, "write true bits, which only this project loads, not dequantized weights"),
    },
    "method": {
        "method": (items(TEXT), ["idp"], "how to recover, one or several, comma-separated"),
        "prompt_length": (COUNT, 16, "n, the tokens of a prompt or prefix"),
        "prompt_lengths": (items(COUNT, repeated=True), [8, 16], "n_k of IDP's prompts, comma-separated"),
        "selector": (TEXT, "mean_attention", "the rule by which IDP chooses"),
        "layers": (TEXT, "every", "which layers choose: every one for itself, or the first for all"),
        "scores": (TEXT, "logits", "what IDP's attention is: before the softmax, or after it"),
        "rank": (COUNT, 8, "LoRA's and EoRA's r"),
        "alpha": (POSITIVE, 16.0, "LoRA's scaling is alpha / r"),
        "targets": (items(TEXT), None, "LoRA, EoRA: names of linear layers, comma-separated; else PEFT's "
                                       "defaults, for EoRA all. Many layers want a lower --lr"),
        "merge": (SWITCH, False, "LoRA, EoRA: rows for merged weights, also put back on grid or mask"),
        "m": (whole(2, 1000), 4, "prompts in a set"),
    },
    "training": {
        "loss": (TEXT, "text", "what is learnt: the text's next tokens, or the dense model's distributions "
                               "of them (a second copy of its weights in memory)"),
        "steps": (COUNT, 200, "optimizer steps"),
        "batch_size": (whole(1, 65536), 16, "rows per training step (each prompt sees all), or contexts"),
        "train_seqlen": (whole(4, 10**6), 64, "tokens per training row"),
        "lr": (POSITIVE, None, "peak learning rate; the method's own when absent"),
        "weight_decay": (real(0, 1, "a number from 0 to 1"), 0.0, "AdamW's weight decay"),
        "recipe": (TEXT, None, "all that a published setup states, where no flag says otherwise"),
        "accumulate": (whole(1, 65536), 1, "micro-batches per step"),
        "checkpointing": (SWITCH, False, "recompute blocks in the backward pass (less memory)"),
        "resume": (SWITCH, False, "go on with the checkpoints that a run which was cut off left in --out"),
        "seeds": (whole(1, 1000), 5, "how many seeds, from --seed on"),
        "rates": (items(POSITIVE), [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1], "peak rates, comma-separated"),
    },
    "evaluation": {
        "tasks": (ANY_TEXT, None, "comma-separated names or FILE.jsonl; toy tasks for the toy model"),
        "limit": (COUNT, None, "rows per task, chunks of text; all when absent"),
        "adapter": (TEXT, None, "an adapter/ folder of recover.py, or PEFT's"),
        "eval_text": (TEXT, None, "text for perplexity; the test split of a named --text when absent"),
        "eval_seqlen": (whole(2, 10**6), None, "tokens per perplexity chunk"),
        "eval_context": (whole(0, 10**6), None, "tokens of a chunk that are read, not scored, by which IDP "
                         "chooses; a quarter of --eval-seqlen when absent; 0 is GPTQ's perplexity"),
        "eval_chunks": (COUNT, None, "chunks of text for perplexity; --limit when absent"),
        "word_ppl": (SWITCH, False, "the standard harness's word perplexity of --eval-text as well"),
        "lengths": (items(COUNT), [128, 256], "input lengths, comma-separated"),
        "decode_tokens": (whole(1, 10**5), 8, "decoded tokens per repeat"),
        "repeats": (whole(1, 10**4), 9, "counted repeats after one warm-up"),
        "tables": (items(TEXT), None, "which tables, comma-separated"),
        "loads": (items(whole(2, 546)), [240], "worlds of how many --people, comma-separated"),
        "remedies": (items(TEXT), [], "which remedies, comma-separated"),
        "only": (TEXT, None, "only rows whose name contains one of these, as in 'group 64;50 %%'"),
    },
    "output": {
        "out": (TEXT, None, "folder for what is written: new or empty"),
        "shard": (pair("/", 0, "I/N with 1 <= I <= N"), None,
                  "measure every N-th row, from the I-th on, into an --out that all N runs share"),
    },
}
Flag = collections.namedtuple("Flag", "group kind default help")
FLAGS = {name: Flag(group, *row) for group, rows in TABLE.items() for name, row in rows.items()}

# What a flag means when it is not given. The paper's compressor is 3-bit GPTQ, which the toy model hardly
# feels; magnitude pruning at 60 % takes a third of its knowledge, so that there is something to get back.
DEFAULTS = {
    "toy": dict(text="toy", tasks="toy_recall,toy_shown,toy_unknown", compressor="magnitude", sparsity=0.6,
                seqlen=64),
    "other": dict(text="wikitext2", tasks="", compressor="gptq", sparsity=0.5, seqlen=512),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
            use = f"; use for example {shown(example)}" if example not in (None, "") else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {kind.words}{use}") from None
    return read


def shown(value):
    """A default as a user would type it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def add_flag(group, name, default, choices=None, several=False):
    """One flag in a group of an argparse parser. Its default is None, so that what was given shows."""
    flag = FLAGS[name]
    kind, words = flag.kind, flag.help
    if kind is SWITCH:
        group.add_argument(flag_of(name), action="store_true", default=None, help=words)
        return
    if choices:
        lists = isinstance(flag.default, list) or name == "tables"
        kind = items(one_of(choices)) if lists else one_of(choices)
        words += ": " + " | ".join(choices)
    words += f" (default: {shown(default)})" if default not in (None, "") else ""
    example = default if default is not None else next(iter(choices or []), None)
    group.add_argument(flag_of(name), type=reader(kind, example), action="append" if several else Once,
                       metavar=name.split("_")[-1].upper(), help=words)


def fill_in(args, values):
    """Give every flag that is still None its value."""
    for name, value in values.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def parse_flags(doc, names, argv=None, choices=None, defaults=None, several=(), add=None):
    """Read a command line. -> argparse.Namespace with every flag of `names`, and two answers about them.

    given: the names that were typed; toy: is it the toy model?

    names: keys of FLAGS. choices: {name: allowed names}. defaults: {name: value} where a script differs from
    FLAGS. several: flags that may come more than once (their value is a list). add: called with the parser
    for what only one script has. Raises UserError for everything that a Kind refuses.
    """
    choices = {"dtype": ["auto", *DTYPES], **(choices or {})}
    defaults = {**{name: FLAGS[name].default for name in names}, **(defaults or {})}
    parser = Parser(description=" ".join(doc.strip().split("\n\n")[0].split()), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {group: parser.add_argument_group(group) for group in TABLE}
    for name in FLAGS:                                # in the table's order, so that every --help reads alike
        if name in names:
            add_flag(groups[FLAGS[name].group], name, defaults[name], choices.get(name), name in several)
    if add:
        add(parser)
    args = parser.parse_args(argv)
    args.given = sorted(name for name, value in vars(args).items() if value is not None)
    fill_in(args, defaults)
    args.toy = is_toy(getattr(args, "model", "toy"))
    fill_in(args, DEFAULTS["toy" if args.toy else "other"])
    return args


def is_toy(name):
    """The toy model, or a folder that compress.py made of it: both have the toy's text and tasks."""
    report = pathlib.Path(name, "compression.json")
    if name == "toy" or not os.path.isfile(report):        # Path.is_file raises for a long name
        return name == "toy"
    return '"base_model": "toy"' in report.read_text(errors="ignore")


def refuse_given(args, names, why):
    """Raise UserError if a flag of `names` was typed that would be ignored. why: reason and fix, in words."""
    for name in args.given:
        if name in names:
            value = getattr(args, name)
            raise UserError(f"{flag_of(name)}{'' if value is True else f' {shown(value)}'}: {why}")


def check_limits(**settings):
    """Raise UserError for a setting of a function call that its flag would refuse. None is no value."""
    for name, value in settings.items():
        flag = FLAGS[name]
        if value is not None and flag.kind is not SWITCH:
            try:
                reader(flag.kind, flag.default)(str(value))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{flag_of(name)} {error}") from None


# --- 4. Running a script: what ends it, in one line ---------------------------------------------------------

class Kept:
    """What an interrupted run leaves, in words; output.claim keeps it true."""
    words = "nothing was written"


def terminate(number, frame):
    """SIGTERM ends a run as Ctrl-C does, so that what is half written is cleared away."""
    raise KeyboardInterrupt(number)


def say(kind, words):
    """One line on stderr."""
    print(f"{kind}: " + " ".join(str(words).split()), file=sys.stderr, flush=True)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)           # the disk, one's quota, what a file may be


def foreseen(error):
    """What to say of a user's mistake, of trouble with a file and of too little memory. None: it is a bug."""
    words = str(error)
    if isinstance(error, UserError):
        return words
    number = re.search(r"[(]os error (\d+)[)]", words)      # as safetensors and tokenizers say it
    if number and not isinstance(error, OSError):
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, OSError):
        where = f"{error.filename or 'a file'}: {os.strerror(error.errno) if error.errno else words}"
        if error.errno in FULL:
            return f"{where}; make room on the disk; {Kept.words}"
        return f"{where}; choose another --out, or mend that file"
    # of torch and cuBLAS, in a plain RuntimeError too
    signs = ("not enough memory", "out of memory", "allocate memory", "ALLOC_FAILED")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and any(sign in words for sign in signs)):
        return (f"--device: out of memory ({words.splitlines()[0][:120] if words else 'no words'}); use a "
                "smaller --batch-size, --train-seqlen or --seqlen, --checkpointing, or --dtype bfloat16")
    return None


def run(main):
    """Call main(). Each foreseeable end is one line and an exit code: 2 mistakes, 130 Ctrl-C, 143 SIGTERM."""
    for stream in (sys.stdout, sys.stderr):                # without Unicode, escapes and not a traceback
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        print(end="", flush=True)                          # a pipe that has closed shows here, not at exit
    except KeyboardInterrupt as error:
        say("interrupted", Kept.words)
        sys.exit(143 if error.args else 130)
    except BrokenPipeError:                                # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        words = foreseen(error)
        if words is None:                                  # a bug: its traceback is wanted
            raise
        say("error", words)
        sys.exit(2)
