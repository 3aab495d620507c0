"""Measures by hand, prompt columns treated apart, and the command on runs that recover.py wrote."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import compress
from conftest import tiny_model
from experiments import patterns
from idp_minimal import PromptBank, attach_idp
from methods.lora import LoRA
from methods.prompts import SoftPrompts
from support.cli import UserError
from support.data import load_text
from support.output import write_json
from support.architectures import blocks_of
from support.models import load_model
from experiments.patterns import MEASURES, jensen_shannon, layer_measures, look, look_at_dense, measure, split_prompt

IDS = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(0))


def test_jensen_shannon_by_hand():
    P, Q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    M = [0.75, 0.25]                                       # third row: H(M) - (H(P) + H(Q)) / 2 with H(P) = 0, H(Q) = 1
    third = -sum(p * math.log2(p) for p in M) - 0.5
    assert jensen_shannon(P, Q).tolist() == pytest.approx([1.0, 0.0, third], abs=1e-6)
    assert torch.equal(jensen_shannon(P, Q), jensen_shannon(Q, P))


def test_split_prompt_by_hand():
    A = torch.tensor([[0.2, 0.3, 0.5, 0.0], [0.1, 0.1, 0.2, 0.6]])[None, None]  # N = 2 prompt columns, T = 2
    real, share = split_prompt(A)
    assert torch.allclose(share[0, 0], torch.tensor([0.5, 0.2]))
    assert torch.allclose(real[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


def test_layer_measures_by_hand():
    X_dense = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])       # the first token does not count
    X = torch.tensor([[[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]]])             # cosines 0 and 1, norms 3 and 1 of the dense ones
    A_dense = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])[None, None]
    A = torch.tensor([[0.9, 0.1, 0, 0], [0.5, 0.25, 0.25, 0], [0.2, 0.6, 0.2, 0]])[None, None]    # one prompt column
    values = layer_measures(A, X, A_dense, X_dense)
    assert values["direction"] == pytest.approx(0.5) and values["norm"] == pytest.approx(2.0)
    assert values["prompt share"] == pytest.approx(0.35) and values["first share"] == pytest.approx((0.25 + 0.6) / 2)
    expected = jensen_shannon(torch.tensor([0.75, 0.25, 0]), torch.tensor([0.2, 0.3, 0.5])) / 2       # the second row is the dense one
    assert values["attention"] == pytest.approx(expected.item(), abs=1e-6)
    content = jensen_shannon(torch.tensor([1.0, 0]), torch.tensor([0.375, 0.625]))              # the third row's last two tokens
    assert values["content"] == pytest.approx(content.item(), abs=1e-6)


def test_a_model_is_no_distance_from_itself(any_model):
    before, reference = any_model.config._attn_implementation, look_at_dense(any_model, IDS)
    hooks = len(blocks_of(any_model)[0]._forward_hooks)          # transformers leaves one of its own for good
    table, losses = measure(any_model, IDS, reference)
    assert set(table) == set(MEASURES) and all(values.shape == (3, 3) for values in table.values())
    assert table["attention"].max() < 1e-6 and table["direction"].abs().max() < 1e-5
    assert torch.allclose(table["norm"], torch.ones(3, 3), atol=1e-5) and (table["prompt share"] == 0).all()
    assert any_model.config._attn_implementation == before and len(blocks_of(any_model)[0]._forward_hooks) == hooks
    logits = any_model(IDS).logits                         # the loss is the ordinary one
    assert sum(losses) / 3 == pytest.approx(F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item(), abs=1e-4)


def test_prompt_columns_stand_first_and_short_prompts_weigh_less():
    """The share of a prompt is what idp_minimal's attention gives its columns; the columns of padding get nothing."""
    model = tiny_model("llama")
    prompts = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (2, 5)]
    bank = PromptBank.from_prompts(model, prompts)
    with attach_idp(model, bank, "fixed", k=0) as idp, patterns.visible_attention(model, idp):
        layers, _ = look(model, IDS[:1])
    A = layers[1][0]
    assert A.shape == (1, 4, 10, 15) and (A[..., :3] == 0).all() and (A[..., 3:5] > 0).all()
    assert torch.allclose(A.sum(-1), torch.ones(1, 4, 10), atol=1e-5)
    with attach_idp(model, bank, "fixed", k=0) as idp:
        table, _ = measure(model, IDS[:1], look_at_dense(tiny_model("llama"), IDS[:1]), idp)
    assert table["prompt share"][0, 1].item() == pytest.approx(A[..., 1:, :5].sum(-1).mean().item(), abs=1e-5)
    assert table["attention"].min() > 0 or table["attention"][0, 1:].min() > 0, "after layer 1 the prompt changes real attention"


def test_attention_of_the_first_layer_differs_by_the_prompt_alone():
    """Layer 1 has no prompt in its queries and keys: without the prompt's share, its attention is the dense model's."""
    model = tiny_model("llama")
    bank = PromptBank.from_prompts(model, [torch.randn(4, 32)])
    reference = look_at_dense(model, IDS)
    with attach_idp(model, bank, "fixed") as idp:
        table, _ = measure(model, IDS, reference, idp)
    assert table["attention"][:, 0].max() < 1e-5 and table["prompt share"].min() > 0


