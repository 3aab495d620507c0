"""Scores equal their definitions written out longhand, whatever the batch, the padding or the prompts; a mistake is one line."""
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import types

import pytest
import torch
import torch.nn.functional as F

import evaluate
import loading
import uncertainty
from conftest import tiny_model
from evaluate import continuation_scores, encode_pair, multiple_choice, open_answer, perplexity, word_perplexity
from idp_minimal import PromptBank, attach_idp
from loading import UserError
from uncertainty import bootstrap, compare, mcnemar


class Tokenizer:
    """Longest match over a few merged strings, then single characters: token 1 is BOS. Its vocabulary is 97, as the models'."""
    MERGED = ["Answer", " the", "ab", " a", "er"]
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [1] * add_special_tokens
        while text:
            piece = next((m for m in self.MERGED if text.startswith(m)), text[0])
            ids.append(3 + self.MERGED.index(piece) if piece in self.MERGED else 10 + ord(piece) % 87)
            text = text[len(piece):]
        return types.SimpleNamespace(input_ids=ids)

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(i)) for i in row) for row in rows]


TOKENIZER = Tokenizer()
GROUPS = [([1] + list(range(10, 10 + n)), [[20 + n], [30, 31, 32, n], [40, 41]][:1 + n % 3]) for n in (1, 40, 2, 17, 3, 8)]


def attachments(model):
    """name -> a function that gives a context manager: no prompt, one prompt, two to choose from."""
    prompts = [torch.randn(n, model.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(n)) for n in (3, 5)]
    bank = lambda k: PromptBank.from_prompts(model, prompts[:k])
    return {"plain": contextlib.nullcontext, "prompt": lambda: attach_idp(model, bank(1), "fixed"),
            "idp": lambda: attach_idp(model, bank(2))}


# --- perplexity ---------------------------------------------------------------------------------------------------------------

def test_perplexity_is_gptqs_definition_longhand():
    model, seqlen = tiny_model("llama"), 16
    ids = torch.randint(3, 97, (5 * seqlen + 7,), generator=torch.Generator().manual_seed(0))
    nlls, nsamples = [], len(ids) // seqlen                # as in the GPTQ authors' evaluation
    for i in range(nsamples):
        batch = ids[None, i * seqlen:(i + 1) * seqlen]
        logits = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, 97), batch[:, 1:].reshape(-1))
        nlls.append(loss * seqlen)
    expected = math.exp(torch.stack(nlls).sum() / (nsamples * seqlen))
    for batch_size in (1, 3, 8):
        assert perplexity(model, ids, seqlen, batch_size) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids[:10], seqlen) == pytest.approx(perplexity(model, ids[:10], 10)), "a short text is one chunk"
    with pytest.raises(UserError, match="--eval-text"):
        perplexity(model, ids[:1], seqlen)


class Uniform(torch.nn.Module):
    """Every token equally likely."""
    config, device = types.SimpleNamespace(max_position_embeddings=32), "cpu"

    def forward(self, input_ids, logits_to_keep, **kwargs):
        return types.SimpleNamespace(logits=torch.zeros(len(input_ids), len(logits_to_keep), 50))


def test_uniform_perplexity_is_the_vocabulary():
    assert perplexity(Uniform(), torch.arange(40), 8) == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("n, limit", [(5, 8), (8, 8), (9, 8), (25, 8), (16, 8), (1, 8), (7, 1)])
def test_rolling_windows_predict_every_token_once_with_all_the_context_there_is(n, limit):
    ids = list(range(100, 100 + n))
    windows = evaluate.rolling_windows(ids, 1, limit)
    assert [token for _, right in windows for token in right] == ids
    text = [1] + ids
    for left, right in windows:
        read = left + right[:-1]
        end = text.index(right[-1])
        assert read == text[max(0, end - limit):end] or (len(read) == limit and read == text[end - limit:end])


def test_word_perplexity_longhand():
    model, documents, total = tiny_model("gpt2"), ["ab the\nbaer  a", " ", "the end of it"], 0.0
    for text in (documents[0], documents[2]):
        ids = [1] + TOKENIZER(text).input_ids              # the harness's prefix token, then the text as the tokenizer gives it
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(logits[t, ids[t + 1]].item() for t in range(len(ids) - 1))
    assert word_perplexity(model, TOKENIZER, documents) == pytest.approx(math.exp(-total / 8), rel=1e-4)
    with pytest.raises(UserError, match="no words"):
        word_perplexity(model, TOKENIZER, ["  "])


