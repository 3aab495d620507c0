"""Tags: every step of the paper that the code takes says so where it is taken, and no tag stands anywhere else.

A tag such as [§3.2] or [Tab. 3] is a section, table or figure of the ICLR 2024 submission. Where a step is added or moves,
change STEPS; where something is decided that the paper leaves open, mark it NOT IN PAPER and add a line to MARKS.
"""
import ast
import re

import pytest

from conftest import ROOT

FILES = sorted(path for folder in (".", "methods", "support", "experiments") for path in (ROOT / folder).glob("*.py"))
TAG = re.compile(r"\[((?:§|Tab\. |Fig\. )\d[^\]]*)\]")

# (the step in our words, tag, file, function, class or name; "" for what the file's docstring says)
STEPS = [
    # §3.1
    ("ask every prompt and put the answers together, which does not scale", "§3.1", "experiments/prompt_scores.py", "Scores.averaged"),
    ("one prompt alone, longer and longer", "Fig. 3", "experiments/reproduce_plan.py", "lengths"),
    ("does accuracy follow perplexity?", "Fig. 3", "experiments/reproduce_figures.py", "length_figure"),
    # §3.2
    ("m prompts with parameters of their own, Z", "§3.2: Z = P_1 .. P_m", "idp_minimal.py", "PromptBank"),
    ("prompts do not see one another: each runs alone, and its keys and values are kept", "§3.2: Z = P_1 .. P_m", "idp_minimal.py",
     "prompt_cache"),
    ("A before the softmax", "§3.2: mean attention", "idp_minimal.py", "prompt_logits"),
    ("A after one softmax over all prompts and the input", "§3.2: mean attention", "idp_minimal.py", "prompt_probabilities"),
    ("the mean of A over the block of a prompt and the input", "§3.2: mean attention", "idp_minimal.py", "mean_attention"),
    ("the same as a product of means", "§3.2: mean attention", "idp_minimal.py", "mean_logits"),
    ("each layer takes the prompt with the largest mean", "§3.2: argmax; mask", "idp_minimal.py", "choose_prompt"),
    ("prompts that were not chosen are masked away", "§3.2: argmax; mask", "idp_minimal.py", "idp_attention"),
    ("all of it inside the attention that is there anyway", "Fig. 4", "idp_minimal.py", "idp_attention"),
    ("what that costs in operations", "Fig. 4", "experiments/latency.py", "choice_flops"),
    ("prompts that were trained are banked, and chosen from at inference", "§3.2", "methods/prompts.py", "SoftPrompts.inference"),
    ("the literal reading, which the other three are tested against", "§3.2", "experiments/readings.py", "LITERAL"),
    ("how tags are read", "§3.2", "idp_minimal.py", ""),
    # §3.3
    ("GPTQ at 3 bits, SparseGPT at 50 %", "§3.3", "compress.py", ""),
    ("both in one loop", "§3.3", "methods/gptq.py", ""),
    ("sparsity without a pattern", "§3.3", "experiments/reproduce_plan.py", "own_settings"),
    ("how far one can compress", "Fig. 2", "experiments/reproduce_plan.py", "compressions"),
    ("how far one can compress, drawn", "Fig. 2", "experiments/reproduce_figures.py", "compression_figure"),
    ("AdamW", "§3.3", "recover.py", "train"),
    ("tokens, rate, weight decay as stated", "§3.3", "experiments/reproduce_plan.py", "paper_recipe"),
    ("taken wherever no flag says otherwise", "§3.3", "experiments/reproduce.py", "fill_in"),
    ("what of it a run has changed", "§3.3", "experiments/reproduce.py", "recipe_in_words"),
    ("nine tasks", "§3.3", "experiments/reproduce.py", "NINE"),
    ("World, Common, Language", "§3.3", "experiments/reproduce_figures.py", "DOMAINS"),
    ("plain means of their tasks", "§3.3", "experiments/reproduce_figures.py", ""),
    ("sizes as printed", "§3.3", "experiments/reproduce_plan.py", ""),
    ("LoRA on all linears of a block, by its numbers of parameters", "§3.3: its parameters", "experiments/reproduce_plan.py", "Plan.remedy"),
    ("two prompts of 50 and 100 tokens", "§3.3", "experiments/latency.py", "texts"),
    # §3.3.1
    ("each prompt trained alone, on the same data, by ordinary prompt tuning", "§3.3.1", "methods/prompts.py", "SoftPrompts"),
    ("each prompt alone, and all in a row, beside IDP", "Tab. 3", "methods/prompts.py", "SoftPrompts.parts"),
    ("they come with IDP in one run", "Tab. 3", "recover.py", ""),
    ("they come with IDP in one run of the tables too", "Tab. 3", "experiments/reproduce.py", ""),
    ("the names of those rows", "Tab. 3", "experiments/reproduce_plan.py", "part_names"),
    ("the table of the two prompts", "Tab. 3", "experiments/reproduce_plan.py", "two_prompts"),
    ("which rows are a prompt alone", "Tab. 3", "experiments/reproduce_figures.py", "is_alone"),
    ("what its rows are tested against", "Tab. 3", "experiments/reproduce_figures.py", "bases"),
    ("printed as the others", "Tab. 3", "experiments/reproduce_figures.py", "table"),
    # Tables 1 and 2, Figures 5 to 7, §4
    ("every remedy after GPTQ", "Tab. 1", "experiments/reproduce_plan.py", "remedies"),
    ("every remedy after SparseGPT", "Tab. 2", "experiments/reproduce_plan.py", "remedies"),
    ("printed", "Tab. 1", "experiments/reproduce_figures.py", "table"),
    ("printed", "Tab. 2", "experiments/reproduce_figures.py", "table"),
    ("how tags are read", "Tab. 1", "experiments/reproduce.py", ""),
    ("gain of each remedy, task by task", "Fig. 5", "experiments/reproduce_plan.py", "largest"),
    ("its tests", "Fig. 5", "experiments/reproduce_figures.py", "gains"),
    ("its table", "Fig. 5", "experiments/reproduce_figures.py", "gain_table"),
    ("its bars", "Fig. 5", "experiments/reproduce_figures.py", "gain_figure"),
    ("likeness to the dense model, layer by layer", "Fig. 6", "experiments/reproduce_plan.py", "largest"),
    ("cosine of attention and of activations", "Fig. 6", "experiments/fidelity.py", "Reference.likeness"),
    ("its definition", "Fig. 6", "experiments/fidelity.py", ""),
    ("its mean over chunks", "Fig. 6", "experiments/reproduce_figures.py", "cosine"),
    ("its table", "Fig. 6", "experiments/reproduce_figures.py", "cosine_table"),
    ("its lines", "Fig. 6", "experiments/reproduce_figures.py", "cosine_figure"),
    ("does a remedy bring the patterns back? other measures", "Fig. 6", "experiments/patterns.py", ""),
    ("IDP over the average size of its prompts", "Fig. 7", "experiments/reproduce_plan.py", "average_sizes"),
    ("drawn", "Fig. 7", "experiments/reproduce_figures.py", "average_figure"),
    ("evidence for displacement: the inside of the models", "§4", "experiments/patterns.py", ""),
    # pictures
    ("score, choose, mask as a picture", "Fig. 4", "experiments/pictures.py", ""),
    ("score, choose, mask as a picture, drawn", "Fig. 4", "experiments/pictures_idp.py", "look"),
    ("which readings there are", "§3.2", "idp_minimal.py", "attach_idp"),
]

