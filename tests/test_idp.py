"""The law of IDP: the fused pass equals running each input with its chosen prompt alone, on every architecture."""
import copy
import inspect
import itertools
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

from transformers import DynamicCache, StaticCache

from experiments.choosing import prompt_losses
from conftest import ROOT, tiny_model, under
from experiments.patterns import eager_attention
from kill import run_forked
from idp_minimal import (CACHE, SELECTORS, PromptBank, attach_idp, idp_reference, mean_attention, mean_logits, prompt_cache,
                         prompt_logits, prompt_probabilities, sdpa_attention_forward)
from methods import selectors                              # noqa: F401, they join SELECTORS

LENGTHS = (3, 5, 8)


def make_prompts(model, lengths=LENGTHS, seed=0):
    """Prompts near the model's own embeddings, different enough that sequences disagree about the best one."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_input_embeddings().weight
    return [torch.randn(n, weight.shape[1], generator=generator) * weight.std() * 2 for n in lengths]


def make_batch(B=6, T=10, side="both", seed=0):
    """Token ids and a mask with rows of different lengths, padded left, right or unpadded."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(3, 97, (B, T), generator=generator), torch.ones(B, T, dtype=torch.long)
    for b in range(B if side != "none" else 0):
        left = side == "left" or (side == "both" and b % 2)
        n = b % 5
        mask[b, :n] = 0 if left else 1
        if not left and n:
            mask[b, -n:] = 0
    return ids * mask, mask


def assert_same(logits, expected, mask, tolerance=1e-5):
    """Equal at real tokens, relative to the size of the logits."""
    scale = max(1.0, expected.abs().max().item())
    error = ((logits - expected) * mask[..., None]).abs().max().item()
    assert error <= tolerance * scale, f"largest difference {error:.2e} on logits of size {scale:.1f}"


READINGS = [dict(layers=layers, scores=scores) for layers in ("every", "first") for scores in ("logits", "probabilities")]
words = lambda reading: "-".join(reading.values())


@pytest.mark.parametrize("reading", READINGS, ids=words)
@pytest.mark.parametrize("side", ["none", "both"])         # both: some rows padded left, some right
def test_law(any_model, side, reading):
    prompts = make_prompts(any_model)
    ids, mask = make_batch(side=side)
    bank = PromptBank.from_prompts(any_model, prompts)
    expected, choice = idp_reference(any_model, prompts, ids, mask, **reading)
    for attend in (sdpa_attention_forward, eager_attention):
        with attach_idp(any_model, bank, attend=attend, **reading) as idp:
            for call in range(2):                          # a cache that leaks shows at the second call
                logits = any_model(ids, attention_mask=mask).logits
                assert idp.choice.tolist() == choice.tolist(), f"call {call}"
                assert_same(logits, expected, mask)
    L = any_model.config.num_hidden_layers
    assert idp.choice.shape == ((L, 6) if reading["layers"] == "every" else (6,))
    assert idp.scores.shape == (*idp.choice.shape, 3)


@pytest.mark.parametrize("reading", READINGS, ids=words)
def test_law_is_not_trivial(any_model, reading):
    """The batches above must make different choices, and the choice must matter, or the law proves nothing."""
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    ids, mask = make_batch(B=24, T=6)
    with attach_idp(any_model, bank, **reading) as idp:
        chosen = any_model(ids, attention_mask=mask).logits
    assert len(set(idp.choice.flatten().tolist())) > 1
    if reading["layers"] == "every":
        assert (idp.choice != idp.choice[:1]).any(), "layers disagree"
    with attach_idp(any_model, bank, "fixed", k=0):
        fixed = any_model(ids, attention_mask=mask).logits
    assert (chosen - fixed).abs().max() > 1e-2


def test_readings_differ():
    """Layer by layer or once, before or after the softmax: other choices, so each is a row to be measured."""
    model = tiny_model("llama")
    bank, (ids, mask) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(B=200, T=6)
    choices = []
    for reading in READINGS:
        with attach_idp(model, bank, **reading) as idp:
            model(ids, attention_mask=mask)
        choices.append(idp.choice if idp.choice.dim() == 2 else idp.choice.expand(3, -1))
    assert all((a != b).any() for a, b in itertools.combinations(choices, 2))
    assert torch.equal(choices[0][0], choices[2][0]) and torch.equal(choices[1][0], choices[3][0]), "the first layer agrees"


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_choice_by_hand(any_model, scores):
    """In every layer: argmax of a mean computed by loops from what that layer's queries and keys give."""
    bank, (ids, mask) = PromptBank.from_prompts(any_model, make_prompts(any_model)), make_batch()
    seen = []

    def by_loops(A, real, owner):
        """A selector that means by hand."""
        rows = [[torch.stack([A[b, h, t, j] for h in range(A.shape[1]) for t in range(A.shape[2]) if real[b, t]
                              for j in range(len(owner)) if owner[j] == k]).mean() for k in range(3)] for b in range(len(A))]
        seen.append(torch.tensor(rows))
        return seen[-1]
    with attach_idp(any_model, bank, by_loops, scores=scores):
        any_model(ids[:3], attention_mask=mask[:3])
    with attach_idp(any_model, bank, scores=scores) as idp:
        any_model(ids[:3], attention_mask=mask[:3])
    scale = idp.scores.abs().max()
    assert torch.allclose(torch.stack(seen) / scale, idp.scores / scale, atol=1e-5)


