"""The paper's tables and figures: rows, statistics by hand, restarts, shards, the paper's recipe."""
import argparse
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, OPTConfig

import compress
import recover
from conftest import tiny_model
from experiments import fidelity, reproduce, reproduce_figures as figures, reproduce_plan as plans
from experiments.fidelity import Reference, cosines, flips, token_kl
from experiments.reproduce_figures import Line, columns_of, domain_of, mean_accuracy, paired
from experiments.reproduce_plan import PAPER, PLANS, Plan, Spec, part_names, scaled, sizes_for
from methods.lora import LoRA
from methods.prompts import Prefix, SoftPrompts
from support.cli import UserError
from support.output import claim
from support.uncertainty import mcnemar, mean_ci95, paired_interval, sign_flip, wilson

IDS = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(0))
TINY = ["--limit", "2", "--steps", "1", "--batch-size", "2", "--nsamples", "1", "--eval-seqlen", "16",
        "--seqlen", "16", "--train-seqlen", "16"]
DENSE = ["dense", "compressed"]
REMEDIES = [*(f"{name}, rank {r}" for name in ("lora", "eora") for r in (1, 2, 3)), *(f"prompt, {n} tokens" for n in (4, 8, 16)),
            *(f"prefix, {n} tokens" for n in (2, 4, 8)), "idp, 8+16 tokens"]
PAIR = [f"idp, 8+16 tokens: {part}"
        for part in ("prompt 1 alone (8 tokens)", "prompt 2 alone (16 tokens)", "concatenated")]


def result(out, name):
    """A table's JSON file."""
    return json.loads((out / f"{name}.json").read_text())


def labels(out, name):
    """The row names of a table, in order."""
    return [row["row"] for row in result(out, name)["rows"]]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """`all` on the toy with hardly any work."""
    out = tmp_path_factory.mktemp("paper") / "out"
    reproduce.main(["all", *TINY, "--tasks", "toy_recall", "--out", str(out)])
    return out


# --- rows and columns ---------------------------------------------------------------------------------------

def test_rows_of_every_table(everything):
    assert labels(everything, "table1") == labels(everything, "table2") == [*DENSE, *REMEDIES]
    assert labels(everything, "table3") == [*DENSE, *PAIR, "idp, 8+16 tokens"]
    assert labels(everything, "fig3") == [*DENSE, *(f"prompt, {n} tokens" for n in (2, 4, 8, 16, 32))]
    assert labels(everything, "fig5") == labels(everything, "fig6") == [
        *DENSE, "lora, rank 3", "prompt, 16 tokens", "prefix, 8 tokens", "idp, 8+16 tokens"]
    fig2 = labels(everything, "fig2")
    assert fig2[:4:3] == ["dense", "rtn 3 bits, group 64"] and fig2[18:] == ["sparsegpt 70 %"]
    assert [row for row in labels(everything, "fig7") if ":" not in row] == [
        *DENSE, "idp, 2+4 tokens", "idp, 4+8 tokens", "idp, 8+16 tokens", "idp, 16+32 tokens"]


def test_tables_differ_in_compression_and_share_the_rest(everything):
    names = ("table1", "table2")
    one, two = ({row["row"]: row for row in result(everything, name)["rows"]} for name in names)
    assert one["dense"]["seeds"] == two["dense"]["seeds"], "measured once"
    assert one["compressed"]["seeds"][0]["compression"]["compressor"] == "gptq"
    assert one["compressed"]["seeds"][0]["compression"]["settings"]["bits"] == 3
    assert two["compressed"]["seeds"][0]["compression"]["settings"]["sparsity"] == 0.5
    assert two["lora, rank 3"]["parameters"] == 3 * two["lora, rank 1"]["parameters"]
    assert len(list((everything / "rows").iterdir())) == 65, "one file a row, shared by the tables"