# What the paper leaves open, and every mark of it: (file, topic, words that stand with the mark).
OPEN = ["schedule", "batch", "sequence length", "initialisation", "seeds", "rate per method", "group size", "act-order", "calibration size",
        "positions of prompts", "decoding", "ties", "padding", "heads", "which layers", "softmax or not", "mean over what",
        "per pair or context", "sizes for narrower models", "size of Figures 5 and 6", "harness", "what Figure 6 is taken over",
        "what the 60 % compare"]
MARKS = [
    ("recover.py", "schedule", "the schedule"),
    ("idp_minimal.py", "positions of prompts", "right-aligned"),
    ("idp_minimal.py", "padding", "real tokens only"),
    ("idp_minimal.py", "ties", "a tie goes to the lowest"),
    ("methods/prompts.py", "initialisation", "which start the authors used"),
    ("methods/registry.py", "rate per method", "the peak learning rates"),
    ("support/data.py", "harness", "joined with blank lines"),
    ("experiments/patterns.py", "what Figure 6 is taken over", "every measure below but the direction"),
    ("experiments/fidelity.py", "what Figure 6 is taken over", "over what Fig. 6 takes its cosines"),
    ("experiments/reproduce_plan.py", "sizes for narrower models", "the power of two nearest"),
    ("experiments/reproduce_plan.py", "rate per method", "LoRA's own rate"),
    ("experiments/reproduce_plan.py", "size of Figures 5 and 6", "at which size"),
    ("experiments/latency.py", "what the 60 % compare", "LoRA merged or not"),
    ("experiments/readings.py", "per pair or context", "a harness scores pairs"),
    ("experiments/sweep.py", "rate per method", "how the authors chose theirs"),
]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def definitions(body, before=""):
    """{name, or Class.method: its node} of functions, classes and values."""
    found = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[before + node.name] = node
            found |= definitions(node.body, f"{node.name}.") if isinstance(node, ast.ClassDef) else {}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[before + node.targets[0].id] = node
    return found