# --- log-likelihoods ------------------------------------------------------------------------------------------------------------

def test_token_scores_in_pieces_equal_log_softmax():
    logits, target = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    target[0, 0] = logits[0, 0].argmax()
    logp, greedy = evaluate.token_scores(logits, target, tokens=5)
    assert torch.allclose(logp, logits.log_softmax(-1).gather(2, target[..., None])[..., 0], atol=1e-6)
    assert torch.equal(greedy, logits.argmax(-1) == target) and greedy.any()


def longhand_sum(model, ids, n):
    """Sum of log p of the tokens after the first n, and whether each is the most likely."""
    logits = model(ids).logits[0, n - 1:-1]
    return logits.log_softmax(-1).gather(1, ids[0, n:, None]).sum().item(), torch.equal(logits.argmax(-1), ids[0, n:])


@pytest.mark.parametrize("kind", ["plain", "prompt", "idp"])
@torch.no_grad()
def test_scores_do_not_depend_on_batch_or_padding(kind, any_model):
    attach = attachments(any_model)[kind]
    with attach():
        batches = [continuation_scores(any_model, GROUPS, size) for size in (1, 2, 6)]
    for g, (context, rest) in enumerate(GROUPS):
        for j, continuation in enumerate(rest):
            expected, greedy = longhand_alone(any_model, attach, context, continuation)
            for scores in batches:
                assert scores[g][j][0] == pytest.approx(expected, abs=2e-3) and scores[g][j][1] == greedy


def longhand_alone(model, attach, context, continuation):
    """One sequence, no cache, no padding, under the prompt that the context alone chooses."""
    with attach() as idp:
        bank, choice = (idp.bank, choose(model, idp, context)) if idp is not None else (None, None)
    ids = torch.tensor([context + continuation])
    with attach_idp(model, bank, "fixed", k=choice) if bank is not None else contextlib.nullcontext():
        return longhand_sum(model, ids, len(context))


def choose(model, idp, context):
    """The prompt that a context chooses alone."""
    model(torch.tensor([context]))
    return int(idp.choice)