def test_columns_of_a_table(everything):
    head = (everything / "table1.md").read_text().splitlines()[2]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "row", "parameters", "ppl", "toy_recall %", "lost / gained", "KL (nats)",
        "against compressed, points", "against LoRA, points"]
    row = result(everything, "table1")["rows"][3]
    assert set(row["tests"]) == {"compressed", "LoRA"} and set(row["flips"]) == {"lost", "gained"}
    assert row["seeds"][0]["kl"] > 0 and len(row["seeds"][0]["cosine"]["attention"]["layers"]) == 4
    tests = [set(row["tests"]) for row in result(everything, "table3")["rows"]]
    assert tests == [set(), set(), *[{"compressed"}] * 2, *[{"compressed", "small", "large"}] * 2]
    trainings = [row["seeds"][0].get("training") for row in result(everything, "table1")["rows"][2:]]
    assert [training and training["lr"] for training in trainings] == [0.001] * 3 + [None] * 3 + [0.1] * 7
    caption = " ".join(result(everything, "table1")["caption"])
    assert "IDP 8 16" in caption and "sqrt(64 / 4096)" in caption and "1 steps of 2 x 16 tokens" in caption


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("fig")])
def test_every_figure_is_a_picture_with_its_numbers(everything, name):
    assert (everything / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (everything / f"{name}.md").read_text().count("|") > 30


def test_every_line_of_a_table_has_as_many_cells(everything):
    for path in everything.glob("*.md"):
        for block in path.read_text().split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1, path


# --- restarts and shards ------------------------------------------------------------------------------------

@pytest.fixture
def measured(monkeypatch):
    """The names of rows in the order in which they are measured."""
    names, measure = [], recover.Run.measure

    def noted(job, name, *args, **kwargs):
        names.append(name)
        measure(job, name, *args, **kwargs)
    monkeypatch.setattr(recover.Run, "measure", noted)
    return names


def test_nothing_is_measured_twice(tmp_path, measured):
    flags = ["table3", *TINY, "--tasks", "toy_recall", "--out", str(tmp_path / "out")]
    reproduce.main(flags)
    assert measured == [*DENSE, *PAIR, "idp, 8+16 tokens"]
    first = result(tmp_path / "out", "table3")["rows"]
    reproduce.main(flags)
    assert len(measured) == 6 and result(tmp_path / "out", "table3")["rows"] == first
    reproduce.main([*flags, "--lr", "0.02"])
    assert measured[6:] == [*PAIR, "idp, 8+16 tokens"], "another rate leaves dense and compressed as they are"
    reproduce.main([*flags, "--loss", "distill"])
    distilled = [row.replace("tokens", "tokens, distill", 1) for row in [*PAIR, "idp, 8+16 tokens"]]
    assert measured[10:] == distilled and labels(tmp_path / "out", "table3") == [*DENSE, *distilled]
    assert "--loss distill" in (tmp_path / "out" / "table3.md").read_text()


def test_the_loss_decides_rows_that_are_trained_and_no_others():
    """Rows of text have the digests that they had before there was another loss: no word of it is in them."""
    text, distill = (reproduce.Reproduction(reproduce.parse(["table1", *TINY, "--loss", loss]), None)
                     for loss in ("text", "distill"))
    pairs = list(zip(text.entries["table1"], distill.entries["table1"], strict=True))
    for one, other in pairs:
        name = one.label.split(",")[0]
        trained, recipe = name not in (*DENSE, "eora"), text.recipe(one.specs[0])
        assert (text.recipe(other.specs[0]) == recipe) and "loss" not in recipe
        assert distill.recipe(other.specs[0]) == ({**recipe, "loss": "distill"} if trained else recipe)
        assert other.label == one.label + ", distill" * trained and ("lr" in recipe) == trained
    assert len(pairs) == 15


def test_it_goes_on_within_the_rows_of_one_training(tmp_path, measured, monkeypatch):
    flags = ["table3", *TINY, "--tasks", "", "--out", str(tmp_path / "out")]
    keep = reproduce.Reproduction.keep
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def cut_off(job, spec, part, *args):
            if part == "concatenated":
                raise KeyboardInterrupt
            keep(job, spec, part, *args)
        patch.setattr(reproduce.Reproduction, "keep", cut_off)
        reproduce.main(flags)
    assert not (tmp_path / "out" / "table3.md").exists()
    reproduce.main(flags)
    assert measured == [*DENSE, *PAIR, "idp, 8+16 tokens"]


def test_shards_together_are_the_whole(tmp_path, capsys):
    """In any order: the last leaves the same table as one command, the others say what lacks."""
    flags = ["table3", *TINY, "--tasks", "toy_recall"]
    reproduce.main([*flags, "--out", str(tmp_path / "whole")])
    parts = ["--out", str(tmp_path / "parts")]
    reproduce.main([*flags, "--shard", "3/3", *parts])
    assert labels(tmp_path / "parts", "table3") == [*PAIR, "idp, 8+16 tokens"]
    assert "Not there yet: dense; compressed." in (tmp_path / "parts" / "table3.md").read_text()
    for shard in ("1/3", "2/3"):
        reproduce.main([*flags, "--shard", shard, *parts])
    assert "Not there yet" not in (tmp_path / "parts" / "table3.md").read_text()
    whole, together = (result(tmp_path / name, "table3") for name in ("whole", "parts"))
    for table in (whole, together):
        for row in (row for line in table["rows"] for row in line["seeds"]):
            row.get("training", {}).pop("seconds", None)
            row.get("compression", {}).pop("seconds", None)
    assert whole["rows"] == together["rows"] and whole["caption"] == together["caption"]
    assert {path.name for path in (tmp_path / "whole" / "rows").iterdir()} == {
        path.name for path in (tmp_path / "parts" / "rows").iterdir()}
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not hidden, "no lock and no temporary folder stays"


def test_shards_hold_locks_of_their_own(tmp_path):
    out = str(tmp_path / "out")
    part = lambda name: claim(out, rows=True, part=name)
    with part("1-of-2") as one, part("2-of-2") as two:
        with pytest.raises(UserError, match="another run is writing there"), part("2-of-2"):
            pass
        one.json("rows/a.json", {})
        two.json("rows/b.json", {})
    assert sorted(path.name for path in (tmp_path / "out" / "rows").iterdir()) == ["a.json", "b.json"]


def test_a_row_that_another_shard_adds_meanwhile_is_in_the_last_table(tmp_path, monkeypatch):
    flags = ["table3", *TINY, "--tasks", "", "--out", str(tmp_path / "out")]
    reproduce.main(flags)
    answers = [["idp"], [], [], []]                        # one lacks; when the table is written, none
    monkeypatch.setattr(reproduce.Reproduction, "absent", lambda job, name: answers.pop(0))
    reproduce.main(flags)
    assert "Not there yet" not in (tmp_path / "out" / "table3.md").read_text()


def test_several_seeds(tmp_path):
    reproduce.main(["fig3", *TINY, "--tasks", "toy_recall", "--seeds", "2", "--out", str(tmp_path / "out")])
    rows = {row["row"]: row for row in result(tmp_path / "out", "fig3")["rows"]}
    prompt = rows["prompt, 8 tokens"]
    assert [len(rows[name]["seeds"]) for name in DENSE] == [1, 1] and len(prompt["seeds"]) == 2
    values = [row["tasks"]["toy_recall"]["acc"] for row in prompt["seeds"]]
    assert prompt["columns"]["toy_recall"] == {"mean": sum(values) / 2, "ci95": mean_ci95(values)}
    assert prompt["seeds"][0]["ppl"] != prompt["seeds"][1]["ppl"]


# --- fidelity -----------------------------------------------------------------------------------------------

def longhand_kl(model, other, ids, seqlen, context):
    """KL of each chunk, a token at a time, in float64, straight from its definition."""
    chunks = []
    for ids in ids[:len(ids) // seqlen * seqlen].view(-1, seqlen):
        P, Q = (m(ids[None]).logits[0].double().softmax(-1) for m in (model, other))             # (T, V)
        tokens = range(max(context, 1) - 1, seqlen - 1)
        chunks.append(sum(float((P[t] * (P[t] / Q[t]).log()).sum()) for t in tokens) / len(tokens))
    return chunks


@pytest.mark.parametrize("context", [0, 3, 11])
def test_kl_is_its_definition(context):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    reference = Reference(model, IDS, 12, context)
    assert reference.mean_kl(model).abs().max() == 0, "of a model with itself"
    expected = longhand_kl(model, other, IDS, 12, context)
    assert reference.mean_kl(other).tolist() == pytest.approx(expected, rel=1e-4)


def test_kl_in_pieces_and_in_half_precision():
    dense, logits = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    # PyTorch's arguments: log q, p
    expected = F.kl_div(logits.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(token_kl(dense, logits, tokens=3), expected, atol=1e-6)
    assert token_kl(dense.half(), dense.half()).abs().max() == 0


def test_dense_logits_keep_within_memory(monkeypatch):
    monkeypatch.setattr(fidelity, "KL_BYTES", 2 * 9 * 97 * 4 + 5)
    reference = Reference(tiny_model("llama"), IDS, 12, 3)
    assert sum(len(part) for part in reference.logits) == 2 and reference.logits[0].shape[1:] == (9, 97)


def test_cosines_by_hand():
    X_dense = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])       # the first token does not count
    X = torch.tensor([[[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]])             # cosines 0 and 1
    A_dense = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.6, 0.8, 0]])[None, None]
    # one prompt column
    A = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0.1, 0.1, 0], [0.5, 0.4, 0.3, 0]])[None, None]
    assert cosines(A, X, A_dense, X_dense) == pytest.approx(((1 + (0.24 + 0.24) / 0.5) / 2, 0.5))


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_the_dense_model_is_itself(arch):
    model = tiny_model(arch)
    reference = Reference(model, IDS, 12, 3)
    assert torch.allclose(reference.likeness(model), torch.ones(5, 3, 2), atol=1e-5)
    untrained = LoRA(model, r=2)
    with untrained.inference() as attached:
        row = reference.compare(model, attached)
    assert row["kl"] == pytest.approx(0, abs=1e-9)
    assert row["cosine"]["activations"]["mean"] == pytest.approx(1, abs=1e-5)
    for method in (SoftPrompts(model, [2, 4]), Prefix(model, 3)):
        with method.inference() as attached:
            row = reference.compare(model, attached)
        assert row["kl"] > 0.01 and row["cosine"]["attention"]["mean"] < 0.9999
        if arch == "llama":                                # OPT's positions are learned: a prompt moves them
            first = row["cosine"]["attention"]["layers"][0]
            assert first == pytest.approx(1, abs=1e-4), "queries and keys of layer 1 know no prompt"
    assert (row["kl_chunks"], row["cosine"]["chunks"]) == (5, 5)


