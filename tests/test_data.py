"""Texts and tasks: hub rows become our schema with the standard harness's prompts; a mistake is said in one
line."""
import json
import sys
import types

import pytest

from support import data
from support.cli import UserError
from support.data import TASKS, load_documents, load_tasks, load_text
from support.models import load_model

LETTERS = ["A", "B", "C", "D"]
ARC = {"id": "Mercury_7175875", "question": "Which gas do plants take in?", "answerKey": "2",
       "choices": {"text": ["oxygen", "carbon dioxide", "helium", "neon"], "label": ["1", "2", "3", "4"]}}
PROBLEMS = [{"question": "Tom likes  _  .", "answer": "B", "options": ["tea", "milk", "water", "juice"]},
            {"question": "Where is he?", "answer": "A", "options": ["home", "school", "shop", "park"]},
            {"question": "He is  _  .", "answer": "D", "options": ["sad", "ill", "late", "glad"]}]
HUB = {  # task -> (arguments of load_dataset, one row as the hub gives it, what must come out of it)
    "arc_easy": (("allenai/ai2_arc", "ARC-Easy", "test"), ARC, {
        "id": "Mercury_7175875", "context": "Question: Which gas do plants take in?\nAnswer:",
        "choices": ["oxygen", "carbon dioxide", "helium", "neon"], "answer": 1}),
    "arc_challenge": (("allenai/ai2_arc", "ARC-Challenge", "test"), {**ARC, "answerKey": "4"}, {"answer": 3}),
    "sciq": (("allenai/sciq", None, "test"), {
        "question": "What pulls?", "distractor1": "heat", "distractor2": "light", "distractor3": "sound",
        "correct_answer": "gravity", "support": " Masses attract."}, {
        "context": "Masses attract.\nQuestion: What pulls?\nAnswer:",
            "choices": ["heat", "light", "sound", "gravity"], "answer": 3}),
    "webqs": (("stanfordnlp/web_questions", None, "test"), {
        "url": "http://x", "question": "where is lima?", "answers": ["Peru", "South America"]}, {
        "context": "Question: where is lima?\nAnswer:", "target": "Peru",
            "aliases": ["Peru", "South America"]}),
    "triviaqa": (("mandarjoshi/trivia_qa", "rc.nocontext", "validation"), {
        "question": "Who wrote Emma?", "question_id": "tc_1",
        "answer": {"value": "Jane Austen", "aliases": ["Jane Austen", "Austen"],
                   "normalized_value": "jane austen"}}, {
        "context": "Question: Who wrote Emma??\nAnswer:", "target": "Jane Austen",
                       "aliases": ["Jane Austen", "Austen"]}),
    "hellaswag": (("Rowan/hellaswag", None, "validation"), {
        "ind": 1, "activity_label": "Boats", "ctx_a": "How to row [title] Sit down [substeps] and hold",
        "ctx_b": "the oars",
        "ctx": "", "endings": ["go [step] on", "stop.", "sing.", "eat."], "label": "2"}, {
        "context": "Boats: How to row. Sit down and hold The oars",
            "choices": ["go on", "stop.", "sing.", "eat."], "answer": 2}),
    "piqa": (("baber/piqa", None, "validation"), {"goal": "Open a jar", "sol1": "twist", "sol2": "bite",
                                                  "label": 0}, {
        "context": "Question: Open a jar\nAnswer:", "choices": ["twist", "bite"], "answer": 0}),
    "lambada": (("EleutherAI/lambada_openai", "default", "test"), {"text": "He called\nhis dog “Rex"}, {
        "context": "He called\nhis dog", "target": "“Rex", "aliases": ["“Rex"]}),
    "openbookqa": (("allenai/openbookqa", "main", "test"), {
        "id": "8-343", "question_stem": "The sun is", "choices": {"text": ["a star", "a moon"],
                                                                  "label": ["A", "B"]},
        "answerKey": "A"}, {"id": "8-343", "context": "The sun is", "choices": ["a star", "a moon"],
                            "answer": 0}),
    "winogrande": (("allenai/winogrande", "winogrande_xl", "validation"), {
        "sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve",
        "answer": "2"}, {
        "context": "Ann thanked Eve because", "options": ["Ann", "Eve"], "suffix": "had helped.", "answer": 1,
        "choices": ["Ann had helped.", "Eve had helped."]}),
    "race": (("EleutherAI/race", "high", "test"), {"article": "Tom is home.", "problems": str(PROBLEMS)}, {
        "context": "Article: Tom is home.\n\nTom likes milk\nQuestion: Where is he?\nAnswer: home\n"
                   "He is  _  .",
        "choices": ["sad", "ill", "late", "glad"], "answer": 3}),
    "boolq": (("aps/super_glue", "boolq", "validation"), {
        "passage": "Ice -- Ice is solid.", "question": "is ice solid", "idx": 0, "label": 1}, {
        "context": "Ice -- Ice is solid.\nQuestion: is ice solid?\nAnswer:", "choices": ["no", "yes"],
            "answer": 1}),
    "commonsense_qa": (("tau/commonsense_qa", None, "validation"), {
        "id": "1af", "question": "Where do fish live? ", "question_concept": "fish", "answerKey": "B",
        "choices": {"label": LETTERS + ["E"], "text": ["sky", "sea", "sand", "tree", "attic"]}}, {
        "context": "Question: Where do fish live?\nAnswer:",
            "choices": ["sky", "sea", "sand", "tree", "attic"], "answer": 1}),
}


