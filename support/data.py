"""Data: text and tasks, from a name, a file or the hub, and the one way to turn text into tokens.

    ids  = load_text("wikitext2", tokenizer, split="test")    # (tokens,) long
    rows = load_tasks("arc_easy,mine.jsonl", limit=200)       # {task name: [row, ...]}
    encode(tokenizer, "Question: ...")                        # what begins a text, and its tokens; no end

Add a text: one line in TEXTS. Add a task: one line in TASKS.
"""
import ast
import re

import torch

from support import toy_world
from support.cli import UserError
from support.files import is_whole, read_jsonl, read_text, user_path


# --- 1. Text ------------------------------------------------------------------------------------------------

def encode(tokenizer, text, start=True):
    """The tokens of a text, behind what the tokenizer puts before any text (BOS, or nothing). -> list of int.

    What it would append (some tokenizers close a text with EOS) is left out: here every text goes on.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return (start_tokens(tokenizer) if start else []) + ids


def start_tokens(tokenizer):
    """What the tokenizer puts before any text. -> list of int, often empty."""
    bare, whole = (tokenizer("a", add_special_tokens=special, verbose=False).input_ids
                   for special in (False, True))
    return whole[:next(i for i in range(len(whole) + 1) if whole[i:i + len(bare)] == bare)]


def first_token(tokenizer):
    """The BOS, else the EOS token: it stands where a text has nothing before it. -> int. Raises UserError."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("--tasks: a context is empty, and the tokenizer has neither a BOS nor an EOS token to "
                    "stand in its place; give every row a context")


def read_hub(flag, path, **options):
    """load_dataset(path, **options). Raises UserError naming the flag and the local alternative."""
    try:
        from datasets import load_dataset                  # offline runs need no datasets
        return load_dataset(path, **options)
    except Exception as error:                       # the hub client raises many unrelated types when offline
        raise UserError(f"{flag}: {path} cannot be read from the hub ({type(error).__name__}); give a local "
                        f"file instead: {flag} FILE.jsonl{' or FILE.txt' * (flag == '--text')}") from error


def hub_text(path, column="text", **splits):
    """A TEXTS entry read with `datasets`. splits: train= and test= keyword arguments for load_dataset."""
    return lambda split: read_hub("--text", path, **splits[split])[column]