def test_the_mean_of_products_is_a_product_of_means():
    """mean_logits, which never makes A, against mean_attention on A: heads that share keys, padding, unequal lengths."""
    torch.manual_seed(0)
    lengths, h, h_kv, d_k = (2, 5, 3), 6, 2, 8
    keys = torch.randn(3, h_kv, 5, d_k)
    for k, n in enumerate(lengths):
        keys[k, :, :5 - n] = 0
    bank = PromptBank([keys], [keys], list(lengths))
    query, real = torch.randn(4, h, 7, d_k), torch.rand(4, 7) < 0.6
    real[:, 0] = True
    K_p = torch.cat([bank.keys[0][k, :, 5 - n:] for k, n in enumerate(lengths)], dim=1).expand(4, -1, -1, -1)
    slow = mean_attention(prompt_logits(query, K_p, 0.3), real, bank.owner)
    assert torch.allclose(mean_logits(query, real, bank.mean_keys[0], 0.3), slow, atol=1e-6)
    slow = mean_attention(prompt_logits(query, K_p, 0.3), torch.ones_like(real), bank.owner)
    assert torch.allclose(mean_logits(query, None, bank.mean_keys[0], 0.3), slow, atol=1e-6)


def test_probabilities_are_one_softmax():
    torch.manual_seed(0)
    B, h, h_kv, T, S, d_k = 2, 4, 2, 5, 7, 8
    q, k, K_p = torch.randn(B, h, T, d_k), torch.randn(B, h_kv, T, d_k), torch.randn(h_kv, S, d_k)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    A = prompt_probabilities(q, k, K_p.expand(B, -1, -1, -1), mask, scaling=0.3)
    for b in range(B):
        for head in range(h):
            for t in range(T):
                columns = torch.cat([K_p[head // 2], k[b, head // 2, :t + 1]])
                by_hand = (columns @ q[b, head, t] * 0.3).softmax(0)[:S]
                assert torch.allclose(A[b, head, t], by_hand, atol=1e-6)


@pytest.mark.parametrize("selector", ["mean_attention", "total_attention", "max_attention", "last_token"])
def test_selector_by_hand(selector):
    """Each rule against loops over a small A whose second sequence ends in padding."""
    torch.manual_seed(1)
    A = torch.randn(2, 3, 4, 5)                            # (B, h, T, S), before the softmax: also below zero
    owner, real = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    scores = SELECTORS[selector](A, real, owner)
    for b in range(2):
        n = int(real[b].sum())
        for k in range(2):
            block = A[b, :, :n][:, :, owner == k]          # (h, n, n_k)
            expected = {"mean_attention": block.mean(), "max_attention": block.max(), "last_token": block[:, -1].mean(),
                        "total_attention": block.sum(-1).mean()}[selector]
            assert torch.isclose(scores[b, k], expected, atol=1e-6)


@pytest.mark.parametrize("reading", READINGS, ids=words)
@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_obeys_the_law(selector, reading):
    """Whatever the rule chose, the logits are those of a row run alone under that choice."""
    model = tiny_model("llama")
    prompts, (ids, mask) = make_prompts(model), make_batch()
    bank = PromptBank.from_prompts(model, prompts)
    options = {"fixed": {"k": 1}, "random": {"generator": torch.Generator().manual_seed(0)},
               "oracle": {"loss": prompt_losses(model, bank, ids, mask)}}.get(selector, {})
    with attach_idp(model, bank, selector, **reading, **options) as idp:
        logits = model(ids, attention_mask=mask).logits
    assert idp.choice.tolist() == idp.scores.argmax(-1).tolist()
    for b in range(len(ids)):
        with under(model, bank, idp.choice[..., b:b + 1]):
            alone = model(ids[b:b + 1], attention_mask=mask[b:b + 1]).logits
        assert_same(logits[b:b + 1], alone, mask[b:b + 1])


def test_one_prompt_is_a_plain_soft_prompt(any_model):
    P = make_prompts(any_model, (6,))[0]
    ids, _ = make_batch(side="none")
    embed = any_model.get_input_embeddings()
    plain = any_model(inputs_embeds=torch.cat([P.expand(len(ids), -1, -1), embed(ids)], 1)).logits[:, 6:]
    with attach_idp(any_model, PromptBank.from_prompts(any_model, [P])):
        fused = any_model(ids).logits
    assert fused.shape[1] == ids.shape[1]
    assert_same(fused, plain, torch.ones_like(ids))


def test_permuting_prompts_permutes_the_choice(any_model):
    prompts, (ids, mask) = make_prompts(any_model), make_batch()
    order = [2, 0, 1]
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts)) as idp:
        before = any_model(ids, attention_mask=mask).logits
        choice = idp.choice
    with attach_idp(any_model, PromptBank.from_prompts(any_model, [prompts[k] for k in order])) as idp:
        after = any_model(ids, attention_mask=mask).logits
    assert torch.equal(torch.tensor(order)[idp.choice], choice)
    assert_same(after, before, mask)


def test_batch_composition_and_padding_change_nothing(any_model):
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    ids, mask = make_batch()
    with attach_idp(any_model, bank) as idp:
        together = any_model(ids, attention_mask=mask).logits
        choice = idp.choice
        for b in range(len(ids)):
            real = mask[b].bool()
            alone = any_model(ids[b:b + 1, real]).logits
            assert torch.equal(idp.choice[:, 0], choice[:, b])
            assert_same(together[b:b + 1, real], alone, mask[b:b + 1, real])


def test_causal(any_model):
    """Under a fixed prompt, changing the last token changes no earlier logit."""
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    ids, _ = make_batch(side="none")
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 3
    with attach_idp(any_model, bank, "fixed", k=1):
        a, b = any_model(ids).logits, any_model(changed).logits
    assert torch.equal(a[:, :-1], b[:, :-1]) or torch.allclose(a[:, :-1], b[:, :-1], atol=1e-6)
    assert not torch.allclose(a[:, -1], b[:, -1], atol=1e-3)


# --- generation ------------------------------------------------------------------------------------------------------------

def greedy_from_scratch(model, prompts, ids, mask, tokens, choice=None):
    """Recompute everything for every token, without a cache, a row at a time, under what its input chose."""
    choice = idp_reference(model, prompts, ids, mask)[1] if choice is None else choice
    bank, rows = PromptBank.from_prompts(model, prompts), []
    for b in range(len(ids)):
        row = ids[b, mask[b].bool()][None]
        with under(model, bank, choice[..., b:b + 1]):
            for _ in range(tokens):
                row = torch.cat([row, model(row, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
        rows.append(row[0, -tokens:])
    return torch.stack(rows), choice


def without_eos(model):
    """Tiny random models stop at random; let them run."""
    model.generation_config.eos_token_id = None
    return model


def test_greedy_generation(any_model):
    prompts, (ids, mask) = make_prompts(any_model), make_batch(side="left")
    expected, choice = greedy_from_scratch(any_model, prompts, ids, mask, 6)
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts)) as idp:
        out = without_eos(any_model).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert idp.choice.tolist() == choice.tolist()
    assert out[:, -6:].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("how", [dict(num_beams=3), dict(do_sample=True), dict(num_beams=2, do_sample=True), dict()])
def test_sampling_and_beams_agree_with_no_cache(name, how):
    """The cached generation equals one that recomputes the whole sequence at each step, with the choice of the input."""
    model = without_eos(tiny_model(name))
    bank, (ids, mask) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(side="left")
    with attach_idp(model, bank) as idp:
        model(ids, attention_mask=mask)
        choice = idp.choice
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, **how))
            assert idp.choice.tolist() == choice.tolist()
    assert texts[0].tolist() == texts[1].tolist()


