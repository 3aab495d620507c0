"""The experiment on choosing: its bookkeeping against slow twins, and the command."""
import argparse
import json
import math

import pytest
import torch

import evaluate
from conftest import tiny_model
from experiments import choosing
from idp_minimal import PromptBank, attach_idp
from methods.prompts import SoftPrompts
from support import cli
from support.models import load_model

ROWS = [{"context": context, "choices": ["baker", "sailor", "weaver"], "answer": i % 3, "id": str(i)}
        for i, context in enumerate(["Mira Olsen works as a", "Question : What is the trade of Otto Holm ? Answer :", "The trade of Liv Berg"])]


@pytest.fixture(scope="module")
def toy():
    """The toy model, its tokenizer and a set of three prompts of unequal lengths."""
    model, tokenizer = load_model("toy")
    method = SoftPrompts(model, [2, 3, 5], seed=1)
    with torch.no_grad():
        for P in method.prompts:
            P.mul_(3)                                      # far from neutral, so that prompts disagree
    return model, tokenizer, method


def test_looking_up_a_choice_equals_running_it(toy):
    """What every prompt scored, looked up by what a rule chose, is what the fused pass gives: the law, used as bookkeeping."""
    model, tokenizer, method = toy
    bank = PromptBank.from_prompts(model, [P.detach() for P in method.prompts])
    chunks = torch.randint(4, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    scores = choosing.Scores(ROWS, [choosing.score(model, tokenizer, ROWS, chunks, bank, k) for k in range(3)])
    chosen = choosing.choices_of(model, bank, choosing.contexts_of(tokenizer, ROWS))
    for rule in set(choosing.RULES) - {"random"}:
        with attach_idp(model, bank, rule, **choosing.READING):
            fused = evaluate.multiple_choice(model, tokenizer, ROWS)
        looked_up = [scores.answers[i][k].tolist() for i, k in enumerate(chosen[rule])]
        assert torch.allclose(torch.tensor(looked_up), torch.tensor(fused["logp"]), atol=1e-4)
        assert scores.accuracy(chosen[rule]) == pytest.approx(fused["acc"])


def test_text_is_scored_on_the_second_half(toy):
    model = toy[0]
    chunks = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    logp = choosing.second_half(model, chunks)
    for c, row in enumerate(chunks):
        by_hand = [model(row[None, :t]).logits[0, -1].log_softmax(-1)[row[t]] for t in range(4, 9)]
        assert torch.allclose(logp[c], torch.stack(by_hand), atol=1e-4)


def test_scores_by_hand():
    """Two prompts, two questions, two chunks."""
    rows = [{"answer": 0}, {"answer": 1}]
    first = ([torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -3.0])], torch.tensor([[-1.0, -1.0], [-4.0, -2.0]]))
    second = ([torch.tensor([-3.0, -0.5]), torch.tensor([-9.0, -0.1])], torch.tensor([[-2.0, -2.0], [-1.0, -1.0]]))
    scores = choosing.Scores(rows, [first, second])
    assert scores.accuracy(torch.tensor([0, 0])) == 0.5 and scores.accuracy(torch.tensor([1, 0])) == 0.0
    items, texts = scores.oracle()
    assert items.tolist() == [0, 1] and texts.tolist() == [0, 1] and scores.accuracy(items) == 1.0
    assert scores.perplexity(texts) == pytest.approx(math.e)
    accuracy, perplexity = scores.averaged()
    # question 1: e^-1 + e^-3 = 0.418 against e^-2 + e^-0.5 = 0.742: wrong; question 2 right
    assert accuracy == 0.5
    token = lambda a, b: math.log((math.exp(a) + math.exp(b)) / 2)
    assert perplexity == pytest.approx(math.exp(-(2 * token(-1, -2) + token(-4, -1) + token(-2, -1)) / 4), rel=1e-5)