WIKITEXT = {split: {"name": "wikitext-2-raw-v1", "split": split} for split in ("train", "test")}
C4 = {"train": {"data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train[:5000]"},
      "test": {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train[:1000]"}}
TEXTS = {  # name -> function of the split -> list of documents
    # recovery text: facts of the shown people; evaluation text: facts of people never shown again
    "toy": lambda split: toy_world.text({"train": "shown", "test": "heldout"}[split]),
    "wikitext2": hub_text("Salesforce/wikitext", **WIKITEXT),
    # whole articles, as the standard harness's task `wikitext` reads them (--word-ppl)
    "wikitext2_pages": hub_text("EleutherAI/wikitext_document_level", "page", **WIKITEXT),
    "c4": hub_text("allenai/c4", **C4),
}


def load_text(name, tokenizer, split="train", flag="--text"):
    """-> (tokens,) long: the documents of a text as one. name, split: see load_documents."""
    # NOT IN PAPER: joined with blank lines and tokenized once, as the GPTQ authors' evaluation does.
    text = "\n\n".join(load_documents(name, split, flag))
    return torch.tensor(encode(tokenizer, text), dtype=torch.long)                             # (tokens,)


def load_documents(name, split="train", flag="--text"):
    """-> list of str. name: of TEXTS, FILE.txt (one document), or FILE.jsonl with one {"text": ...} a line.

    A file is read whole whatever `split` says: give separate files for training (--text) and perplexity
    (--eval-text). Raises UserError.
    """
    check_text(name, flag)
    if name in TEXTS:
        return TEXTS[name](split)
    path = user_path(name, flag)
    if path.suffix == ".txt":
        return [read_text(path, flag)]
    rows = read_jsonl(path, flag)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise UserError(f'{flag} {name}: line {number} has no "text"; give it one, or use a .txt file')
    return [row["text"] for row in rows]


def check_text(name, flag="--text"):
    """Raise UserError, before anything slow, for a name that is neither a known text nor a file of a kind."""
    path = user_path(name, flag)
    if name not in TEXTS and not (path.is_file() and path.suffix in (".txt", ".jsonl")):
        raise UserError(f"{flag} {name}: not a known text nor an existing .txt or .jsonl file; use one of: "
                        f"{' '.join(TEXTS)}, or a path")


# The standard harness's clean-up of WikiText before word perplexity, in its order: (pattern, replacement).
WIKITEXT_MARKS = [
    (r"s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    (r" : ", ": "), (r" ; ", "; "), (r" \. ", ". "), (r" ! ", "! "), (r" \? ", "? "), (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"), (r"= = = =", "===="),
    (r"= = =", "==="), (r"= =", "=="), (" \u00b0 ", "\u00b0"), (r" \n", "\n"), (r"\n ", "\n"),
    (r" N ", " 1 "), (r" 's", "'s")]


def detokenize(text):
    """WikiText's separated punctuation put back, as the standard harness's task `wikitext` does."""
    for pattern, replacement in WIKITEXT_MARKS:
        text = re.sub(pattern, replacement, text)
    return text


# --- 2. Tasks -----------------------------------------------------------------------------------------------
# A row function turns one row of a hub data set into our schema, with the prompt of the standard harness
# (lm-eval 0.4). EXERCISE: add a task. One row function, one line in TASKS.

def hub_task(path, split, to_row, config=None):
    """A TASKS entry read with `datasets`. to_row: the hub's row -> our row without its id."""
    def read():
        rows = read_hub("--tasks", path, name=config, split=split)
        return [{"id": str(row.get("id", number)), **to_row(row)} for number, row in enumerate(rows)]
    return read


def question(text):
    """The harness's prompt of most questions."""
    return f"Question: {text}\nAnswer:"


def multiple_choice(context, choices, answer):
    """Our row of a question with choices. answer: the 0-based number of one."""
    return {"context": context, "choices": choices, "answer": int(answer)}


def labelled(context):
    """Row function of data sets that letter their choices. context: the hub's row -> str."""
    return lambda row: multiple_choice(context(row), row["choices"]["text"],
                                       row["choices"]["label"].index(row["answerKey"].strip()))


def sciq_row(row):
    """The harness puts the right answer last; the order decides nothing but exact ties."""
    choices = [row[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return multiple_choice(f"{row['support'].lstrip()}\n{question(row['question'])}", choices, 3)


def hellaswag_row(row):
    """WikiHow's marks are taken out: "[title]" becomes a full stop, other brackets vanish."""
    clean = lambda text: re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return multiple_choice(context, [clean(ending) for ending in row["endings"]], row["label"])


def winogrande_row(row):
    """Partial scoring: the option goes into the context, and what follows the blank is scored."""
    before, after = (part.strip() for part in row["sentence"].split("_", 1))
    options = [row["option1"], row["option2"]]
    choices = [f"{option} {after}" for option in options]
    return {**multiple_choice(before, choices, int(row["answer"]) - 1), "options": options, "suffix": after}


def lambada_row(row):
    """The passage without its last word."""
    context, word = row["text"].rsplit(" ", 1)
    return {"context": context, "target": word, "aliases": [word]}


def race_row(row):
    """One row per article: its questions but the last come solved, as in the harness."""
    *solved, last = ast.literal_eval(row["problems"])      # a Python literal
    context = f"Article: {row['article']}\n\n"
    for problem in solved:
        right, text = problem["options"]["ABCD".index(problem["answer"])], problem["question"]
        blank = text.endswith("  _  .")
        context += f"{text[:-5]}{right}\n" if blank else f"Question: {text}\nAnswer: {right}\n"
    return multiple_choice(context + last["question"], last["options"], "ABCD".index(last["answer"]))


ARC = labelled(lambda row: question(row["question"]))
TASKS = {  # name -> function -> list of rows
    "toy_recall": lambda: toy_world.tasks()["toy_recall"],   # of people that no recovery text shows again
    "toy_shown": lambda: toy_world.tasks()["toy_shown"],     # facts that the recovery text repeats
    "toy_unknown": lambda: toy_world.tasks()["toy_unknown"],     # of people the model never saw: chance
    "arc_easy": hub_task("allenai/ai2_arc", "test", ARC, "ARC-Easy"),
    "arc_challenge": hub_task("allenai/ai2_arc", "test", ARC, "ARC-Challenge"),
    "sciq": hub_task("allenai/sciq", "test", sciq_row),
    # The harness counts a WebQuestions answer when any alias is the greedy continuation; here it is open.
    "webqs": hub_task("stanfordnlp/web_questions", "test", lambda row: {
        "context": question(row["question"]), "target": row["answers"][0], "aliases": row["answers"]}),
    # The harness adds a second question mark.
    "triviaqa": hub_task("mandarjoshi/trivia_qa", "validation", lambda row: {
        "context": question(row["question"] + "?"), "target": row["answer"]["value"],
        "aliases": row["answer"]["aliases"]}, "rc.nocontext"),
    "hellaswag": hub_task("Rowan/hellaswag", "validation", hellaswag_row),
    "piqa": hub_task("baber/piqa", "validation", lambda row: multiple_choice(
        question(row["goal"]), [row["sol1"], row["sol2"]], row["label"])),
    "lambada": hub_task("EleutherAI/lambada_openai", "test", lambada_row, "default"),
    "openbookqa": hub_task("allenai/openbookqa", "test", labelled(lambda row: row["question_stem"]), "main"),
    "winogrande": hub_task("allenai/winogrande", "validation", winogrande_row, "winogrande_xl"),
    "race": hub_task("EleutherAI/race", "test", race_row, "high"),
    "boolq": hub_task("aps/super_glue", "validation", lambda row: multiple_choice(
        f"{row['passage']}\n{question(row['question'] + '?')}", ["no", "yes"], row["label"]), "boolq"),
    # DEVIATES: the harness lists lettered choices and scores the letters, which small models cannot read.
    "commonsense_qa": hub_task("tau/commonsense_qa", "validation",
                               labelled(lambda row: question(row["question"].strip()))),
}


def find_tasks(names):
    """-> {name of the task: path}, before any is read, which may be slow. Raises UserError."""
    paths = {}
    for name in filter(None, (part.strip() for part in (names or "").split(","))):
        path = user_path(name, "--tasks")
        if name not in TASKS and not (path.suffix == ".jsonl" and path.is_file()):
            raise UserError(f"--tasks {name}: not a known task nor an existing .jsonl file; use some of: "
                            f"{' '.join(TASKS)}, or a path")
        short = name if name in TASKS else path.stem
        if short in paths or short == "loss":              # "loss" is what items.json calls the text
            raise UserError(f"--tasks {names}: two things are named {short}; rename one of the files")
        paths[short] = path
    return paths


def load_tasks(names, limit=None):
    """-> {task name: rows}. names: comma-separated, of TASKS or paths of .jsonl files; limit: rows per task.

    A row is multiple choice {"id", "context", "choices", "answer"} or open {"id", "context", "target",
    "aliases"}; all rows of a task are of one kind. Raises UserError for a task or a row that is neither.
    """
    loaded = {}
    for name, path in find_tasks(names).items():
        rows = read_jsonl(path, "--tasks") if path.suffix == ".jsonl" else TASKS[name]()
        loaded[name] = [check_row(name, number, row) for number, row in enumerate(rows[:limit], 1)]
        kinds = ["choices" in row for row in loaded[name]]
        if True in kinds and False in kinds:
            other = kinds.index(not kinds[0]) + 1
            raise UserError(f"--tasks {name}: row {other} is of another kind than row 1 (choices, or an open "
                            "answer); give each kind a file of its own")
    return loaded


def is_texts(value):
    """A list of texts, and not an empty one?"""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def check_row(name, number, row):
    """The row itself, if it has the keys of one of the two schemas; otherwise UserError."""
    where = f"--tasks {name}: row {number}"
    is_open = isinstance(row.get("target"), str) and is_texts(row.get("aliases", [row["target"]]))
    if not isinstance(row.get("context"), str) or not ("choices" in row or is_open):
        raise UserError(f"{where} needs context, choices and answer (0-based), or context and target")
    if "choices" in row:
        choices, answer, options = row["choices"], row.get("answer"), row.get("options")
        if not is_texts(choices) or not is_whole(answer) or not 0 <= answer < len(choices):
            raise UserError(f"{where} needs choices, a list of texts, and answer, the 0-based number of one")
        fits = is_texts(options) and len(options) == len(choices)
        if "suffix" in row and not (isinstance(row["suffix"], str) and fits):
            raise UserError(f"{where} has a suffix but not one option for each choice; add options")
    return row