def test_added_tokens_would_change_the_choice():
    """So that the tests of use_cache=False and of several turns prove something."""
    model = without_eos(tiny_model("llama"))
    ids, _ = make_batch(B=24, T=4, side="none")
    with attach_idp(model, PromptBank.from_prompts(model, make_prompts(model))) as idp:
        text = model.generate(ids, max_new_tokens=8, use_cache=False, do_sample=False)
        choice = idp.choice
        model(text)
    assert idp.choice.tolist() != choice.tolist()


@pytest.mark.parametrize("how", [dict(), dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)])
def test_a_random_choice_is_made_once(how):
    """One prompt for each input, for all its beams, with a cache or without."""
    model = without_eos(tiny_model("llama"))
    bank, (ids, mask) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(side="left")
    texts = []
    for use_cache in (True, False):
        with attach_idp(model, bank, "random", generator=torch.Generator().manual_seed(3)) as idp:
            torch.manual_seed(0)
            texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=4, use_cache=use_cache, **how))
            assert idp.choice.shape == (3, 6) and len(set(idp.choice.flatten().tolist())) > 1
    assert texts[0].tolist() == texts[1].tolist()


def turns(model, ids, mask, more, **how):
    """Two turns over one cache: generate, add `more` (B, n), generate. -> the text before and after the second."""
    first = model.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, do_sample=False, **how)
    text = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - mask.shape[1])], 1)
    second = model.generate(text, attention_mask=mask, max_new_tokens=4, do_sample=False, **{CACHE: first[CACHE]})
    return text, mask, second


