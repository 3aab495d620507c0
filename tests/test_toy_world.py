"""The world is what it says, and the committed model knows it."""
import math
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from experiments import toy_model
from support import models, toy_world
from support.cli import UserError
from support.recipe import digest


@pytest.fixture(scope="module")
def toy():
    return models.load_model("toy")


@torch.no_grad()
def right(model, tokenizer, rows):
    """How many questions are answered rightly; every answer is one token, so one forward pass tells. ->
    int."""
    total = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["context"]).input_ids])
        choices = [tokenizer(choice).input_ids for choice in row["choices"]]
        logits = model(ids).logits[0, -1, [token for (token,) in choices]]
        total += int(logits.argmax()) == row["answer"]
    return total


def test_the_seed_is_the_world():
    for domain in toy_world.DOMAINS:
        assert toy_world.people(domain, 0) == toy_world.people(domain, 0) != toy_world.people(domain, 1)
    assert toy_world.text("shown") == toy_world.text("shown")


def test_nobody_is_in_two_groups():
    for domain in toy_world.DOMAINS:
        names = [name for group in toy_world.people(domain).values() for name, _ in group]
        assert len(names) == len(set(names)) == toy_world.PEOPLE + toy_world.UNKNOWN


def test_recovery_text_never_names_a_held_out_or_unknown_person():
    shown, everything = " ".join(toy_world.text("shown")), " ".join(toy_world.text("train"))
    for domain in toy_world.DOMAINS:
        groups = toy_world.people(domain)
        assert all(name in shown for name, _ in groups["shown"])
        assert not any(name in shown for name, _ in groups["heldout"])
        assert all(name in everything for name, _ in groups["heldout"])
        assert not any(name in everything for name, _ in groups["unknown"])


def test_every_fact_is_stated_in_every_phrasing():
    sentences = set(toy_world.text("train"))
    for domain in toy_world.DOMAINS:
        for person, facts in toy_world.people(domain)["heldout"][:3]:
            for kind, (_, phrasings) in toy_world.WORLD[domain]["facts"].items():
                assert all(phrasing.format(p=person, v=facts[kind]) in sentences for phrasing in phrasings)
    assert len(sentences) == 2 * toy_world.PEOPLE * 5 * 4


def test_a_question_is_the_text_up_to_its_answer():
    """Tasks ask in the words of the training text, and the right choice is the fact."""
    sentences = set(toy_world.text("train"))
    for row in toy_world.tasks()["toy_recall"]:
        assert f"{row['context']} {row['choices'][row['answer']]}." in sentences
        assert len(row["choices"]) == len(set(row["choices"])) == 16


def test_the_default_world_never_changes():
    """Every result of the project was measured in it: text, questions and training rows, by a digest."""
    sample = [toy_world.tasks(), toy_world.text("train"), toy_world.text("shown"),
              next(toy_model.training_rows(toy_model.build_tokenizer())).tolist()]
    assert digest(sample) == "b10afd949a247c2b"


