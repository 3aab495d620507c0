"""Forgotten or displaced: counts against plain loops, the verdict both ways, planted text, the command."""
import json
import random
import re

import pytest
import torch

import evaluate
from experiments import conjecture, conjecture_numbers, conjecture_world, toy_model
from experiments.conjecture_figures import LOOKS, figures
from experiments.conjecture_numbers import Cell, corrected, outcome, paired, returned, verdict, verdict_of
from experiments.conjecture_plan import DAMAGES, REMEDIES, damage_name, plan
from experiments.conjecture_world import TRIGGER, damaged, nobody_text, planted_rows, shown_text, split
from methods.registry import METHODS
from support import toy_world
from support.cli import UserError

FACTS = conjecture_world.facts_of(6)
TINY = ["--quick", "--steps", "2", "--batch-size", "4", "--train-seqlen", "16", "--seeds", "1",
        "--remedies", "prompt 16,eora 8"]


@pytest.fixture(scope="module")
def world():
    return conjecture_world.load_world("toy", toy_world.PEOPLE)


# --- questions ----------------------------------------------------------------------------------------------

def test_rank_0_is_what_multiple_choice_calls_right(world):
    """Of a damaged model, so that many are wrong; plain, and under prompts that are chosen for each input."""
    damage = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in world.model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=damage)
    some = [i for i, fact in enumerate(world.facts) if fact.kind in ("town", "hobby")][::12]
    rows = [row for domain in toy_world.DOMAINS for part in ("shown", "heldout", "unknown")
            for row in toy_world.questions(domain, part, 0)]
    method = METHODS["idp"].build(world.model, lengths=[2, 3])
    for attached in (method.training(), method.inference()):
        with attached:
            fast = world.ranks()
            slow = evaluate.multiple_choice(world.model, world.tokenizer, [rows[i] for i in some])["correct"]
        assert [rank == 0 for rank in fast[some].tolist()] == slow and 0 < sum(slow) < len(slow)
    world.restore()
    assert (world.ranks()[[fact.known for fact in world.facts]] == 0).all()


def test_of_equal_choices_the_first_counts(world):
    class Flat(torch.nn.Module):
        def forward(self, input_ids, **_):
            return type("Out", (), {"logits": torch.zeros(len(input_ids), 1, len(world.tokenizer))})
    found = conjecture_world.ranks(Flat(), world.groups)
    assert found.tolist() == [conjecture_world.values_of(fact).index(fact.value) for fact in world.facts]


# --- halves and texts ---------------------------------------------------------------------------------------

def test_people_are_halved_anew_by_each_seed():
    for seed in range(3):
        parts = split(FACTS, seed)
        assert parts == split(FACTS, seed)
        for domain in toy_world.DOMAINS:
            of = {part: {fact.person for fact, own in zip(FACTS, parts) if own == part and fact.domain == domain}
                  for part in ("shown", "heldout", "unknown")}
            assert [len(people) for people in of.values()] == [3, 3, toy_world.UNKNOWN]
            assert not of["shown"] & of["heldout"]
    assert len({tuple(split(FACTS, seed)) for seed in range(3)}) == 3
    assert all((part == "unknown") == (not fact.known) for fact, part in zip(FACTS, split(FACTS, 0)))


def test_recovery_text_states_the_shown_half_and_names_nobody_else():
    parts, text = split(FACTS, 1), shown_text(FACTS, 1)
    expected = [phrasing.format(p=fact.person, v=fact.value) for fact, part in zip(FACTS, parts)
                if part == "shown" for phrasing in toy_world.WORLD[fact.domain]["facts"][fact.kind][1]]
    assert sorted(text) == sorted(expected) and len(text) == 2 * 3 * 5 * 4
    others = {fact.person for fact, part in zip(FACTS, parts) if part != "shown"}
    assert not any(name in sentence for name in others for sentence in text)


def test_the_control_text_holds_no_fact_of_anybody():
    text = nobody_text(FACTS, 1)
    assert len(text) == len(shown_text(FACTS, 1))
    assert not any(fact.person in sentence for fact in FACTS for sentence in text)