@pytest.mark.parametrize("side", ["none", "left"])
def test_several_turns(any_model, side):
    """The second generate goes on with the choice of the first; so does one on a copy of the cache."""
    prompts, (ids, mask) = make_prompts(any_model), make_batch(side=side)
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts)):
        text, whole, out = turns(without_eos(any_model), ids, mask, make_batch(T=3, side="none", seed=1)[0])
    choice = idp_reference(any_model, prompts, ids, mask)[1]
    assert out[:, -4:].tolist() == greedy_from_scratch(any_model, prompts, text, whole, 4, choice)[0].tolist()


def go_on(model, cache, ids):
    return model(ids, **{CACHE: cache}, use_cache=True).logits


def select(cache, rows):
    """As evaluate.py:rows_of does."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(rows)
    return part


MOVES = {"copy": lambda c: copy.copy(c), "deepcopy": lambda c: copy.deepcopy(c), "select": lambda c: select(c, ROWS),
         "reorder": lambda c: c.reorder_cache(ROWS), "select here": lambda c: c.batch_select_indices(ROWS),
         "repeat": lambda c: c.batch_repeat_interleave(2), "crop": lambda c: c.crop(-2)}
ROWS = torch.tensor([5, 3, 3, 0])


@pytest.mark.parametrize("move", sorted(MOVES))
@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "gpt2"])
def test_the_choice_follows_its_rows(name, move):
    """Whatever moves the rows of a cache, or shortens it, going on equals one pass with the choice of each row."""
    model = tiny_model(name)
    prompts, (ids, _) = make_prompts(model), make_batch(T=7, side="none")
    bank, more = PromptBank.from_prompts(model, prompts), make_batch(T=3, side="none", seed=1)[0]
    rows = {"select": ROWS, "reorder": ROWS, "select here": ROWS, "repeat": torch.arange(6).repeat_interleave(2)}
    rows = rows.get(move, torch.arange(6))
    with attach_idp(model, bank) as idp:
        cache = DynamicCache(config=model.config)
        model(ids, **{CACHE: cache})                       # a cache of the caller's own is filled
        whole, choice = copy.deepcopy(cache), idp.choice[:, rows]
        cache = MOVES[move](cache) or cache
        assert len(set(choice.flatten().tolist())) > 1 and cache.get_seq_length() == (5 if move == "crop" else 7)
        logits = go_on(model, cache, more[rows])
        assert [layer.choice.tolist() for layer in cache.layers] == choice.tolist()
        again = go_on(model, whole, more)                  # the copy from before is as it was
    text = torch.cat([ids[rows, :cache.get_seq_length() - 3], more[rows]], 1)
    with under(model, bank, choice):
        assert_same(logits, model(text).logits[:, -3:], torch.ones_like(more[rows]))
    with under(model, bank, idp.choice):
        assert_same(again, model(torch.cat([ids, more], 1)).logits[:, -3:], torch.ones_like(more))


def test_a_reset_cache_chooses_anew(any_model):
    bank, (ids, _) = PromptBank.from_prompts(any_model, make_prompts(any_model)), make_batch(side="none")
    with attach_idp(any_model, bank):
        cache = any_model(ids, use_cache=True)[CACHE]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(go_on(any_model, cache, ids.flip(0)), any_model(ids.flip(0)).logits)


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model", "itself"])
def test_assisted_decoding(any_model, how):
    """The first pass holds guesses beside the input: they have no say in the choice."""
    prompts, model = make_prompts(any_model), without_eos(any_model)
    bank, assistant = PromptBank.from_prompts(model, prompts), without_eos(tiny_model("llama", seed=1))
    extra = {"prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
             "assistant_model": {"assistant_model": assistant}, "itself": {"assistant_model": model}}[how]
    for row in range(3):
        ids = make_batch(B=1, T=4, side="none", seed=row)[0].repeat(1, 2)                      # repeats: something to look up
        with attach_idp(model, bank) as idp:
            out = model.generate(ids, max_new_tokens=8, do_sample=False, **extra)
        expected, choice = greedy_from_scratch(model, prompts, ids, torch.ones_like(ids), 8)
        assert idp.choice.tolist() == choice.tolist() and out[:, -8:].tolist() == expected.tolist()


def test_zero_keys_are_not_padding():
    """A pruned head whose keys are all zero leaves the passes after the first as they should be."""
    model = tiny_model("llama")
    model.model.layers[0].self_attn.k_proj.weight[:8] = 0
    bank, (ids, _) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(side="none")
    with attach_idp(model, bank) as idp:
        cache = model(ids[:, :6], use_cache=True)[CACHE]
        logits, choice = go_on(model, cache, ids[:, 6:]), idp.choice
    with under(model, bank, choice):
        assert_same(logits, model(ids).logits[:, 6:], torch.ones_like(ids[:, 6:]))


def test_long_chunks_at_prefill_and_short_ones_later():
    """prefill_chunk_size may split a later turn, not the input that chooses."""
    model = without_eos(tiny_model("llama"))
    prompts, (ids, mask) = make_prompts(model), make_batch(side="left")
    more, bank = make_batch(T=9, side="none", seed=1)[0], PromptBank.from_prompts(model, prompts)
    with attach_idp(model, bank):
        text, whole, out = turns(model, ids, mask, more, prefill_chunk_size=10)
        with pytest.raises(ValueError, match="by its whole input: no chunks"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=4)
    choice = idp_reference(model, prompts, ids, mask)[1]
    assert out[:, -4:].tolist() == greedy_from_scratch(model, prompts, text, whole, 4, choice)[0].tolist()


@pytest.mark.parametrize("lengths, side, masked", [((4, 4), "none", False), ((4, 4), "left", True), ((3, 4), "none", True)])
def test_no_mask_where_nothing_is_hidden(any_model, lengths, side, masked):
    """A step of generate has no mask, which rules fast kernels out, unless padding or a short prompt needs it."""
    masks, kernel = [], sdpa_attention_forward
    spy = lambda module, q, k, v, mask, **more: masks.append((q.shape[2], mask)) or kernel(module, q, k, v, mask, **more)
    prompts, (ids, mask) = make_prompts(any_model, lengths), make_batch(side=side)
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts), attend=spy):
        without_eos(any_model).generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    steps = [mask is not None for T, mask in masks if T == 1]
    assert len(steps) == 2 * any_model.config.num_hidden_layers and set(steps) == {masked}


def test_a_mask_of_ones_and_then_zeros(any_model):
    """A loop of one's own may hide a token at any time: equal to a pass with that mask."""
    bank, (ids, _) = PromptBank.from_prompts(any_model, make_prompts(any_model, (4, 4))), make_batch(side="none")
    holes = torch.ones_like(ids)
    holes[:, 2] = 0
    with attach_idp(any_model, bank, "fixed"):
        cache = any_model(ids[:, :9], use_cache=True)[CACHE]
        positions = torch.full((6, 1), 9)
        step = lambda mask: any_model(ids[:, 9:], attention_mask=mask, position_ids=positions,
                                      **{CACHE: copy.deepcopy(cache)}).logits
        plain, hidden, ones = step(None), step(holes), step(torch.ones_like(ids))
        assert_same(plain, any_model(ids).logits[:, 9:], torch.ones_like(ids[:, 9:]))
    assert torch.equal(plain, ones) and (plain - hidden).abs().max() > 1e-3


