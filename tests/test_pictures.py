"""Each picture draws what was measured; tiny settings, seconds."""
import json

import pytest
import torch

import compress
from experiments import latency, pictures, pictures_idp
from experiments.style import SPARE, STYLES, style_of, styles
from idp_minimal import idp_reference
from support.architectures import blocks_of, linears_of, weight_of
from support.cli import UserError
from support.data import encode
from support.models import load_model


@pytest.fixture(scope="module")
def toy():
    """Two steps of training, twelve questions."""
    return pictures.Toy(pictures.parse(["all", "--steps", "2", "--limit", "12"]))


# --- What is drawn --------------------------------------------------------------------------------------------------------------

def test_squares_are_the_answers(toy):
    fig, words = pictures.squares(toy)
    drawn = fig.axes[0].images[0].get_array().tolist()
    right = [toy.at(name)["toy_recall"]["correct"] for name in pictures.MODELS]
    assert len(drawn) == 6 and sorted(zip(*drawn)) == sorted(zip(*right)), "the same columns, the first question first"
    crosses = [tuple(line.get_xydata()[0]) for line in fig.axes[0].lines]
    assert sorted(crosses) == sorted((x, y) for y, row in enumerate(drawn) for x, value in enumerate(row) if not value)
    assert [line.split(":")[0].strip() for line in words.splitlines()[1:7]] == list(pictures.MODELS)
    assert words.count("(wrong)") == sum(1 - row[0] for row in drawn)


def test_the_first_question_is_the_first_that_lora_has_back():
    rows = [{"id": f"A B/{kind}"} for kind in ("town", "pet", "town", "town")]
    right = {"dense": [1, 1, 1, 1], "compressed": [1, 0, 0, 0], "lora": [1, 1, 1, 1]}
    assert pictures.first_question(rows, right) == 2
    assert pictures.first_question(rows, {**right, "lora": [1, 1, 0, 1]}) == 3
    assert pictures.first_question(rows, {**right, "compressed": [1, 1, 1, 1]}) == 0


def test_grid_points_are_those_of_the_grid(toy):
    fig, words = pictures.grids(toy)
    row = int(words.split("row ")[1].split(",")[0]) - 1
    W = weight_of(linears_of(blocks_of(load_model("toy")[0])[0])[pictures.LAYER])
    columns = slice(64 * pictures.GROUP, 64 * (pictures.GROUP + 1))
    for ax, mse in zip(fig.axes[:2], (False, True)):
        after = compress.rtn(W, bits=3, group_size=64, mse=mse)[row, columns]
        (x, counts), marks = ax.lines[0].get_data(), ax.lines[1].get_xdata()
        used = {round(point, 6): count for point, count in zip(x, counts) if count}
        assert used == {round(value.item(), 6): int((after == value).sum()) for value in after.unique()}
        assert list(marks) == list(x) and len(x) == 8
    for ax in fig.axes[:3]:
        points, counts = ax.lines[0].get_data()
        assert 0 in points and list(ax.lines[2].get_xdata()) == [0] and sum(counts) == 64
        steps = [b - a for a, b in zip(points, points[1:])]
        assert max(steps) == pytest.approx(min(steps))


def test_errors_are_those_of_the_reports(toy):
    fig, words = pictures.errors(toy)
    model, tokenizer = load_model("toy")
    report = compress.compress_model(model, tokenizer, "gptq", toy.calibration(), bits=3)
    rtn, gptq = (line.get_ydata() for line in fig.axes[0].lines[:2])
    assert list(gptq) == [row["error"] for row in report["layers"].values()] and len(rtn) == len(gptq) == 28
    assert f"gptq {report['mean_error']:.3f}" in words


def test_attention_blocks_have_the_scores(toy):
    prompts = [P.detach() for P in toy.method("idp").prompts]
    ids = torch.tensor([encode(toy.tokenizer, toy.tasks["toy_recall"][0]["context"])])
    to_prompts, to_input, idp = pictures_idp.look(toy.model, prompts, ids)
    for layer, A in enumerate(to_prompts):
        means = torch.stack([part.mean() for part in A.split([8, 16], dim=1)])
        assert torch.allclose(means, idp.scores[layer, 0], atol=1e-5) and to_input[layer].shape == (ids.shape[1],) * 2
    fig, words = pictures.idp.attention(toy)
    whole, kept = (fig.axes[i].images[0].get_array() for i in (0, 2))
    chosen = 0 if "prompt 1 (8 tokens)" in words.split("  <- chosen")[0].splitlines()[-1] else 1
    assert whole.shape == kept.shape == (ids.shape[1], 24 + ids.shape[1])
    gone = kept.mask & ~whole.mask
    assert gone[:, :8].all() == (chosen == 1) and gone[:, 8:24].all() == (chosen == 0) and not gone[:, 24:].any()