def stand_in(monkeypatch, load_dataset):
    """Put a module `datasets` with this load_dataset in place of the real one."""
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_every_hub_task_has_an_example_here():
    assert set(HUB) == {name for name in TASKS if not name.startswith("toy_")}


@pytest.mark.parametrize("name", sorted(HUB))
def test_hub_rows_become_ours(name, monkeypatch):
    arguments, row, expected = HUB[name]
    called = []
    def load_dataset(path, name=None, split=None):
        called.append((path, name, split))
        return [row]
    stand_in(monkeypatch, load_dataset)
    [ours] = load_tasks(name)[name]                        # check_row is part of it
    assert called == [arguments]
    assert {key: ours[key] for key in expected} == expected and isinstance(ours["id"], str)


@pytest.mark.parametrize("read, flag", [(lambda: load_tasks("arc_easy"), "--tasks"),
                                        (lambda: load_documents("c4"), "--text")])
def test_offline_names_the_flag_and_the_local_way(read, flag, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")
    stand_in(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=rf"{flag}: .*ConnectionError.*: {flag} FILE.jsonl"):
        read()


def write(path, lines):
    """A .jsonl file of given objects (or raw lines)."""
    text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8")
    return str(path)


def test_local_jsonl_is_the_same_schema_and_limit_cuts(tmp_path):
    rows = [{"id": str(i), "context": "a\u2028b", "choices": ["x", "y"], "answer": i % 2} for i in range(3)]
    name = write(tmp_path / "mine.jsonl", rows)
    assert load_tasks(name, limit=2) == {"mine": rows[:2]}, "U+2028 is no line break in JSON"
    assert list(load_tasks(f"toy_recall, {name}", limit=1)) == ["toy_recall", "mine"]
    assert load_tasks("") == {} and load_tasks(None) == {}


GOOD = {"context": "c", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize("row, word", [
    ({**GOOD, "answer": 2}, "answer"), ({**GOOD, "answer": "0"}, "answer"),
    ({**GOOD, "choices": ["a", 1]}, "choices"),
    ({**GOOD, "choices": []}, "choices"), ({"choices": ["a"], "answer": 0}, "context"),
    ({"context": "c"}, "target"),
    ({"context": "c", "target": 3}, "target"), ({"context": "c", "target": "t", "aliases": "t"}, "target"),
    ({**GOOD, "suffix": "s", "options": ["a"]}, "options"), ("[1, 2]", "line 2"), ("{not json", "line 2")])
def test_a_bad_row_is_named(row, word, tmp_path):
    name = write(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(UserError, match=f"--tasks.*(row|line) 2.*({word}|object|JSON)"):
        load_tasks(name)


def test_mistakes_about_tasks_come_before_reading(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "slow", lambda: pytest.fail("read before the other name was checked"))
    with pytest.raises(UserError, match="--tasks nonsense.*arc_easy"):
        load_tasks("slow,nonsense")
    (tmp_path / "b").mkdir()
    twins = write(tmp_path / "t.jsonl", [GOOD]), write(tmp_path / "b" / "t.jsonl", [GOOD])
    with pytest.raises(UserError, match="two things are named t"):
        load_tasks(",".join(twins))
    with pytest.raises(UserError, match="no rows"):
        load_tasks(write(tmp_path / "empty.jsonl", ["", ""]))


def test_texts_and_their_mistakes(tmp_path):
    _, tokenizer = load_model("toy")
    (tmp_path / "a.txt").write_text("Ada lives in Rome.")
    documents = write(tmp_path / "d.jsonl", [{"text": "Ada lives"}, {"text": "in Rome."}])
    assert load_text(str(tmp_path / "a.txt"), tokenizer).tolist() == tokenizer("Ada lives in Rome.").input_ids
    assert load_text(documents, tokenizer).tolist() == tokenizer("Ada lives\n\nin Rome.").input_ids
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, word in ((write(tmp_path / "x.jsonl", [{"body": "x"}]), '"text"'),
                       (str(tmp_path / "latin.txt"), "UTF-8"),
                       (str(tmp_path / "none.txt"), "wikitext2"), (str(tmp_path), "wikitext2")):
        with pytest.raises(UserError, match=f"--text.*{word}"):
            load_documents(name)


def test_detokenize_is_the_harness_clean_up():
    text = (' = Valkyria = \n The 1 @,@ 200 @-@ ton ship , built in 1909 ( or " 1910 " ) , '
            "was the crew 's home . It sank .")
    assert data.detokenize(text) == (' = Valkyria =\nThe 1,200-ton ship, built in 1909 (or "1910"), '
                                     "was the crew's home. It sank .")


# --- files as strangers write them --------------------------------------------------------------------------

def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, body in (("a.txt", "Ada lives."), ("a.jsonl", '{"text": "Ada lives."}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body.encode())
        assert load_documents(str(tmp_path / name)) == ["Ada lives."]


@pytest.mark.parametrize("line, word", [
    ('{"text": "\\ud800"}', "surrogate"), ('{"text": NaN}', "not JSON"), ('{"text": 1e999}', "not JSON"),
    ('{"text": ' + "[" * 100_000, "nested|not JSON"), ("[1]", "object"), ('{"text": null}', '"text"'),
    ("", "no rows")])
def test_a_bad_line_of_text_is_named(line, word, tmp_path):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(UserError, match=f"^--text .*({word})"):
        load_documents(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("name", ["~nobody_of_that_name/x.txt", "x" * 5000 + ".txt", "a\0.txt", ""])
def test_names_that_are_no_path(name):
    for read, flag in ((load_documents, "--text"), (lambda name: load_tasks(name or " ,x"), "--tasks")):
        with pytest.raises(UserError, match=f"^{flag}"):
            read(name)


def test_kinds_of_rows_do_not_mix_and_loss_is_taken(tmp_path):
    with pytest.raises(UserError, match="^--tasks mixed: row 2 is of another kind"):
        load_tasks(write(tmp_path / "mixed.jsonl", [GOOD, {"context": "c", "target": "t"}]))
    with pytest.raises(UserError, match="^--tasks .*named loss"):
        load_tasks(write(tmp_path / "loss.jsonl", [GOOD]))
    with pytest.raises(UserError, match="^--tasks true: row 1"):
        load_tasks(write(tmp_path / "true.jsonl", [{**GOOD, "answer": True}]))


# --- tokens -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, after", [([], []), ([1], []), ([], [2]), ([1], [2]), ([1, 1], [2, 2])])
def test_nothing_is_appended_to_a_text(before, after):
    """Some tokenizers close a text with EOS: contexts, prompts and chunks all go on, so it is left out."""
    def tokenizer(text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) for letter in text]
        return types.SimpleNamespace(input_ids=before + ids + after if add_special_tokens else ids)
    assert data.encode(tokenizer, "Ada") == before + [65, 100, 97]
    assert data.encode(tokenizer, "Ada", start=False) == [65, 100, 97]
    assert data.start_tokens(tokenizer) == before


def test_what_stands_before_nothing():
    first = lambda bos, eos: data.first_token(types.SimpleNamespace(bos_token_id=bos, eos_token_id=eos))
    assert first(1, 2) == 1 and first(None, 2) == 2 and first(0, 2) == 0
    with pytest.raises(UserError, match="--tasks"):
        first(None, None)