def test_losers_leave_the_cache(any_model):
    prompts, (ids, mask) = make_prompts(any_model), make_batch()
    bank = PromptBank.from_prompts(any_model, prompts)
    with attach_idp(any_model, bank) as idp:
        cache = any_model(ids, attention_mask=mask, use_cache=True)[CACHE]
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == bank.N + ids.shape[1]
        assert torch.equal(layer.keys[:, :, :bank.N], bank.keys[i][idp.choice[i]])
        assert torch.equal(layer.values[:, :, :bank.N], bank.values[i][idp.choice[i]])


def test_continuing_a_cache_in_chunks(any_model):
    """Prefill, then two chunks of several tokens, equals one pass with the prefill's choice; also with repeated rows."""
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    ids, _ = make_batch(T=12, side="none")
    with attach_idp(any_model, bank) as idp:
        first = any_model(ids[:, :5], use_cache=True)
        choice, cache = idp.choice, first[CACHE]
        cache.batch_repeat_interleave(2)
        twice = ids.repeat_interleave(2, 0)
        rest = [any_model(twice[:, a:b], **{CACHE: cache}, use_cache=True).logits for a, b in ((5, 6), (6, 9), (9, 12))]
    with under(any_model, bank, choice):
        whole = any_model(ids).logits
    assert_same(torch.cat([first.logits, torch.cat(rest, 1)[::2]], 1), whole, torch.ones_like(ids))