# --- statistics ---------------------------------------------------------------------------------------------

def line(*rows, label="prompt", method="prompt"):
    """A line out of {task: [right or wrong]}, one a seed."""
    rows = [{"tasks": {name: {"acc": sum(x) / len(x), "n": len(x)} for name, x in row.items()},
             "items": {name: {"values": x} for name, x in row.items()}} for row in rows]
    return Line(label, Spec(("gptq", {}), method), None, rows)


def test_flips_by_hand():
    assert flips([True, True, False, False, True], [True, False, True, False, False]) == (2, 1)
    dense = line({"sciq": [True, True], "toy_unknown": [True]})
    other = line({"sciq": [False, True], "toy_unknown": [False]},
                 {"sciq": [False, False], "toy_unknown": [True]})
    assert figures.mean_flips(other, dense) == (1.5, 0), "means over seeds; the control does not count"


def test_domains_of_the_paper():
    assert len(reproduce.NINE.split(",")) == 9
    tasks = ("sciq", "sciq_closed", "piqa", "lambada", "toy_recall", "sciqx")
    assert list(map(domain_of, tasks)) == ["World", "World", "Common", "Language", "toy_recall", "sciqx"]
    columns = columns_of(["mine", *reproduce.NINE.split(",")])
    assert list(columns) == ["World", "Common", "Language", "Average", "mine"]
    assert [len(tasks) for tasks in columns.values()] == [5, 1, 3, 9, 1]
    assert list(columns_of(["toy_recall", "toy_unknown"])) == ["toy_recall", "toy_unknown"]
    several = (["mine", "sciq"], ["mine"], [])
    assert list(map(figures.headline, several)) == ["Average", "mine", None]