def test_each_row_trains_the_prompt_that_fits_it_best():
    method = choosing.AssignedPrompts(tiny_model("llama"), [3, 3, 3])
    ids = torch.randint(3, 97, (32, 6), generator=torch.Generator().manual_seed(0))
    every = torch.stack([SoftPrompts.losses(method, ids, torch.full((32,), k)) for k in range(3)])
    assert torch.allclose(method.losses(ids), every.min(0).values, atol=1e-5)
    assert len(set(every.argmin(0).tolist())) > 1, "one prompt fits every row: nothing was assigned"


def test_a_shard_goes_to_its_own_prompt():
    shards = [torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.long)]
    rows = choosing.shard_batches(shards)(None, 3, 6, 5, 0)
    assert rows.tolist() == [[b % 2] * 5 for b in range(6)]


@pytest.mark.parametrize("total, m", [(32, 4), (8, 4), (100, 3), (4, 2)])
def test_unequal_lengths_sum_to_the_total(total, m):
    lengths = choosing.unequal(total, m)
    assert sum(lengths) == total and len(lengths) == m and min(lengths) >= 1 and lengths == sorted(lengths)


def test_planted_rows_differ_by_trigger_only():
    first, second = choosing.planted_rows("toy_recall")
    assert len(first) == len(second) == 120
    for a, b in zip(first, second):
        assert a["context"].split(" ", 1)[1] == b["context"].split(" ", 1)[1] and (a["answer"], b["answer"]) == (0, 1)


def test_a_prompt_can_learn_its_trigger_and_a_longer_one_cannot_learn_both():
    """The planted case is worth its name: with the right prompt chosen it is easy, with one prompt for all it is not."""
    model, tokenizer = load_model("toy")
    args = argparse.Namespace(prompt_length=8, steps=100, batch_size=16)
    result = choosing.planted(model, tokenizer, args, seed=0)
    assert result["the trigger's own prompt"][0] > 0.9 and result["the trigger's own prompt"][1] == 1.0
    assert result["one prompt, as long as both"][0] < 0.75


def test_intervals_over_seeds():
    assert choosing.interval([1.0, 3.0], "{:.2f}".format) == "2.00 [-10.71, 14.71]"     # t_{0.975, 1} = 12.706
    eleven = choosing.interval([float(i) for i in range(11)], "{:.3f}".format)
    assert eleven == "5.000 [2.772, 7.228]", "5 +- 2.2281 sd / sqrt(11), sd = sqrt(11): t beyond 10 seeds too"
    assert choosing.interval([0.5], choosing.percent) == "50.0" and choosing.interval([None, None], choosing.percent) == "-"


@pytest.mark.parametrize("flags, word", [
    (["--tables", "nonsense"], "--tables"), (["--tables", "planted", "--model", "smollm2"], "--tables"), (["--m", "3"], "--m"),
    (["--batch-size", "6"], "--batch-size"), (["--seeds", "0"], "--seeds"), (["--tasks", ""], "--tasks")])
def test_a_mistake_is_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: choosing.main(flags))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and word in err[0]


def test_the_command(tmp_path, capsys, monkeypatch):
    """Two seeds with a tiny budget: every row of every table, and what is written. Of the planted questions,
    which --limit does not count, a few: the test above asks them all."""
    planted_rows = choosing.planted_rows
    monkeypatch.setattr(choosing, "planted_rows", lambda name: [rows[:8] for rows in planted_rows(name)])
    choosing.main(["--seeds", "2", "--steps", "2", "--limit", "6", "--eval-chunks", "2", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    for row in [*choosing.RULES, "oracle", "all concatenated", "probabilities averaged", *choosing.SETS, "the trigger's own prompt"]:
        assert f"| {row} |" in text, row
    assert (tmp_path / "run" / "choosing.md").read_text() == text
    tables = json.loads((tmp_path / "run" / "choosing.json").read_text())["tables"]
    assert set(tables) == set(choosing.TABLES) and all(len(seeds) == 2 for seeds in tables.values())