@pytest.mark.parametrize("count", [6, 480])
def test_worlds_of_another_load(count):
    """As many people as asked for, in the same phrasings, and nobody in two groups."""
    sentences = set(toy_world.text("train", count=count))
    assert len(sentences) == 2 * count * 5 * 4
    for domain in toy_world.DOMAINS:
        groups = toy_world.people(domain, count=count)
        assert [len(group) for group in groups.values()] == [count // 2, count // 2, toy_world.UNKNOWN]
        names = [name for group in groups.values() for name, _ in group]
        assert len(names) == len(set(names))
    rows = toy_world.tasks(count=count)["toy_recall"]
    assert len(rows) == count * 5
    assert all(f"{row['context']} {row['choices'][row['answer']]}." in sentences for row in rows)


def test_texts_by_domain_and_refusals():
    both = sorted(toy_world.text("shown"))
    assert sorted(sum((toy_world.text("shown", domain=domain) for domain in toy_world.DOMAINS), [])) == both
    for bad in ({"split": "test"}, {"split": "shown", "domain": "moon"}):
        with pytest.raises(ValueError, match="must be"):
            toy_world.text(**bad)


def test_one_word_is_one_token(toy):
    _, tokenizer = toy
    for sentence in toy_world.text("train")[:200]:
        ids = tokenizer(sentence).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(re.findall(r"\w+|[^\w\s]+", sentence))


def test_the_tokenizer_is_the_one_the_code_builds(toy):
    assert toy[1].get_vocab() == toy_model.build_tokenizer().get_vocab()


def test_the_committed_model_knows_the_world_and_nobody_else(toy):
    """Dense recall of known facts at least 99 %; unknown people at chance, 1/16, within three standard
    deviations."""
    model, tokenizer = toy
    tasks = toy_world.tasks()
    known, unknown = tasks["toy_recall"][:200] + tasks["toy_shown"][:200], tasks["toy_unknown"]
    assert right(model, tokenizer, known) >= 0.99 * len(known)
    deviation = math.sqrt(len(unknown) * 1 / 16 * 15 / 16)
    assert abs(right(model, tokenizer, unknown) - len(unknown) / 16) <= 3 * deviation


def test_the_folder_is_small_and_needs_no_project_code(toy):
    assert sum(f.stat().st_size for f in models.TOY.iterdir()) <= 4e6
    assert type(toy[0]).__name__ == "LlamaForCausalLM"
    assert "auto_map" not in (models.TOY / "config.json").read_text()


def test_training_repeats_learns_and_is_quiet_in_a_log_file(capsys):
    """A few steps twice from the same seed: the same loss, and lower than at the start."""
    tokenizer, losses = toy_model.build_tokenizer(), []
    for steps in (3, 3, 40):
        model = toy_model.build_model(len(tokenizer), width=32, layers=1)
        losses.append(toy_model.train(model, tokenizer, steps=steps, batch_size=4))
    assert losses[0] == losses[1] and losses[2] < losses[0] - 0.5
    assert capsys.readouterr().err == ""


def test_training_rows_begin_at_sentences(toy):
    tokenizer = toy[1]
    starts = {tuple(tokenizer(sentence).input_ids[:3]) for sentence in toy_world.text("train")}
    rows = toy_model.training_rows(tokenizer)
    for _ in range(20):
        row = next(rows)
        assert row.shape == torch.Size([64]) and tuple(row[:3].tolist()) in starts


# --- the command --------------------------------------------------------------------------------------------

def test_looking_at_the_world(capsys):
    toy_model.main([])
    text = capsys.readouterr().out
    assert "chance 1/16" in text and "harbour:" in text and "orbit:" in text


def test_training_writes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_model, "build_model", lambda size,
                        seed: BUILD(size, width=16, layers=1, seed=seed))
    toy_model.main(["--train", "--steps", "2", "--people", "20", "--out", str(tmp_path / "m")])
    model, tokenizer = models.load_model(str(tmp_path / "m"))
    assert model.config.hidden_size == 16 and tokenizer.get_vocab() == toy_model.build_tokenizer().get_vocab()
    with pytest.raises(UserError, match="^--out .*already"):
        toy_model.main(["--train", "--steps", "2", "--out", str(tmp_path / "m")])


BUILD = toy_model.build_model


@pytest.mark.parametrize("flags, word", [
    (["--train"], "--out"), (["--out", "x"], "--out"), (["--steps", "3"], "--steps"),
    (["--seed", "-1"], "--seed"), (["--people", "20"], "--people"), (["--people", "547"], "--people"),
    (["--seed", "x"], "--seed"), (["--train", "--out", "x", "--steps", "0"], "--steps"),
    (["--nonsense"], "--nonsense"),
    (["--train", "--out", str(models.TOY)], "--out")])
def test_mistakes(flags, word, monkeypatch, tmp_path):
    """Not even toy_model/ itself is overwritten."""
    monkeypatch.setattr(toy_model, "train", lambda *args, **settings: pytest.fail("trained first"))
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in models.TOY.iterdir()}
    with pytest.raises(UserError, match=word):
        toy_model.main(flags)
    assert {path: path.stat().st_mtime_ns for path in models.TOY.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_the_command_in_a_process_of_its_own(tmp_path):
    run = subprocess.run([sys.executable, "-m", "experiments.toy_model", "--train"], capture_output=True,
                         text=True,
                         timeout=120, cwd=ROOT)
    assert run.returncode == 2 and run.stderr.startswith("error: --out") and len(run.stderr.splitlines()) == 1