@torch.no_grad()
def test_the_continuation_does_not_choose_the_prompt():
    """Scores follow the context's own choice, also where context + continuation would choose otherwise."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    attach, differ = attachments(model)["idp"], 0
    for _ in range(60):
        context = torch.randint(3, 97, (3,), generator=generator).tolist()
        continuation = torch.randint(3, 97, (12,), generator=generator).tolist()
        with attach() as idp:
            alone, joint = choose(model, idp, context), choose(model, idp, context + continuation)
            if alone == joint:
                continue
            [[(score, _)]] = continuation_scores(model, [(context, [continuation])])
        differ += 1
        assert score == pytest.approx(longhand_alone(model, attach, context, continuation)[0], abs=1e-3)
    assert differ, "no context whose choice the continuation would change: the test shows nothing"


def test_encode_pair():
    assert encode_pair(TOKENIZER, "xy", " zz", 99) == ([1, *chars("xy")], chars(" zz"))
    assert encode_pair(TOKENIZER, "xy ", "zz", 99) == ([1, *chars("xy")], chars(" zz")), "trailing blanks belong to the continuation"
    assert encode_pair(TOKENIZER, "", " zz", 99) == ([1], chars(" zz")), "an empty context is the BOS token"
    # 'Ans' + 'wer': one token spans the join and the joint text is shorter than the context; the continuation counts alone
    assert encode_pair(TOKENIZER, "Ans", "wer", 99) == ([1, *chars("Ans")], chars("w") + [3 + TOKENIZER.MERGED.index("er")])
    # 'a' + 'bc' -> 'ab' 'c': the context keeps its own tokens, and what follows them in the joint text is scored
    assert encode_pair(TOKENIZER, "a", "bc", 99) == ([1, *chars("a")], chars("c"))


def chars(text):
    """Token ids of single characters."""
    return [10 + ord(c) % 87 for c in text]


def test_long_contexts_are_cut_from_the_left():
    left, right = encode_pair(TOKENIZER, "uvwxyz", "qqq", 5)
    assert left == chars("xyz") and right == chars("qqq")  # 3 + 3 tokens, of which 5 are read
    with pytest.raises(UserError, match="--tasks.*reads 5"):
        encode_pair(TOKENIZER, "x", "q" * 6, 5)
    model, row = tiny_model("gpt2"), {"context": "u" * 300 + "xyz", "choices": ["q", "rrr"], "answer": 0}
    short = {**row, "context": "u" * 20 + "xyz"}
    for limit in (12, None):                               # None: the 128 positions of the model
        assert multiple_choice(model, TOKENIZER, [row], max_length=limit)["n"] == 1
    cut = multiple_choice(model, TOKENIZER, [row, short], max_length=12)["logp"]
    assert cut[0] == pytest.approx(cut[1], abs=1e-4)


def test_evaluate_model_leaves_room_for_prompts():
    model = tiny_model("gpt2")
    rows = {"t": [{"context": "u" * 300, "choices": ["q", "rrr"], "answer": 0}],
            "o": [{"context": "u" * 300 + "\nA:", "target": "x"}]}
    with attachments(model)["idp"]() as idp:
        scores = evaluate.evaluate_model(model, TOKENIZER, torch.arange(3, 80), rows, 16, prompt_columns=idp.bank.N)
        assert scores["tasks"]["t"]["n"] == 1 and scores["tasks"]["o"]["n"] == 1
        with pytest.raises(UserError, match="--eval-seqlen 124"):
            evaluate.evaluate_model(model, TOKENIZER, torch.arange(3, 80), rows, 124, prompt_columns=idp.bank.N)


# --- tasks ------------------------------------------------------------------------------------------------------------------------

def test_acc_and_acc_norm_by_characters(monkeypatch):
    """By the sum the first choice wins; per character the second; per UTF-8 byte it would be the first again."""
    row = {"context": "c", "choices": ["ééé", "abcd"], "answer": 1}
    monkeypatch.setattr(evaluate, "scores_of_pairs", lambda *args: [[(-6.0, False), (-7.0, False)]])
    scores = multiple_choice(None, None, [row])
    assert (scores["acc"], scores["acc_norm"], scores["correct"], scores["correct_norm"]) == (0.0, 1.0, [False], [True])


def test_winogrande_scores_what_follows_the_option():
    row = {"context": "Ann thanked Eve because", "options": ["Ann", "Eve"], "suffix": "had helped.", "answer": 1, "choices": ["", ""]}
    assert evaluate.choice_pairs(row) == [("Ann thanked Eve because Ann", " had helped."), ("Ann thanked Eve because Eve", " had helped.")]


def test_choices_that_share_a_context_share_one_pass():
    model, calls = tiny_model("llama"), []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    multiple_choice(model, TOKENIZER, [{"context": "xyz", "choices": ["p", "qq", "rrr"], "answer": 0}])
    hook.remove()
    assert calls == [(1, 4), (3, 3)]                       # the context once; " p", " qq", " rrr" together, their last tokens unread


@pytest.mark.parametrize("completion, right", [
    (" The Beatles!\nQuestion:", True), ("beatles, who sang", True), (" beatles. They", True), ("the beatles and others", False),
    ("\n\nBeatles", True), ("", False), ("J. K. Rowling", True), ("j k rowling said", False)])
def test_open_answers_are_normalised(completion, right):
    assert evaluate.answer_matches(completion, ["The Beatles", "J. K. Rowling"]) is right


def test_normalise():
    assert evaluate.normalise("  The  U.S.A. and an Ápple-pie ") == "usa and ápplepie"


@pytest.mark.parametrize("context, asks", [
    ("Question: who?\nAnswer:", True), ("q\nA: ", True), ("Answer:", True), ("He turned and said:", False), ("and then", False)])
def test_what_is_a_question(context, asks):
    assert evaluate.is_question({"context": context}) is asks


def greedy(model, ids, n):
    """n greedy tokens, one full pass each."""
    ids = torch.tensor([ids])
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -n:].tolist()


@pytest.mark.parametrize("kind", ["plain", "idp"])
@torch.no_grad()
def test_open_answer_generates_what_full_passes_give(kind):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    contexts = ["Q\nA:", "x" * 30 + "\nA:", "\nA:"]
    with attachments(model)[kind]():
        texts = evaluate.completions(model, TOKENIZER, contexts, batch_size=3, new_tokens=4)
        assert texts == evaluate.completions(model, TOKENIZER, contexts, batch_size=1, new_tokens=4)
        if kind == "plain":
            expected = [greedy(model, TOKENIZER(context).input_ids, 4) for context in contexts]
            assert texts == [" ".join(map(str, row)) for row in expected]
        rows = [{"context": c, "target": "no", "aliases": [t] if i else ["no"]} for i, (c, t) in enumerate(zip(contexts, texts))]
        assert open_answer(model, TOKENIZER, rows, new_tokens=4)["correct"] == [False, True, True]


@torch.no_grad()
def test_last_words_count_any_alias_that_is_the_greedy_continuation():
    model = tiny_model("llama")
    characters = {10 + ord(c) % 87: c for c in map(chr, range(97, 123))}
    rows = []
    for text in ("pq", "rst", "uvw", "xy", "zq", "mn", "kl", "gh"):
        [blank] = chars(" ")
        best = next(i for i in model(torch.tensor([TOKENIZER(text).input_ids + [blank]])).logits[0, -1].argsort(descending=True).tolist()
                    if i in characters)
        rows.append({"context": text, "target": "§", "aliases": [characters[best]]})
    expected = [longhand_sum(model, torch.tensor([TOKENIZER(r["context"] + " " + r["aliases"][0]).input_ids]),
                             len(TOKENIZER(r["context"]).input_ids))[1] for r in rows]
    assert open_answer(model, TOKENIZER, rows, batch_size=3)["correct"] == expected


# --- uncertainty --------------------------------------------------------------------------------------------------------------------

def test_mcnemar_by_hand():
    a, b = [1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]           # five only a, one only b: 2 (C(6,0) + C(6,1)) / 2^6
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(14 / 64)
    assert mcnemar(a, a) == 1.0 and mcnemar([], []) == 1.0, "nothing discordant: nothing shown"
    assert mcnemar([1] * 4000, [0] * 4000) < 1e-300 or mcnemar([1] * 4000, [0] * 4000) == 0.0, "no overflow"


def test_bootstrap():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    low, high = bootstrap(values)
    mean, half = values.mean().item(), 1.96 * values.std().item() / 20                    # the normal interval of a mean of 400
    assert low == pytest.approx(mean - half, abs=0.02) and high == pytest.approx(mean + half, abs=0.02)
    assert bootstrap([0.25] * 9) == (0.25, 0.25) and bootstrap(values) == (low, high), "the seed decides"


def run_folder(folder, rows):
    """A results.json with its items.json. rows: {row: {name: (fingerprint, values)}} -> its path."""
    loading.write_json(folder / "items.json", {
        row: {name: {"data": data, "values": values} for name, (data, values) in items.items()} for row, items in rows.items()})
    loading.write_json(folder / "results.json", {"rows": []})
    return folder / "results.json"


def test_compare_pairs_items(tmp_path):
    x, loss = [True] * 6 + [False] * 4, [1.0, 2.0, 3.0]
    a = run_folder(tmp_path / "a", {"dense": {"loss": ("f", loss), "arc": ("f", x)}})
    b = run_folder(tmp_path / "b", {"idp": {"loss": ("f", [v + 0.5 for v in loss]), "arc": ("f", [False] * 10)}})
    lines = compare(a, b)
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert {len(row) for row in cells} == {10}, "every line has every column"
    ppl, arc = cells[2:]
    assert ppl[:4] == ["dense", "idp", "ppl (log difference)", "3"] and ppl[6:] == ["+0.500", "+0.500 .. +0.500", "-", "yes"]
    assert arc[2:7] == ["arc", "10", "0.600", "0.000", "-0.600"] and arc[8] == f"{2 / 2 ** 6:.3g}" and arc[9] == "yes"


def test_compare_says_what_it_cannot_pair(tmp_path):
    a = run_folder(tmp_path / "a", {"dense": {"loss": ("f", [1.0]), "arc": ("f", [True, False]), "sciq": ("f", [True])}})
    b = run_folder(tmp_path / "b", {"idp": {"loss": ("f", [1.0]), "arc": ("g", [True, False]), "piqa": ("f", [True])}})
    notes = [line for line in compare(a, b) if line.startswith("Not compared")]
    assert len(notes) == 3 and "arc: not the same items (2 in dense of A, 2 in idp of B)" in notes[0]
    assert "sciq: only dense of A" in notes[1] and "piqa: only idp of B" in notes[2]


def test_compare_one_file_with_itself_and_nothing_discordant(tmp_path):
    items = {"loss": ("f", [1.0, 2.0]), "arc": ("f", [True, False])}
    path = run_folder(tmp_path, {"dense": items, "compressed": items, "idp": items})
    rows = [line.split(" | ") for line in compare(path, path)[2:]]
    assert [(row[0], row[1]) for row in rows[::2]] == [("| dense", "compressed"), ("| dense", "idp"), ("| compressed", "idp")]
    assert all(row[-1] == "no |" for row in rows) and rows[1][-2] == "1"


def test_compare_mistakes(tmp_path):
    a = run_folder(tmp_path / "a", {"dense": {"arc": ("f", [True])}})
    b = run_folder(tmp_path / "b", {"idp": {"arc": ("g", [True, True])}})
    with pytest.raises(UserError, match="no two rows share items.*1 in dense of A, 2 in idp of B"):
        compare(a, b)
    with pytest.raises(UserError, match="no two rows"):    # one row has nothing to be compared with
        compare(a, a)
    (tmp_path / "b" / "items.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        compare(a, b)
    (tmp_path / "b" / "items.json").unlink()
    with pytest.raises(UserError, match="items.json beside it"):
        compare(a, b)


def test_fingerprints_tell_questions_apart():
    assert uncertainty.fingerprint([{"context": "a"}]) == uncertainty.fingerprint([{"context": "a"}])
    assert uncertainty.fingerprint([{"context": "a"}]) != uncertainty.fingerprint([{"context": "b"}])


# --- the command --------------------------------------------------------------------------------------------------------------------

def test_the_command_keeps_the_contract(tmp_path, capsys):
    out = tmp_path / "run"
    evaluate.main(["--limit", "6", "--out", str(out), "--word-ppl"])
    results, items = (json.loads((out / name).read_text()) for name in ("results.json", "items.json"))
    assert {"command", "settings", "versions", "device", "seconds", "rows"} <= set(results)
    [row] = results["rows"]
    assert {"row", "ppl", "word_ppl", "tasks", "trainable_params", "extra_bytes", "weight_bytes"} <= set(row)
    assert len(row["tasks"]) == 3 and all({"acc", "n", "ci95"} <= set(task) and task["n"] == 6 for task in row["tasks"].values())
    for name, task in row["tasks"].items():
        assert sum(items["model"][name]["values"]) / 6 == task["acc"]
    table = (out / "results.md").read_text()
    assert table.strip() in capsys.readouterr().out
    lines = table.split("\n\n")[0].splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1 and set(lines[1]) == set("|-"), "pastes into Markdown"


@pytest.mark.parametrize("flags, word", [
    (["--model", "no/such/folder"], "--model"), (["--tasks", "nonsense"], "--tasks"), (["--limit", "0"], "--limit"),
    (["--eval-text", "nonsense"], "--text"), (["--eval-seqlen", "1"], "--eval-seqlen"), (["--eval-seqlen", "9999"], "--eval-seqlen"),
    (["--batch-size", "0"], "--batch-size"), (["--adapter", "/nowhere"], "--adapter"), (["--adapter", "a", "--adapter", "b"], "--adapter"),
    (["--compare", "/nowhere", "/nowhere"], "--compare"), (["--compare", "a"], "--compare"), (["--patterns"], "--patterns"),
    (["--patterns", "--latency"], "--latency"), (["--device", "tpu"], "--device"), (["--out", str(pathlib.Path(__file__).parent)], "--out")])
def test_a_mistake_is_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        loading.run(lambda: evaluate.main(flags))
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(err) == 1 and word in err[0]


# --- the standard harness -------------------------------------------------------------------------------------------------------------

HAND = {  # a few rows of each kind, for when IDP_TASKS_DIR does not name a folder with arc_easy.jsonl, ...
    "arc_easy": [{"context": f"Question: {q}\nAnswer:", "choices": c, "answer": a} for q, c, a in [
        ("Which planet is closest to the Sun?", ["Mercury", "Venus", "Earth", "Mars"], 0),
        ("What do bees make?", ["milk", "honey", "a kind of silk", "wool"], 1), ("Water freezes at", ["0 °C", "100 °C", "50 °C"], 0)]],
    "winogrande": [{"context": "The trophy did not fit in the suitcase because the", "options": ["trophy", "suitcase"],
                    "suffix": "was too small.", "choices": ["trophy was too small.", "suitcase was too small."], "answer": 1}],
    "lambada": [{"context": "Paris is the capital of", "target": "France"}, {"context": "One, two, three,", "target": "four"}],
}


@pytest.fixture(scope="module")
def harness():
    """(our model, its tokenizer, the harness's view of the same model); skipped without lm_eval or a real model."""
    if importlib.util.find_spec("lm_eval") is None or "IDP_REAL_MODEL" not in os.environ:
        pytest.skip("needs `pip install lm_eval`, and IDP_REAL_MODEL=DIR naming a folder with a real model")
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = loading.load_model(os.environ["IDP_REAL_MODEL"])
    return model, tokenizer, HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)