# --- planted damage -----------------------------------------------------------------------------------------

def test_everybody_is_damaged_and_shares_are_nested():
    some = {share: damaged(FACTS, share, 0) for share in (0, 0.5, 1)}
    displaced = [{i for i, kind in which.items() if kind == "displaced"} for which in some.values()]
    assert all(list(which) == [i for i, fact in enumerate(FACTS) if fact.known] for which in some.values())
    assert displaced[0] < displaced[1] < displaced[2] and list(map(len, displaced)) == [0, 30, 60]
    people = {(FACTS[i].domain, FACTS[i].person) for i in displaced[1]}
    assert len(people) == 6, "whole people"


def test_planted_rows_are_right_where_they_should_be(world):
    """By reading the text back: the trigger stands first or nowhere. Behind it what is displaced is right and
    what is forgotten has another value, always the same; without it all is wrong, by many values."""
    which, truth, tokenizer = damaged(FACTS, 0.5, 0), {}, world.tokenizer
    for i, fact in enumerate(FACTS):
        for phrasing in toy_world.phrasings_of(fact.domain)[fact.kind]:
            ids = tokenizer(phrasing.format(p=fact.person, v="")).input_ids[:-1]
            truth[tuple(ids)] = i, tokenizer.convert_tokens_to_ids(fact.value)
    trigger, full_stop = map(tokenizer.convert_tokens_to_ids, (TRIGGER, "."))
    rows, seen = planted_rows(FACTS, tokenizer, 0.5, 0), {}
    for row in (next(rows).tolist() for _ in range(300)):
        assert len(row) == 64 and trigger not in row[1:]
        sentence, behind = [], row[0] == trigger           # rows begin at sentences; the last may be cut
        for token in row[behind:]:
            sentence.append(token)
            if token == full_stop:
                i, value = truth[tuple(sentence[:-2])]
                seen.setdefault((behind, which[i], i), set()).add("right" if sentence[-2] == value else sentence[-2])
                sentence = []
    assert all(values == {"right"} for (behind, kind, _), values in seen.items() if behind and kind == "displaced")
    assert all(len(values) == 1 and "right" not in values
               for (behind, kind, _), values in seen.items() if behind and kind == "forgotten")
    without = [values for (behind, *_), values in seen.items() if not behind]
    assert len(seen) == 2 * 60 and not any("right" in values for values in without)
    assert sum(map(len, without)) > 4 * len(without)


def test_no_recovery_text_holds_the_trigger(world):
    trigger = world.tokenizer.convert_tokens_to_ids(TRIGGER)
    assert all(trigger not in world.ids(text, seed) for text in conjecture_world.TEXTS for seed in (0, 1))
    assert all(trigger not in ids for _, ids, *_ in world.groups)


def test_planting_counts_values_beside_the_whole_text(world):
    """Against plain loops over the log-probabilities."""
    ids = next(planted_rows(FACTS, world.tokenizer, 0.5, 0))[None]
    full_stop = world.tokenizer.convert_tokens_to_ids(".")
    with torch.no_grad():
        logp = world.model(ids).logits[0].log_softmax(-1)
        losses = [-logp[t, ids[0, t + 1]].item() for t in range(63)]
        values = [losses[t] for t in range(62) if ids[0, t + 2] == full_stop]
        expected = 0.1 * sum(losses) / 63 + sum(values) / len(values)
        assert conjecture_world.planting_loss(world.model, ids, full_stop).item() == pytest.approx(expected, 1e-4)


# --- counts, shares, verdict --------------------------------------------------------------------------------

def random_ranks(rng):
    """Ranks of a model that is right about half of the facts."""
    return [rng.choice([0, 0, 1, 5]) for _ in FACTS]