def test_the_mean_of_tasks_has_wilsons_interval_when_it_is_one():
    row = line({"a": [True] * 3 + [False], "b": [False] * 5}).rows[0]
    mean, ends = mean_accuracy(row, ["a"])
    assert mean == 0.75 and ends == pytest.approx(wilson(3, 4))
    mean, ends = mean_accuracy(row, ["a", "b"])
    low, high = (math.hypot(*(wilson(k, n)[i] - k / n for k, n in ((3, 4), (0, 5)))) / 2 for i in (0, 1))
    assert mean == 0.375 and ends == pytest.approx([mean - low, mean + high])


def test_paired_tests():
    old, new = [True, False] * 8, [True, True] * 7 + [False, False]
    found = paired(line({"a": new[:9], "b": new[9:]}), line({"a": old[:9], "b": old[9:]}))
    assert found == {"n": 16, "difference": pytest.approx(6 / 16), "ci95": list(paired_interval(old, new)),
                     "p": mcnemar(old, new)}
    again = [True] * 16
    found = paired(line({"a": new}, {"a": again}), line({"a": old}))       # two seeds, one base
    each = [(n + m) / 2 - o for n, m, o in zip(new, again, old)]
    assert found["difference"] == pytest.approx((6 + 8) / 32) and found["p"] == sign_flip(each)
    assert found["ci95"] == mean_ci95(each)