def test_shares_are_those_of_the_slow_reference(toy):
    prompts, counted = [P.detach() for P in toy.method("idp").prompts], {}
    for row in toy.tasks["toy_recall"]:
        ids = torch.tensor([encode(toy.tokenizer, row["context"])])
        counted.setdefault(row["domain"], []).append(idp_reference(toy.model, prompts, ids)[1][:, 0] == 0)
    found = pictures_idp.shares(toy)
    assert found == {domain: (torch.stack(some).float().mean(0).tolist(), len(some)) for domain, some in sorted(counted.items())}
    fig, table = pictures_idp.choices(toy)
    drawn = fig.axes[0].images[0].get_array()
    assert drawn.shape == (2, 4) and f"{drawn[0, 1]:.1f}" in table


def test_curves_begin_where_compression_ended(toy):
    fig, table = pictures.training(toy)
    for ax in fig.axes:
        lines = {line.get_label(): line for line in ax.lines}
        assert list(lines) == [*pictures.REMEDIES, "dense", "compressed"]
        assert list(lines["lora"].get_xdata()) == [0, 2]
        assert lines["lora"].get_ydata()[0] == pytest.approx(lines["compressed"].get_ydata()[0])
    loss = fig.axes[2].lines[pictures.REMEDIES.index("lora")].get_ydata()
    assert loss[1] == toy.at("lora")["loss"] != loss[0] and f"{loss[1]:.2f}" in table


def test_the_data_flow_has_every_step():
    fig, _ = pictures_idp.dataflow(None)
    said = " ".join(text.get_text() for text in fig.axes[0].texts)
    assert all(words in said for *_, words in pictures_idp.BOXES.values())
    arrows = [text for text in fig.axes[0].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == len(pictures_idp.ARROWS)


# --- From files -------------------------------------------------------------------------------------------------------------------

def test_dots_and_bars_are_those_of_the_file(tmp_path):
    column = {"Average": {"mean": 0.5, "ci95": [0.25, 0.75]}}
    rows = [{"row": name, "columns": column} for name in ("dense", "lora, rank 2")]
    (tmp_path / "table1.json").write_text(json.dumps({"rows": rows}))
    fig, _ = pictures.table1(pictures.parse(["table1", "--from", str(tmp_path / "table1.json")]))
    interval, dot = fig.axes[0].lines[2:4]
    assert list(interval.get_xdata()) == [25, 75] and dot.get_xydata().tolist() == [[50, 1]]
    assert dot.get_color() == STYLES["lora"][0]
    seen = {name: {"prefill": [2.0, 4.0], "decode": [1.0, 1.0]} for name in ("prompt as cached prefix", "IDP, m = 2")}
    seen["IDP, m = 2"] = {"prefill": [3.0, 6.0], "decode": [2.0, 2.0]}
    (tmp_path / "latency.json").write_text(json.dumps({"times": {"128": seen, "256": seen}}))
    fig, _ = pictures.latency(pictures.parse(["latency", "--from", str(tmp_path / "latency.json")]))
    widths = [[bar.get_width() for bar in ax.patches] for ax in fig.axes]
    assert widths == [[1, 1.5] * 2, [1, 2] * 2] and latency.ratio(seen, "IDP, m = 2", "prompt as cached prefix", "decode") == 2


@pytest.mark.parametrize("flags, words", [
    (["table1"], "--from: missing"), (["squares", "--from", "x.json"], "--from x.json"), (["nonsense"], "invalid choice"),
    (["table1", "--from", "x.json", "--steps", "3"], "--steps 3"), (["dataflow", "--limit", "3"], "--limit 3")])
def test_flags_that_a_picture_would_ignore_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        pictures.parse(flags)


@pytest.mark.parametrize("name", ["table1", "latency"])
def test_a_file_of_another_kind_is_refused(name, tmp_path):
    (tmp_path / "x.json").write_text('{"rows": [{}], "times": {"1": {}}}')
    with pytest.raises(UserError, match="--from .*x.json"):
        pictures.PICTURES[name][1](pictures.parse([name, "--from", str(tmp_path / "x.json")]))


def test_the_command_writes_a_picture_and_replaces_none(tmp_path, capsys):
    pictures.main(["dataflow", "--out", str(tmp_path / "new")])
    assert (tmp_path / "new/idp.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="holds idp.png already"):
        pictures.main(["dataflow", "--out", str(tmp_path / "new")])
    assert pictures.parse(["all"]).names == [name for name in pictures.PICTURES if name not in ("table1", "latency")]


def test_no_two_lines_look_alike():
    looks = [*STYLES.values(), *SPARE]
    assert len(set(looks)) == len(looks)
    names = ["dense", "idp, 8+16 tokens", "lora, rank 1", "lora, rank 2", "mine"]
    found = styles(names)
    assert len(set(found)) == 5 and found[1:3] == [STYLES["idp"], STYLES["lora"]] and found[3] in SPARE
    assert style_of("IDP, m = 4") == STYLES["idp"] and style_of("nothing of these") is None


@pytest.mark.parametrize("name, content", [
    ("table1", {"rows": [{"row": "a", "columns": {"x": {"mean": 0.5, "ci95": [0.1]}}}]}),
    ("table1", {"rows": [{"row": "a", "columns": {}}]}),
    ("latency", {"times": {"128": {"prompt as cached prefix": {}}}})])
def test_a_file_with_holes_is_one_message(name, content, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="^--from .*give its"):
        pictures.PICTURES[name][1](pictures.parse([name, "--from", str(file)]))