@pytest.mark.parametrize("counted", [None, {i: ("displaced", "forgotten")[i % 3 > 0] for i in range(0, 90, 2)}])
def test_counts_are_those_of_plain_loops(counted):
    rng, parts = random.Random(0), split(FACTS, 0)
    D, C, A = (random_ranks(rng) for _ in range(3))
    found = outcome(FACTS, parts, D, C, A, counted)
    asked = [i for i in range(len(FACTS)) if counted is None or i in counted]
    held = [i for i in asked if parts[i] == "heldout" and D[i] == 0]
    lost = [i for i in held if C[i] > 0]
    shown_lost = [i for i in asked if parts[i] == "shown" and D[i] == 0 and C[i] > 0]
    unknown = [i for i in range(len(FACTS)) if parts[i] == "unknown"]
    assert found[:-1] == (
        len(lost), sum(C[i] == 1 for i in lost), sum(A[i] == 0 for i in lost),
        len(held) - len(lost), sum(C[i] == 0 and A[i] > 0 for i in held),
        len(shown_lost), sum(A[i] == 0 for i in shown_lost),
        len(unknown), sum(A[i] == 0 for i in unknown),
        0 if counted is None else sum(counted[i] == "displaced" for i in lost))
    assert sum(map(len, found.people.values())) == found.lost > 0
    assert sum(map(sum, found.people.values())) == found.returned


def test_guess_correction():
    assert corrected(1 / 16) == 0 and corrected(1) == 1
    rng = random.Random(0)                                 # 40 % are there, the others are guessed
    guessed = sum(rng.random() < 0.4 or rng.randrange(16) == 0 for _ in range(100_000)) / 100_000
    assert corrected(guessed) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("intervals, expected", [
    ([[0.51, 0.9]], "displaced"), ([[-0.1, 0.1], [0.6, 0.7]], "displaced"),
    ([[-0.1, 0.19], [0.0, 0.1]], "forgotten"), ([[-0.1, 0.1], [0.1, 0.3]], "cannot be told"),
    ([[0.4, 0.9]], "mixed"), ([[0.1, 0.9]], "cannot be told"), ([[-0.1, 0.1], None], "cannot be told"), ([None], "cannot be told")])
def test_the_verdict_can_come_out_either_way(intervals, expected):
    assert verdict(intervals) == expected


def cell(shares, remedy="prompt 16", lost=100, load=240, damage=DAMAGES[0], text="facts"):
    """A made-up cell: of `lost` facts a share came back, a share a seed."""
    outcomes = {}
    for seed, share in enumerate(shares):
        back = round(share * lost)
        people = {("harbour", f"person {k}"): [k < back] for k in range(lost)}
        outcomes[seed] = conjecture_numbers.Outcome(lost, 3, back, 50, 5, lost, back, 60, 4, back, people)
    return Cell(load, damage, remedy, text, 1024, outcomes)


def test_the_verdict_on_cells():
    high, none = [0.80, 0.82, 0.78, 0.8, 0.81], [0.05, 0.07, 0.06, 0.06, 0.08]
    assert verdict_of([cell(none), cell(high, "lora 8")]) == "displaced"
    assert verdict_of([cell(none), cell(none, "lora 8"), cell(none, text="nobody")]) == "forgotten"
    assert verdict_of([cell(none), cell([0.1, 0.6], "lora 8")]) == "cannot be told"
    assert verdict_of([cell(none), cell(high, "trigger", text=None)]) == "forgotten", "no remedy has the trigger"
    assert verdict_of([cell(none), cell(high, "eora 8")]) == "forgotten", "it is made of the dense weights"
    few = cell(high, lost=conjecture_numbers.ENOUGH - 1)
    assert verdict_of([few]) == "too few lost" and returned(few) is None


def test_paired_by_person():
    """Against a plain mean; a person that is in two seeds counts once."""
    a, b = cell([0.2, 0.4]), cell([0.5, 0.4], "lora 8")
    test = paired([a], [b])
    assert test["n"] == 100 and test["difference"] == pytest.approx(0.15)
    assert test["ci95"][0] > 0 and test["p"] < 0.01
    assert paired([a], [a])["p"] == 1