def ask(lm, kind, arguments):
    """What the harness answers to requests of one kind. arguments: list of tuples."""
    from lm_eval.api.instance import Instance
    return getattr(lm, kind)([Instance(kind, {}, args, i) for i, args in enumerate(arguments)], disable_tqdm=True)


@pytest.mark.parametrize("name", sorted(HAND))
def test_agrees_with_lm_eval(name, harness):
    """Same rows, same model: identical accuracy, every log-likelihood within 1e-3. IDP_TASKS_DIR, IDP_TASKS_LIMIT: a larger run."""
    model, tokenizer, lm = harness
    path = pathlib.Path(os.environ.get("IDP_TASKS_DIR", "none"), f"{name}.jsonl")
    rows = loading.read_jsonl(path, "IDP_TASKS_DIR")[:int(os.environ.get("IDP_TASKS_LIMIT", 200))] if path.exists() else HAND[name]
    pairs = [evaluate.choice_pairs(row) if "choices" in row else [(row["context"], " " + row["target"])] for row in rows]
    theirs = iter(ask(lm, "loglikelihood", [pair for row in pairs for pair in row]))
    theirs = [[next(theirs) for _ in row] for row in pairs]
    ours = evaluate.scores_of_pairs(model, tokenizer, pairs, 16, None, name)
    for row, expected in zip(ours, theirs):
        assert [score for score, _ in row] == pytest.approx([score for score, _ in expected], abs=1e-3)
    if "choices" in rows[0]:
        correct = [max(range(len(e)), key=lambda c: e[c][0]) == row["answer"] for row, e in zip(rows, theirs)]
    else:
        correct = [e[0][1] for e in theirs]
    assert evaluate.evaluate_task(model, tokenizer, rows[:20])["correct"] == correct[:20]
    chosen = [max(range(len(o)), key=lambda c: o[c][0]) == row["answer"] if "choices" in row else o[0][1] for row, o in zip(rows, ours)]
    assert chosen == correct


def test_completions_agree_with_lm_eval(harness):
    model, tokenizer, lm = harness
    contexts = [row["context"] for row in HAND["arc_easy"]]
    theirs = ask(lm, "generate_until", [(c, {"until": ["\n"], "do_sample": False, "max_gen_toks": 16}) for c in contexts])
    ours = evaluate.completions(model, tokenizer, contexts)
    assert [text.split("\n")[0] for text in ours] == theirs


def test_word_perplexity_agrees_with_lm_eval(harness):
    model, tokenizer, lm = harness
    documents = ["The tower is 324 metres tall , about the same height as a building of 81 storeys . " * 4, "A short one ."]
    lm._max_length = 48                                    # so that the first document takes several windows
    theirs = ask(lm, "loglikelihood_rolling", [(text,) for text in documents])
    lm._max_length = None
    words = sum(len(text.split(" ")) for text in documents)
    assert word_perplexity(model, tokenizer, documents, 48) == pytest.approx(math.exp(-sum(theirs) / words), rel=1e-4)