def test_hidden_states_come_from_the_blocks():
    """A change of the final norm moves no hidden state: transformers' own last hidden state would."""
    model = tiny_model("llama")
    reference = look_at_dense(model, IDS)
    model.model.norm.weight.data.mul_(3)
    assert measure(model, IDS, reference)[0]["norm"].max() == pytest.approx(1, abs=1e-4)


# --- runs -----------------------------------------------------------------------------------------------------------------------

SETTINGS = {"model": "toy", "dtype": "float32", "seed": 0, "text": "toy", "nsamples": 2, "seqlen": 32,
            "compression": ["magnitude", {"sparsity": 0.6, "pattern": None}]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two untrained adapters on the toy model, as recover.py --out writes them: RUN/adapter, or RUN/adapter/METHOD."""
    root = tmp_path_factory.mktemp("runs")
    model, tokenizer = load_model("toy")
    patterns.compress_as(model, tokenizer, SETTINGS)       # an adapter says what it was trained on, and is used there alone
    for name, method in (("idp", SoftPrompts(model, [3, 5])), ("lora", LoRA(model, r=2))):
        folder = root / name / "adapter" if name == "idp" else root / "both" / "adapter" / name
        folder.mkdir(parents=True)
        method.save(folder)
        write_json(root / ("idp" if name == "idp" else "both") / "results.json", {"settings": SETTINGS, "rows": []})
    return root


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "patterns"
    patterns.main(["--adapter", str(runs / "idp" / "adapter"), "--adapter", str(runs / "both" / "adapter" / "lora"),
                   "--limit", "3", "--eval-seqlen", "16", "--out", str(out)])
    result = json.loads((out / "patterns.json").read_text())
    assert [row["row"] for row in result["rows"]] == ["dense", "compressed", "idp", "lora"]
    dense, compressed, idp, lora = result["rows"]
    assert all(len(row["layers"][key]) == 4 for row in result["rows"] for key in MEASURES)
    assert compressed["means"]["attention"]["mean"] > 1e-3 > dense["means"]["attention"]["mean"]
    for key in MEASURES:
        assert lora["layers"][key] == pytest.approx(compressed["layers"][key]), "an untrained LoRA is the compressed model"
    assert min(idp["layers"]["prompt share"]) > 0 == max(lora["layers"]["prompt share"])
    assert (out / "patterns.png").read_bytes()[:4] == b"\x89PNG"
    table = (out / "patterns.md").read_text()
    assert "n = 3 chunks of 16 tokens" in table and table.split("\n\nAttention pattern")[0] in capsys.readouterr().out
    for block in table.split("\n\n"):
        lines = [line for line in block.strip().splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, "every line of a table has as many cells"


@pytest.mark.parametrize("n, ci95, shown", [
    (1, None, "[too few]"), (5, [2.0, 2.0], "[too few]"), (6, [2.0, 2.0], "[2.000, 2.000]")])
def test_few_chunks_have_no_interval_in_the_table(n, ci95, shown):
    row = patterns.summarise("lora", {key: torch.full((n, 2), 2.0) for key in MEASURES}, [1.0] * n)
    assert json.loads(json.dumps(row, allow_nan=False))["means"]["norm"]["ci95"] == ci95
    assert f"| lora | 1.000 | 2.000 {shown} |" in patterns.text_of([row], "a caption")


def test_it_is_the_model_that_the_runs_recovered():
    model, tokenizer = load_model("toy")
    patterns.compress_as(model, tokenizer, SETTINGS)
    again, _ = load_model("toy")
    ids = compress.calibration_ids(load_text("toy", tokenizer, "train"), 2, 32, 0)
    compress.compress_model(again, tokenizer, "magnitude", ids, **SETTINGS["compression"][1])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_mistakes(runs, tmp_path):
    idp, lora = str(runs / "idp" / "adapter"), str(runs / "both" / "adapter" / "lora")
    for name, settings in (("other", {**SETTINGS, "compression": ["rtn", {"bits": 3}]}), ("none", {**SETTINGS, "compression": None}),
                           ("text", {**SETTINGS, "text": 3})):
        (tmp_path / name / "adapter").mkdir(parents=True)
        write_json(tmp_path / name / "results.json", {"settings": settings, "rows": []})
    run = ["--out", str(tmp_path / "out"), "--eval-seqlen", "16"]
    for flags, words in [
            (["--adapter", str(tmp_path / "none" / "adapter")], "compression is null.*recover from a dense model"),
            (["--adapter", str(tmp_path / "text" / "adapter")], "text is 3"),
            (["--adapter", idp, "--adapter", str(tmp_path / "other" / "adapter")], "--adapter.*not the same compressed model.*rtn"),
            (["--adapter", str(tmp_path / "nowhere")], "--adapter.*results.json"), (["--adapter", idp, "--adapter", idp], "--adapter.*two are named idp"),
            (["--adapter", idp, "--model", "smollm2"], "--model smollm2.*use --model toy"), ([], "--adapter: needs"),
            (["--adapter", lora, "--limit", "999999"], "--limit 999999")]:
        with pytest.raises(UserError, match=words):
            patterns.main(run + flags)
    with pytest.raises(UserError, match="--eval-seqlen 510.*room for 507 tokens"):
        patterns.main(["--out", str(tmp_path / "out"), "--adapter", idp, "--eval-seqlen", "510", "--limit", "1"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="--out"):
        patterns.main(run + ["--adapter", idp])