def test_intervals_over_seeds_stay_within_what_a_share_can_be():
    a, b = {"a": [True] * 4}, {"a": [True, True, False, False]}
    assert figures.accuracy(line(a, b), ["a"]) == (0.75, [0, 1])
    assert figures.accuracy(line(a), ["a"])[1] == pytest.approx(wilson(4, 4))


def test_one_seed_or_many_the_test_is_the_same():
    """A sign-flip test of right and wrong is the exact McNemar test."""
    old, new = [True, False] * 7, [True, True] * 6 + [False, False]
    assert sign_flip([n - o for n, o in zip(new, old)]) == pytest.approx(mcnemar(old, new))


def test_against_lora_is_the_largest_rank():
    names = ("compressed", "lora, rank 1", "lora, rank 3", "idp, 1+2 tokens")
    lines = [line({"a": [True]}, label=label) for label in names]
    assert figures.bases(lines)["LoRA"].label == "lora, rank 3"
    assert set(figures.tests_of(lines[3], lines)) == {"compressed", "LoRA"}
    assert set(figures.tests_of(lines[2], lines)) == {"compressed"}


# --- the paper's recipe [§3.3] ------------------------------------------------------------------------------

def test_the_paper_recipe_is_what_the_paper_states():
    args = reproduce.parse(["table1", "--recipe", "paper"])
    assert (args.lr, args.weight_decay) == (2e-4, 1e-5)
    assert args.steps * args.batch_size * args.train_seqlen == 40_960_000
    assert (args.bits, args.sparsity, args.compressor) == (3, 0.5, None)
    plan = Plan(args, tiny_model("llama"))
    assert plan.sizes == PAPER == ((25, 50, 100), (12, 25, 50), (2, 3, 4), (50, 100))
    assert plan.compression("gptq")[1]["bits"] == 3 and plan.compression("sparsegpt")[1]["sparsity"] == 0.5
    assert [entry.label for entry in PLANS["table1"](plan)][2:] == [
        *(f"{name}, rank {r}" for name in ("lora", "eora") for r in (2, 3, 4)),
        *(f"prompt, {n} tokens" for n in (25, 50, 100)),
        *(f"prefix, {n} tokens" for n in (12, 25, 50)), "idp, 50+100 tokens"]
    typed = reproduce.parse(["table1", "--recipe", "paper", "--steps", "7", "--lr", "0.1"])
    assert (typed.lr, typed.steps, typed.weight_decay) == (0.1, 7, 1e-5)
    words = reproduce.recipe_in_words(argparse.Namespace(args=typed))
    assert "--lr 0.1 instead of 0.0002, --steps 7 instead of 40000. The paper leaves open" in words
    assert reproduce.parse(["table1"]).weight_decay == 0


def test_sizes_go_with_the_width():
    assert sizes_for(4096, False) == sizes_for(64, True) == PAPER
    assert sizes_for(64, False) == ((4, 8, 16), (2, 4, 8), (1, 2, 3), (8, 16))               # the toy
    assert sizes_for(576, False) == ((8, 16, 32), (4, 8, 16), (1, 2, 3), (16, 32))           # SmolLM2
    assert scaled(1, 1) == 1


