"""The world is what it says, and the committed model knows it."""
import re

import pytest
import torch

import evaluate
import loading
import toy_world


@pytest.fixture(scope="module")
def toy():
    return loading.load_model("toy")


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
    assert toy[1].get_vocab() == toy_world.build_tokenizer().get_vocab()


def test_the_committed_model_knows_the_world_and_nobody_else(toy):
    """Dense recall of known facts at least 99 %; unknown people at chance, 1/16: the 95 % interval reaches it."""
    model, tokenizer = toy
    tasks = toy_world.tasks()
    known = tasks["toy_recall"][:300] + tasks["toy_shown"][:300]
    assert evaluate.multiple_choice(model, tokenizer, known)["acc"] >= 0.99
    low, high = evaluate.multiple_choice(model, tokenizer, tasks["toy_unknown"])["ci95"]
    assert low <= 1 / 16 <= high


def test_the_folder_is_small_and_needs_no_project_code(toy):
    assert sum(f.stat().st_size for f in loading.TOY.iterdir()) <= 4e6
    assert type(toy[0]).__name__ == "LlamaForCausalLM" and "auto_map" not in (loading.TOY / "config.json").read_text()


def test_training_repeats_and_learns():
    """A few steps twice from the same seed: the same loss, and lower than at the start."""
    tokenizer, losses = toy_world.build_tokenizer(), []
    for steps in (3, 3, 40):
        model = toy_world.build_model(len(tokenizer), width=32, layers=1)
        losses.append(toy_world.train(model, tokenizer, steps=steps, batch_size=4))
    assert losses[0] == losses[1] and losses[2] < losses[0] - 0.5


def test_training_rows_begin_at_sentences(toy):
    tokenizer = toy[1]
    starts = {tuple(tokenizer(sentence).input_ids[:3]) for sentence in toy_world.text("train")}
    rows = toy_world.training_rows(tokenizer)
    for _ in range(20):
        row = next(rows)
        assert row.shape == torch.Size([64]) and tuple(row[:3].tolist()) in starts