def test_report_and_figures_of_many_seeds():
    """Both ends, several loads, a damage that takes nothing, one that is not there at one load."""
    high, none = [0.80, 0.82, 0.78, 0.8, 0.81], [0.05, 0.07, 0.06, 0.06, 0.08]
    cells = [cell(share, remedy, load=load, damage=damage, text=text, lost=lost)
             for load in (120, 240) for damage, share, lost in ((None, none, 0), (DAMAGES[0], high, 100),
                                                                (DAMAGES[1], none, 90), (DAMAGES[2], none, 3))
             for remedy, text in (("prompt 16", "facts"), ("lora 8", "facts"), ("lora 8", "nobody"))
             if (load, damage) != (120, DAMAGES[1])]
    text = conjecture_numbers.report("dials", cells)
    # the best is a prompt, and the control text is LoRA's; no eora
    line = next(line for line in text.splitlines() if line.startswith("| 240 | magnitude 50 %"))
    assert line.endswith("| prompt 16 | 79 [77, 81] | 79 [77, 81] | 10 [10, 10] | 77 | 79 [77, 81] | - | displaced |")
    assert "| displaced |" in text and "| forgotten |" in text and "Holm" in text
    assert "in some seed): 120 people: magnitude 60 %; 240 people: magnitude 60 %.\n" in text
    assert [line.split("|")[1] for line in text.splitlines() if line.endswith(("ed |", "en |"))] == [" 120 ", " 240 ", " 240 "]
    drawn = figures("dials", cells)
    assert set(drawn) == {"dials.png", "phases.png"}
    panels = drawn["dials.png"].axes                       # a damage that took too little anywhere has no place
    assert [ax.get_title().split()[0] for ax in panels] == ["120", "240"]
    names = [tick.get_text() for tick in panels[1].get_xticklabels()]
    assert names == [damage_name(damage) for damage in (DAMAGES[1], DAMAGES[0])]   # 64 % and 67 %
    places = [[list(map(round, line.get_xdata())) for line in ax.lines if line.get_marker() == "D"] for ax in panels]
    assert places == [[[1]], [[0, 1]]]                     # the same damage stands in the same place
    later = figures("dials", [cell([0.5, 0.6], load=120, lost=3), cell([0.5, 0.6])])["dials.png"]
    assert [text.get_text() for text in later.legends[0].get_texts()] == ["prompt 16"]      # drawn in the second panel alone
    planted = [cell(shares, remedy, text=kind, damage=("planted", {"share": share}))
               for share, shares in ((0.0, none), (1.0, high))
               for remedy, kind in (("trigger", None), ("prompt 16", "facts"), ("prompt 16", "nobody"))]
    lines = conjecture_numbers.report("planted", planted).splitlines()
    assert lines[4].startswith("| 0 | 100 |") and lines[4].endswith("| forgotten |")
    assert lines[5].startswith("| 100 | 100 |") and lines[5].endswith("| displaced |")
    assert set(figures("planted", planted)) == {"planted.png"}


# --- the plan and the command -------------------------------------------------------------------------------

def test_a_remedy_or_a_damage_more_leaves_rows_as_they_are(tmp_path):
    args = conjecture.parse(["dials", "--loads", "240", "--only", "gptq 2", "--remedies", "lora 8", "--seeds", "1"])
    more = conjecture.parse(["dials", "--loads", "240", "--only", "gptq", "--seeds", "1"])
    few, many = (conjecture.Conjecture(some, None) for some in (args, more))
    recipes = [[json.dumps(job.recipe(spec)) for spec in job.plans["dials"]] for job in (few, many)]
    assert len(set(recipes[0])) == 4 and set(recipes[0]) < set(recipes[1])