# --- training, refusals, the model afterwards --------------------------------------------------------------------------------

def test_gradients_flow_to_a_bank_and_to_weights():
    """Autograd through the fused pass equals autograd through the prompt as embeddings."""
    model = tiny_model("llama")
    P, (ids, _) = make_prompts(model, (4,))[0], make_batch(side="none")
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    bank = PromptBank.from_prompts(model, [P])
    bank.keys[0].requires_grad_(True)
    with attach_idp(model, bank):
        model(ids, labels=ids).loss.backward()
    fused, weight.grad = weight.grad, None
    assert bank.keys[0].grad.abs().sum() > 0
    with torch.no_grad():
        prefix = copy.deepcopy(prompt_cache(model, P, 4))
    cache = DynamicCache([(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1)) for k, v in prefix])
    model(ids, **{CACHE: cache}, labels=ids).loss.backward()
    assert torch.allclose(fused, weight.grad, atol=1e-6)


def test_refusals():
    model = tiny_model("llama")
    prompts, (ids, _) = make_prompts(model), make_batch()
    bank = PromptBank.from_prompts(model, prompts)
    for bad in ([], [torch.zeros(3, 7)], [torch.zeros(0, 32)], [torch.zeros(32)]):
        with pytest.raises(ValueError, match="prompts must be"):
            PromptBank.from_prompts(model, bad)
    with pytest.raises(ValueError, match="mean_attention"), attach_idp(model, bank, "nonsense"):
        pass
    with attach_idp(model, bank):
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids, attention_mask=torch.ones(6, 18))
        with pytest.raises(ValueError, match="exceed 128 positions"):
            model(torch.ones(1, 125, dtype=torch.long))
        with pytest.raises(RuntimeError, match="call the model"):
            model.model(ids)
    plain = model(ids, use_cache=True)[CACHE]
    with attach_idp(model, bank), pytest.raises(ValueError, match="not filled by this bank"):
        model(ids[:, :1], **{CACHE: plain})
    model.gradient_checkpointing_enable()
    model.train()
    with attach_idp(model, bank), pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids)


@pytest.mark.parametrize("last", ["attention_mask", "position_ids"])
def test_arguments_by_position(any_model, last):
    """They bind as in the plain model, whose order differs: GPT-2 takes the cache second."""
    prompts, (ids, mask) = make_prompts(any_model), make_batch()
    names = list(inspect.signature(any_model.forward).parameters)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected, choice = idp_reference(any_model, prompts, ids, mask)
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts)) as idp:
        position = names[:max(names.index(name) for name in ("input_ids", "attention_mask", last)) + 1]
        logits = any_model(*(given.get(name) for name in position)).logits
        with pytest.raises(TypeError, match="multiple values"):
            any_model(ids, input_ids=ids)
    assert idp.choice.tolist() == choice.tolist()
    assert_same(logits, expected, mask)


def test_attention_features(any_model):
    """What models hand on to attention is understood or refused by name, never dropped."""
    prompts, (ids, mask) = make_prompts(any_model), make_batch()
    expected, _ = idp_reference(any_model, prompts, ids, mask)
    with attach_idp(any_model, PromptBank.from_prompts(any_model, prompts), attend=eager_attention):
        out = any_model(ids, attention_mask=mask, labels=ids, num_items_in_batch=torch.tensor(9), use_cache=True,
                        output_attentions=True, output_hidden_states=True, return_dict=True, softcap=None)
        for name, value in {"softcap": 30.0, "s_aux": torch.zeros(4), "is_causal": False}.items():
            with pytest.raises(ValueError, match=f"does not know what .*{name}"):
                any_model(ids, attention_mask=mask, **{name: value})
    assert_same(out.logits, expected, mask)
    assert len(out.attentions) == any_model.config.num_hidden_layers and out.loss.isfinite()


