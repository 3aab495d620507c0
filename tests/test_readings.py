"""Readings of IDP: choices per context and per pair, against slow twins, and the command."""
import json

import pytest
import torch

import evaluate
from experiments import readings
from idp_minimal import PromptBank, attach_idp, idp_reference
from methods.prompts import SoftPrompts
from support.cli import UserError
from support.data import encode
from support.models import load_model
from support.scoring import encode_pair

ROWS = [{"context": context, "choices": ["baker", "sailor works", "weaver"], "answer": i % 3, "id": str(i)}
        for i, context in enumerate(["Mira Olsen works as a", "Question : What is the trade of Otto Holm ? Answer :"])]


@pytest.fixture(scope="module")
def toy():
    """The toy model, its tokenizer, and prompts that disagree."""
    model, tokenizer = load_model("toy")
    method = SoftPrompts(model, [2, 3, 5], seed=1)
    prompts = [3 * P.detach() for P in method.prompts]
    return model, tokenizer, prompts, PromptBank.from_prompts(model, prompts)


def test_without_a_choice_pairs_score_as_contexts_do(toy):
    """A plain model, and one with a fixed prompt: reading the candidate with its context changes no score."""
    model, tokenizer, _, bank = toy
    expected = evaluate.multiple_choice(model, tokenizer, ROWS)["logp"]
    assert torch.allclose(torch.tensor(readings.pair_scores(model, tokenizer, ROWS)[0]), torch.tensor(expected), atol=1e-4)
    with attach_idp(model, bank, "fixed", k=1) as idp:
        expected = evaluate.multiple_choice(model, tokenizer, ROWS)["logp"]
        logp, chosen = readings.pair_scores(model, tokenizer, ROWS, idp)
    assert torch.allclose(torch.tensor(logp), torch.tensor(expected), atol=1e-4)
    assert {choice for row in chosen for choice in row} == {(1,) * len(bank.keys)}


def test_a_pair_chooses_by_all_its_tokens(toy):
    """Each pair alone through the slow reference: its log-likelihood and what each layer chose."""
    model, tokenizer, prompts, bank = toy
    with attach_idp(model, bank) as idp:
        logp, chosen = readings.pair_scores(model, tokenizer, ROWS, idp)
    for i, row in enumerate(ROWS):
        for j, pair in enumerate(evaluate.choice_pairs(row)):
            left, right = encode_pair(tokenizer, *pair, 100)
            logits, choice = idp_reference(model, prompts, torch.tensor([left + right]))
            scores = logits[0].log_softmax(-1)[torch.arange(len(left) - 1, len(left + right) - 1), right]
            assert logp[i][j] == pytest.approx(scores.sum().item(), abs=1e-4)
            assert chosen[i][j] == tuple(choice[:, 0].tolist())


def test_choices_of_contexts(toy):
    """A padded batch of contexts of unequal lengths, each as the slow reference chooses."""
    model, tokenizer, prompts, bank = toy
    contexts = [encode(tokenizer, row["context"]) for row in ROWS]
    for scores in ("logits", "probabilities"):
        chosen = readings.choices_of(model, bank, contexts, scores)
        each = [idp_reference(model, prompts, torch.tensor([ids]), scores=scores)[1] for ids in contexts]
        assert torch.equal(chosen, torch.cat(each, dim=1))


def test_shares_are_percentages_of_each_prompt():
    assert readings.shares(torch.tensor([0, 1, 1, 1]), 3) == "25.0 / 75.0 / 0.0"


def test_every_row_is_tested_against_the_literal_one():
    """One question lost, two gained; rows that train nothing are not compared."""
    items = lambda values: {"toy": {"data": "d", "values": values}}
    rows = [{"row": "compressed", "items": items([True] * 8)}, {"row": "idp, every, logits", "items": items([True] * 6 + [False] * 2)},
            {"row": "idp, first, logits", "items": items([False] + [True] * 7)}]
    lines = readings.tests_table(rows).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| idp, every, logits | idp, first, logits | toy | 8 | 0.750 | 0.875 |")
    assert lines[2].endswith("| 1 / 2 |")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "run"
    readings.main(["--steps", "2", "--limit", "6", "--eval-chunks", "6", "--prompt-lengths", "2,4", "--out", str(out)])
    text = capsys.readouterr().out
    names = [row["row"] for row in json.loads((out / "results.json").read_text())["rows"]]
    parts = ["prompt 1 alone (2 tokens)", "prompt 2 alone (4 tokens)"]
    assert names == ["dense", "compressed", *parts, *map(readings.row_name, readings.READINGS)]
    assert all(f"| {name} |" in text for name in names) and "| per context | per pair | toy_recall | 6 |" in text
    assert "| toy_recall, " in text and (out / "results.md").read_text() in text
    with pytest.raises(UserError, match="--prompt-lengths 4: one prompt"):
        readings.parse(["--prompt-lengths", "4"])