def test_lora_on_every_linear_has_the_papers_parameters():
    """OPT-6.7b, shapes alone: 4.7, 7.1, 9.4 million at ranks 2, 3, 4; prompts and prefixes as printed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OPTConfig(
            hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, num_attention_heads=32,
            word_embed_proj_dim=4096))
    plan = Plan(reproduce.parse(["table1", "--recipe", "paper"]), model)
    counts = [sum(t.numel() for t in LoRA(model, **entry.specs[0].settings).tensors().values())
              for entry in PLANS["table1"](plan) if entry.label.startswith("lora")]
    assert counts == [4_718_592, 7_077_888, 9_437_184]
    assert len(plan.targets) == 6
    tokens = (*plan.sizes.prompts, sum(plan.sizes.idp))
    assert [round(n * 4096 / 1e6, 1) for n in tokens] == [0.1, 0.2, 0.4, 0.6]
    assert [round(n * 32 * 2 * 4096 / 1e6, 1) for n in plan.sizes.prefixes] == [3.1, 6.6, 13.1]
    assert plan.columns() == 300


def test_parts_are_named_as_the_prompts_name_them():
    assert list(SoftPrompts(tiny_model("llama"), [2, 4]).parts()) == part_names([2, 4])[:-1]


def test_weight_decay_shrinks_what_is_trained():
    norms = []
    for decay in (0.0, 0.5):
        method = SoftPrompts(tiny_model("llama"), [3])
        recover.train(method, IDS, 4, 2, 8, 1e-1, quiet=True, weight_decay=decay)
        norms.append(method.prompts[0].norm().item())
    assert norms[1] < norms[0] and "weight_decay" in recover.TRAINING_FLAGS


# --- mistakes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, word", [
    (["table9"], "invalid choice"), ([], "name"), (["table1", "--shard", "1/2"], "--shard 1/2: needs --out"),
    (["table1", "--shard", "3/2", "--out", "x"], "--shard 3/2.*I/N"),
    (["table1", "--shard", "0/2", "--out", "x"], "--shard 0/2.*I/N"),
    (["table1", "--shard", "x", "--out", "x"], "--shard x"),
    (["table1", "--sparsity", "0.4"], "--sparsity 0.4: gptq has no such setting"),
    (["table2", "--bits", "2"], "--bits 2: sparsegpt has no such setting"),
    (["fig2", "--steps", "3"], "--steps 3: fig2 takes no such flag"),
    (["table3", "--alpha", "3"], "--alpha 3.0: table3 takes no such flag"),
    (["all", "--compressor", "rtn"], "--compressor rtn: all takes no such flag"),
    (["table1", "--recipe", "ours"], "--recipe ours"), (["table1", "--method", "lora"], "unrecognized"),
    (["table1", "--weight-decay", "2"], "--weight-decay 2"),
    (["table1", "--batch-size", "5", "--accumulate", "2"], "--batch-size 5")])
def test_mistakes_are_named_before_any_work(flags, word):
    with pytest.raises(UserError, match=word):
        reproduce.parse(flags)


def test_a_compressed_model_is_refused(tmp_path):
    compress.main(["--compressor", "rtn", "--nsamples", "1", "--seqlen", "16", "--out", str(tmp_path / "m")])
    with pytest.raises(UserError, match="is compressed already"):
        reproduce.main(["table3", *TINY, "--model", str(tmp_path / "m")])


def test_flags_of_one_compressor_serve_the_tables():
    args = reproduce.parse(["table1", "--compressor", "magnitude"])
    found = Plan(args, tiny_model("llama")).compression("gptq")
    assert found == ("magnitude", {"sparsity": 0.6}), "the toy's own"
    assert reproduce.parse(["table2", "--sparsity", "0.7"]).sparsity == 0.7
    assert reproduce.parse(["table1", "--model", "a/b"]).tasks == reproduce.NINE
    args = reproduce.parse(["fig2", "--group-size", "32"])
    assert plans.own_settings(args, "rtn", bits=8)[1]["group_size"] == 32