def test_room(any_model):
    """128 positions: 8 prompt and 120 input tokens fit, one more does not, and the words say the numbers."""
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    with attach_idp(any_model, bank):
        assert any_model(torch.full((1, 120), 5)).logits.isfinite().all()
        with pytest.raises(ValueError, match="8 prompt tokens and 121 of input exceed 128 positions"):
            any_model(torch.full((1, 121), 5))
        cache = any_model(torch.full((1, 119), 5), use_cache=True)[CACHE]
        go_on(any_model, cache, torch.full((1, 1), 5))
        with pytest.raises(ValueError, match="8 prompt tokens and 121 of input"):
            go_on(any_model, cache, torch.full((1, 1), 5))


def test_the_window_is_room_too():
    """A sliding window as long as prompt and input is seen whole; one token more would push the prompt out."""
    model = tiny_model("mistral")
    prompts, (ids, mask) = make_prompts(model), make_batch(side="none")
    bank = PromptBank.from_prompts(model, prompts)
    expected, _ = idp_reference(model, prompts, ids, mask)                                     # before the window is short
    model.config.sliding_window = 18
    with attach_idp(model, bank):
        cache = DynamicCache(config=model.config)
        assert_same(model(ids, **{CACHE: cache}).logits, expected, mask)
        with pytest.raises(ValueError, match="exceed 18 positions"):
            go_on(model, cache, ids[:, :1])


def test_prompts_must_be_finite():
    model = tiny_model("llama")
    prompts = make_prompts(model)
    for value in (float("nan"), float("inf")):
        prompts[1][2, 3] = value
        with pytest.raises(ValueError, match="prompts must be finite numbers in .*float32"):
            PromptBank.from_prompts(model, prompts)
    prompts[1][2, 3] = 1e30                                # fits float32, not float16
    PromptBank.from_prompts(model, prompts)
    with pytest.raises(ValueError, match="finite numbers in .*float16"):
        PromptBank.from_prompts(model.half(), prompts)


class OwnCache(DynamicCache):
    """A cache class that attach_idp cannot know."""


@pytest.mark.parametrize("how", ["static", "offloaded", "quantized", "paged"])
def test_cache_implementations_are_refused(how):
    """By the first pass, or by others: transformers lacks a package for "quantized" and has no "paged" attention of this
    name, and torch, in older releases, wants a GPU for "offloaded".
    """
    model = tiny_model("llama")
    others = {"quantized": "install", "paged": "idp.* is not supported", "offloaded": "CUDA"}
    words = f"needs a DynamicCache|{others.get(how, 'needs a DynamicCache')}"
    with attach_idp(model, PromptBank.from_prompts(model, make_prompts(model))):
        with pytest.raises((ValueError, ImportError, RuntimeError), match=words):
            model.generate(make_batch()[0], max_new_tokens=2, cache_implementation=how)


def test_refusals_of_caches_and_generate():
    """Each in words, and before the model computes anything."""
    model = tiny_model("llama")
    bank, (ids, _) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(side="none")
    other = PromptBank.from_prompts(model, make_prompts(model))
    with attach_idp(model, bank):
        cache = model(ids, use_cache=True)[CACHE]
        passes = []
        hook = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
        for bad in (OwnCache(), StaticCache(config=model.config, max_cache_len=32)):
            with pytest.raises(ValueError, match=f"needs a DynamicCache .* got {type(bad).__name__}"):
                go_on(model, bad, ids)
        for some_mask in (None, torch.ones_like(ids)):
            with pytest.raises(ValueError, match="no second input or cache|must be .B, past"):     # each step reads every token
                model.generate(ids, max_new_tokens=2, attention_mask=some_mask, **{"use_cache": False, CACHE: cache})
        assert not passes
        within = lambda text, scores: scores + go_on(model, None, text)[:, -1]                 # a processor that runs the model
        for second in (dict(logits_processor=[within]), dict(guidance_scale=2.0), dict(guidance_scale=2.0, use_cache=False)):
            with pytest.raises(ValueError, match="no second input or cache"):
                model.generate(ids, max_new_tokens=2, **second)
        passes.clear()                                     # the input itself had its pass
        for gone in (-10, -11, 3):
            with pytest.raises(ValueError, match="crop takes -n"):
                cache.crop(gone)
        with pytest.raises(ValueError, match="for 2 rows"):
            go_on(model, cache, ids[:2])
        with pytest.raises(ValueError, match="already"), attach_idp(model, bank):
            pass
        hook.remove()
        assert not passes
    with pytest.raises(ValueError, match="go on under attach_idp"):
        go_on(model, cache, ids)
    with attach_idp(model, other), pytest.raises(ValueError, match="not filled by this bank"):
        go_on(model, cache, ids)
    with attach_idp(model, bank):                          # the same bank, attached again
        go_on(model, cache, ids)