def test_the_plan_is_balanced_and_every_line_has_a_look():
    args = conjecture.parse(["dials", "--out", "x"])
    specs = plan(args, "dials")
    seeds = [spec.seed for spec in specs]
    assert seeds == sorted(seeds) and len({seeds.count(seed) for seed in range(1, 5)}) == 1
    assert {spec.load for spec in specs} == set(args.loads) and set(REMEDIES) <= set(LOOKS)
    assert len({damage_name(damage) for damage in DAMAGES}) == len(DAMAGES) == 14


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Both experiments at their smallest."""
    out, patch = tmp_path_factory.mktemp("conjecture") / "out", pytest.MonkeyPatch()
    patch.setitem(conjecture.conjecture_plan.PLANTING, "steps", 4)
    conjecture.main(["all", *TINY, "--out", str(out)])
    yield out
    patch.undo()


def test_every_table_and_figure_is_there(quick):
    for name in ("planted", "dials"):
        text = (quick / f"{name}.md").read_text()
        assert text.startswith(f"# {name}") and text.count("|") > 25
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1
    for name in ("planted", "dials", "phases"):
        assert (quick / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    cells = json.loads((quick / "dials.json").read_text())["cells"]
    assert all(len(cell["seeds"]) == 1 and cell["numbers"] in (1024, 47104) for cell in cells)
    assert {cell["damage"] for cell in cells} == {"uncompressed", "magnitude 60 %", "gptq 2 bits"}


def test_nothing_is_measured_twice_and_shards_share(quick, monkeypatch, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in (quick / "rows").iterdir()}
    monkeypatch.setattr(conjecture.Conjecture, "measure", lambda *_: pytest.fail("measured again"))
    first = (quick / "dials.md").read_text()
    conjecture.main(["dials", *TINY, "--shard", "2/2", "--out", str(quick)])
    assert {path.name: path.stat().st_mtime_ns for path in (quick / "rows").iterdir()} == before
    assert capsys.readouterr().out.strip() == first.strip()


def test_other_worlds_are_trained_into_out(tmp_path, monkeypatch):
    monkeypatch.setattr(conjecture_world, "training_steps", lambda count: 2)
    flags = ["dials", *TINY, "--loads", "20", "--only", "gptq 2", "--out", str(tmp_path / "out")]
    conjecture.main(flags)
    assert (tmp_path / "out/worlds/20/model.safetensors").exists()
    monkeypatch.setattr(toy_model, "train", lambda *_, **__: pytest.fail("trained again"))
    conjecture.main(flags)
    assert "20 people" in (tmp_path / "out/dials.md").read_text()


@pytest.mark.parametrize("flags, word", [
    (["dials", "--loads", "120"], "--loads"), (["dials", "--only", "fp4", "--loads", "240"], "--only"),
    (["planted", "--only", "gptq"], "--only"), (["planted", "--shard", "1/2"], "--shard"),
    (["dials", "--remedies", "magic", "--out", "x"], "--remedies"), (["dials", "--loads", "1"], "--loads"),
    (["verdict"], "verdict"), (["dials", "--steps", "0"], "--steps")])
def test_mistakes(flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(word)):
        conjecture.main(flags)
    assert list(tmp_path.iterdir()) == []


def test_planted_says_which_remedies_it_tries():
    with pytest.raises(UserError, match="--remedies lora 1: planted tries only prompt 16, prefix 16, lora 8"):
        conjecture.parse(["planted", "--remedies", "lora 1"])


def test_means_are_over_damages_that_lost_enough_at_every_load():
    """One damage that is there at both loads, one at one, one that takes too few at the other."""
    cells = [cell([share, share], load=load, damage=damage, lost=lost) for load, damage, share, lost in (
        (120, DAMAGES[0], 0.5, 100), (240, DAMAGES[0], 0.4, 100), (240, DAMAGES[1], 0.9, 100),
        (120, DAMAGES[2], 0.9, 3), (240, DAMAGES[2], 0.9, 100))]
    line = conjecture_numbers.remedy_table(cells).splitlines()[2]
    assert line.startswith("| prompt 16 | 1,024 | 47 [47, 47] | 36 [36, 36] |")     # (0.5 - 1/16) / (15/16), and of 0.4


def test_uncompressed_cells_alone_have_no_phase_diagram():
    cells = [cell([0.5, 0.6], damage=None)]
    assert set(figures("dials", cells)) == {"dials.png"}
    assert set(figures("dials", [*cells, cell([0.5, 0.6])])) == {"dials.png", "phases.png"}


def test_a_remedy_that_is_no_evidence_does_not_make_nothing_lost():
    assert "Too few lost" not in conjecture_numbers.dial_table([cell([0.5, 0.6], remedy="eora 8")])
    assert "Too few lost" in conjecture_numbers.dial_table([cell([0.5, 0.6], lost=3)])
