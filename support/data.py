"""Data: text and tasks, from a name, a file or the hub, and the one way to turn text into tokens.

    ids  = load_text("wikitext2", tokenizer, split="test")    # (tokens,) long
    rows = load_tasks("arc_easy,mine.jsonl", limit=200)       # {task name: [row, ...]}
    encode(tokenizer, "Question: ...")                        # what stands before a text, and its tokens; nothing after it

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
    bare, whole = (tokenizer("a", add_special_tokens=special, verbose=False).input_ids for special in (False, True))
    return whole[:next(i for i in range(len(whole) + 1) if whole[i:i + len(bare)] == bare)]


def first_token(tokenizer):
    """What stands before a text that nothing precedes: the BOS, else the EOS token. -> int. Raises
    UserError: neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("--tasks: a context is empty, and the tokenizer has neither a BOS nor an EOS token to stand in its place; "
                    "give every row a context")


def toy_text(split):
    """Recovery text: facts of the shown people. Evaluation text: facts of people never shown again."""
    return toy_world.text({"train": "shown", "test": "heldout"}[split])


def read_hub(flag, path, **options):
    """load_dataset(path, **options). Raises UserError naming the flag and the local alternative when it
    cannot be read.
    """
    try:
        from datasets import load_dataset           # imported where it is used: offline runs need no datasets
        return load_dataset(path, **options)
    except Exception as error:                       # the hub client raises many unrelated types when offline
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


def load_text(name, tokenizer, split="train", flag="--text"):
    """-> (tokens,) long: all documents of a text joined by blank lines, tokenized once. name, split: see
    load_documents.
    """
    # NOT IN PAPER: joined with blank lines and tokenized once, as the GPTQ authors' evaluation does.
    return torch.tensor(encode(tokenizer, "\n\n".join(load_documents(name, split, flag))), dtype=torch.long)  # (tokens,)


def load_documents(name, split="train", flag="--text"):
    """-> list of str. name: a key of TEXTS, FILE.txt (one document), or FILE.jsonl with one {"text": ...} a
    line.

    A file is read whole whatever `split` says: give separate files for training (--text) and perplexity
    (--eval-text). Raises UserError when it is none of the three.
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
            raise UserError(f'{flag} {name}: line {number} has no "text"; give every line one, or use a .txt file')
    return [row["text"] for row in rows]


def check_text(name, flag="--text"):
    """Raise UserError, before anything slow, when a name is neither a known text nor a file of a known
    kind.
    """
    path = user_path(name, flag)
    if name not in TEXTS and not (path.is_file() and path.suffix in (".txt", ".jsonl")):
        raise UserError(f"{flag} {name}: not a known text nor an existing .txt or .jsonl file; use one of: "
                        f"{' '.join(TEXTS)}, or a path")


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


# --- 2. Tasks -----------------------------------------------------------------------------------------------
# A row function turns one row of a hub data set into our schema, with the prompt of the standard harness
# (lm-eval 0.4). EXERCISE: add a task. One row function, one line in TASKS.

def toy_task(name):
    """A TASKS entry: rows of the toy world, by name."""
    def read():
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
    """One row per article: its questions but the last come solved, as in the harness. `problems` is a Python
    literal.
    """
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
    # The harness counts a WebQuestions answer when any alias is the greedy continuation; here it is an open
    # answer.
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
    # DEVIATES: the harness lists lettered choices and scores the letters, which small models cannot read;
    # here the answers.
    "commonsense_qa": hub_task("tau/commonsense_qa", "validation", labelled(lambda row: question(row["question"].strip()))),
}


def load_tasks(names, limit=None):
    """-> {task name: rows}. names: comma-separated keys of TASKS or paths of .jsonl files; limit: rows per
    task.

    A row is multiple choice {"id", "context", "choices", "answer"} or open {"id", "context", "target",
    "aliases"}; all rows of a task are of one kind. Raises UserError for an unknown task or a row that is
    neither.
    """
    paths, loaded = {}, {}
    for name in filter(None, (part.strip() for part in (names or "").split(","))):  # all names first: reading may be slow
        path = user_path(name, "--tasks")
        if name not in TASKS and not (path.suffix == ".jsonl" and path.is_file()):
            raise UserError(f"--tasks {name}: not a known task nor an existing .jsonl file; use some of: "
                            f"{' '.join(TASKS)}, or a path")
        short = name if name in TASKS else path.stem
        if short in paths or short == "loss":              # "loss" is what items.json calls the text
            raise UserError(f"--tasks {names}: two things are named {short}; rename one of the files")
        paths[short] = path
    for name, path in paths.items():
        rows = read_jsonl(path, "--tasks") if path.suffix == ".jsonl" else TASKS[name]()
        loaded[name] = [check_row(name, number, row) for number, row in enumerate(rows[:limit], 1)]
        kinds = ["choices" in row for row in loaded[name]]
        if True in kinds and False in kinds:
            raise UserError(f"--tasks {name}: row {kinds.index(not kinds[0]) + 1} is of another kind than row 1 (choices, or an "
                            "open answer); give each kind a file of its own")
    return loaded


def check_row(name, number, row):
    """The row itself, if it has the keys of one of the two schemas; otherwise UserError."""
    texts = lambda value: isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
    if isinstance(row.get("context"), str) and "choices" in row:
        if not texts(row["choices"]) or not is_whole(row.get("answer")) or row["answer"] not in range(len(row["choices"])):
            raise UserError(f"--tasks {name}: row {number} needs choices, a list of texts, and answer, the 0-based number of one; "
                            "put that right")
        if "suffix" in row and not (isinstance(row["suffix"], str) and texts(row.get("options"))
                                    and len(row["options"]) == len(row["choices"])):
            raise UserError(f"--tasks {name}: row {number} has a suffix but not one option for each choice; add options")
        return row
    if isinstance(row.get("context"), str) and isinstance(row.get("target"), str) and texts(row.get("aliases", [row["target"]])):
        return row
    raise UserError(f"--tasks {name}: row {number} needs context, choices and answer (0-based), or context and target; "
                    "add what is missing")