def words_of(file, name):
    """What is written at a definition, comments on its lines and the heading of its section included; "" is the docstring."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    if not name:
        return ast.get_docstring(tree)
    node = definitions(tree.body)[name]
    headings = [line for line in lines[:node.lineno - 1] if line.startswith("# --- ")]
    return "\n".join(headings[-1:] + lines[node.lineno - 1:node.end_lineno])


@pytest.mark.parametrize("step, tag, file, name", STEPS, ids=[f"{file}:{name} [{tag}]" for _, tag, file, name in STEPS])
def test_a_step_has_its_tag(step, tag, file, name):
    assert f"[{tag}]" in words_of(file, name), step


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_tag_is_a_step(path):
    """No line has a tag that is not, by STEPS, of the definition, heading or docstring in which the line stands."""
    own = [(tag, words_of(file, name)) for _, tag, file, name in STEPS if file == name_of(path)]
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [(tag, line.strip()) for line in lines for tag in TAG.findall(line)]
    assert not [(tag, line) for tag, line in found if not any(tag == known and line.strip('"') in words for known, words in own)]


def test_steps_cover_the_paper():
    """Sections, tables and figures that hold a step or a result; [Fig. 1] and §1, §2, §5 hold none."""
    whole = {re.split(r"[:]", tag)[0] for _, tag, _, _ in STEPS}
    assert whole == {"§3.1", "§3.2", "§3.3", "§3.3.1", "§4", "Tab. 1", "Tab. 2", "Tab. 3", *(f"Fig. {k}" for k in range(2, 8))}


def marks_of(path):
    """What stands with every NOT IN PAPER mark of a file: 200 characters before and after, comment signs and line ends apart."""
    text = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text(encoding="utf-8"))
    return [text[max(0, mark.start() - 200):mark.end() + 200] for mark in re.finditer(r"NOT IN PAPER(?! marks)", text)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_marks_stand_on_what_the_paper_leaves_open(path):
    """As many marks as lines in MARKS, each with the words of one."""
    expected, marks = [words for file, _, words in MARKS if file == name_of(path)], marks_of(path)
    assert len(marks) == len(expected)
    assert not [mark for mark in marks if not any(words in mark for words in expected)]
    assert not [words for words in expected if not any(words in mark for mark in marks)]


def test_marks_have_a_topic_of_the_list():
    assert {topic for _, topic, _ in MARKS} <= set(OPEN)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_says_that_the_paper_was_not_read(path):
    """Earlier versions knew its abstract only, and tagged by topic."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    assert not re.search(r"not at hand|text (?:is|was) not (?:known|public|available)|abstract alone|\[IDP: ", text)