def test_a_pass_that_failed_leaves_no_cache_to_go_on_with():
    model = tiny_model("llama")
    with attach_idp(model, PromptBank.from_prompts(model, make_prompts(model))):
        cache, ids = DynamicCache(), make_batch()[0]
        with pytest.raises(ValueError, match="softcap"):
            model(ids, **{CACHE: cache}, softcap=1.0)
        with pytest.raises(ValueError, match="to the end"):
            go_on(model, cache, ids)


def test_model_is_left_as_it_was(any_model):
    ids, mask = make_batch()
    before = any_model(ids, attention_mask=mask).logits
    implementation = any_model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attach_idp(any_model, PromptBank.from_prompts(any_model, make_prompts(any_model))):
        any_model(ids, attention_mask=mask)
        1 / 0
    assert any_model.config._attn_implementation == implementation and "generate" not in vars(any_model)
    assert torch.equal(any_model(ids, attention_mask=mask).logits, before)


def test_prompt_losses(any_model):
    """Against one sequence at a time, one prompt at a time."""
    prompts, (ids, mask) = make_prompts(any_model), make_batch(side="right")
    losses = prompt_losses(any_model, PromptBank.from_prompts(any_model, prompts), ids, mask)
    embed, N = any_model.get_input_embeddings(), 8
    for b in range(len(ids)):
        row = ids[b, mask[b].bool()]
        for k, P in enumerate(prompts):
            positions = torch.arange(N - len(P), N + len(row))[None]
            logits = any_model(inputs_embeds=torch.cat([P, embed(row)])[None], position_ids=positions).logits[0, len(P):-1]
            assert torch.isclose(losses[b, k], F.cross_entropy(logits, row[1:]), atol=1e-4, rtol=1e-5)


def test_half_precision_chooses_like_single():
    model = tiny_model("llama")
    prompts, (ids, mask) = make_prompts(model), make_batch(B=16)
    with attach_idp(model, PromptBank.from_prompts(model, prompts)) as idp:
        model(ids, attention_mask=mask)
        single = idp.choice
    model.bfloat16()
    with attach_idp(model, PromptBank.from_prompts(model, prompts)) as idp:
        logits = model(ids, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert (idp.choice == single).float().mean() >= 0.8    # near-ties may flip


@pytest.mark.skipif(not torch.cuda.is_available() or not torch.version.cuda, reason="needs a CUDA device of CUDA's own")
@pytest.mark.parametrize("lengths", [(4, 4, 4), LENGTHS])
@pytest.mark.parametrize("selector", ["mean_attention", "total_attention", "max_attention", "last_token", "random", "fixed"])
def test_the_host_never_waits_on_cuda(selector, lengths):
    """Neither to choose nor at a later token, as long as the loop itself asks nothing of the device."""
    model = tiny_model("llama")
    prompts = [P.to("cuda") for P in make_prompts(model, lengths)]
    bank = PromptBank.from_prompts(model.to("cuda"), prompts)
    ids = make_batch(side="none")[0].to("cuda")
    with attach_idp(model, bank, selector):
        try:
            torch.cuda.set_sync_debug_mode("error")
            out = model(ids, use_cache=True)
            for _ in range(3):
                out = model(out.logits[:, -1:].argmax(-1), **{CACHE: out[CACHE]}, use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert out.logits.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_law_on_cuda():
    model = tiny_model("llama")
    prompts = [P.to("cuda") for P in make_prompts(model)]
    model.to("cuda")
    ids, mask = (x.to("cuda") for x in make_batch())
    expected, choice = idp_reference(model, prompts, ids, mask)
    with attach_idp(model, PromptBank.from_prompts(model, prompts)) as idp:
        logits = model(ids, attention_mask=mask).logits
    assert idp.choice.tolist() == choice.tolist()
    assert_same(logits, expected, mask, tolerance=1e-4)


def test_demo_runs():
    """As `python idp_minimal.py` runs it, in a child of this process, which has imported everything already."""
    def script(argv):
        sys.argv = ["idp_minimal.py", *argv]
        runpy.run_path(str(ROOT / "idp_minimal.py"), run_name="__main__")
    code, text = run_forked(script, [])
    fused, slow = text.split("slow reference:")
    assert code == 0 and slow.split("largest")[0].split() == fused.split("fused pass:")[1].split()
    assert "fused pass against" in run_forked(script, ["--help"])[1]
