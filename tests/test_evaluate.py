"""Scores equal their definitions written out longhand, whatever the batch, the padding or the prompts; a mistake is one line."""
import contextlib
import copy
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
from conftest import tiny_model, under
from evaluate import multiple_choice, open_answer, perplexity
from idp_minimal import PromptBank, attach_idp
from support import cli
from support.cli import UserError
from support.files import read_jsonl
from support.models import load_model
from support import scoring
from support.scoring import continuation_scores, encode_pair, word_perplexity


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


@pytest.mark.parametrize("context", [1, 4, 8])
def test_perplexity_behind_a_context_longhand(context, any_model):
    """Each scored token's loss from a full pass over the chunk up to it; what comes before `context` is not scored."""
    ids = torch.randint(3, 97, (31,), generator=torch.Generator().manual_seed(0))
    losses = evaluate.chunk_losses(any_model, ids, 9, batch_size=2, context=context)
    assert len(losses) == 3
    for chunk, loss in zip(ids[:27].view(3, 9), losses):
        by_hand = [F.cross_entropy(any_model(chunk[None, :t]).logits[0, -1], chunk[t]) for t in range(context, 9)]
        assert loss == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-4)


def test_what_is_scored_does_not_choose_the_prompt():
    """Changing scored tokens changes no choice, and every scored token is read under the prompt that its context chose."""
    model = tiny_model("llama")
    bank = PromptBank.from_prompts(model, [3 * torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 8)])
    ids = torch.randint(3, 97, (40, 12), generator=torch.Generator().manual_seed(0))
    with attach_idp(model, bank) as idp:
        evaluate.scored_part(model, ids, 4)
        choice = idp.choice
        assert len(set(choice.flatten().tolist())) > 1
        changed = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], dim=1)
        evaluate.scored_part(model, changed, 4)
        assert torch.equal(idp.choice, choice)
        model(ids[:, :4])
        logits, targets = evaluate.scored_part(model, ids, 4)
    assert torch.equal(targets, ids[:, 4:])
    for b in range(len(ids)):
        with under(model, bank, choice[:, b:b + 1]):
            assert torch.allclose(logits[b], model(ids[b:b + 1]).logits[0, 3:-1], atol=1e-4)


def test_a_batch_holds_so_many_tokens_and_no_more(monkeypatch):
    """Padding and the context that each continuation carries count; results do not depend on the cap."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    groups = [(torch.randint(3, 97, (n,), generator=generator).tolist(), [[5, 6, 7], [8], [9, 10]]) for n in (3, 30, 31, 29, 4, 60)]
    free = continuation_scores(model, groups)
    sizes = []
    monkeypatch.setattr(scoring, "TOKENS", 70)
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: (
        sizes.append(kwargs["attention_mask"].numel()), forward(self, *args, **kwargs))[1])
    capped = continuation_scores(model, groups)
    assert max(sizes) <= 70
    for a, b in zip(free, capped):
        assert [score for score, _ in a] == pytest.approx([score for score, _ in b], abs=1e-4)


def test_greedy_is_greedy_whatever_a_folder_says():
    """repetition_penalty, stop_strings, num_return_sequences of a generation_config do not reach the answers."""
    model, tokenizer = load_model("toy")
    contexts = ["Question: Where was Mira Olsen born? Answer:", "The trade of"]
    plain = evaluate.completions(model, tokenizer, contexts)
    for name, value in (("repetition_penalty", 1.5), ("stop_strings", ["a"]), ("num_return_sequences", 3), ("num_beams", 2)):
        before = model.generation_config
        model.generation_config = copy.deepcopy(before)
        setattr(model.generation_config, name, value)
        assert evaluate.completions(model, tokenizer, contexts) == plain
        model.generation_config = before


def test_a_model_that_gives_no_numbers_gets_no_row():
    model, tokenizer = load_model("toy")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not a number"):
        perplexity(model, torch.arange(20), 10)
    with pytest.raises(UserError, match="not a number"):
        multiple_choice(model, tokenizer, [{"context": "The pet of", "choices": ["cat", "dog"], "answer": 0}])


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
    windows = scoring.rolling_windows(ids, 1, limit)
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
    logp, greedy = scoring.token_scores(logits, target, tokens=5)
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
    with under(model, bank, choice) if bank is not None else contextlib.nullcontext():
        return longhand_sum(model, ids, len(context))


def choose(model, idp, context):
    """What a context chooses alone, in every layer. -> (L, 1)"""
    model(torch.tensor([context]))
    return idp.choice


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
            if torch.equal(alone, joint):
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
    kept = {"The": "the", "A.": "a", "? ": "?", " the  A": "the a", "": "", " ": ""}
    assert {text: evaluate.normalise(text) for text in kept} == kept


@pytest.mark.parametrize("completion, alias, right", [
    ("", "A", False), ("", "", False), ("", "The", False), (" \n", "?", False), (".", "A", False),
    ("?", "!", False), ("the", "A", False), ("A", "A", True), (" a.", "A", True), ("(A)", "A", True),
    ("A, not B", "A", True), ("The", "The", True), ("?", "?", True), ("!?", "!?", True),
    ("the cat", "cat", True)])
def test_nothing_matches_nothing(completion, alias, right):
    """Normalising "A", "The" or "?" must not leave nothing, which an empty completion would equal."""
    assert evaluate.answer_matches(completion, [alias]) is right


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
    (["--eval-text", "nonsense"], "--eval-text"), (["--eval-seqlen", "1"], "--eval-seqlen"), (["--eval-seqlen", "9999"], "--eval-seqlen"),
    (["--batch-size", "0"], "--batch-size"), (["--adapter", "/nowhere"], "--adapter"), (["--adapter", "a", "--adapter", "b"], "--adapter"),
    (["--compare", "/nowhere", "/nowhere"], "--compare"), (["--compare", "a"], "--compare"),
    (["--compare", "a", "b", "--limit", "3"], "--limit 3"), (["--eval-context", "64"], "--eval-context 64"),
    (["--patterns"], "--patterns"), (["--device", "tpu"], "--device"), (["--out", str(pathlib.Path(__file__).parent)], "--out")])
def test_a_mistake_is_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: evaluate.main(flags))
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
    model, tokenizer = load_model(os.environ["IDP_REAL_MODEL"])
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
    rows = read_jsonl(path, "IDP_TASKS_DIR")[:int(os.environ.get("IDP_TASKS_LIMIT", 200))] if path.exists() else HAND[name]
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
    score = evaluate.multiple_choice if "choices" in rows[0] else evaluate.open_answer
    assert score(model, tokenizer, rows[:20])["correct"] == correct[:20]
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
