"""The law of IDP: the fused pass equals running each input with its chosen prompt alone, on every architecture."""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from choosing import prompt_losses
from conftest import ROOT, tiny_model
from idp_minimal import (CACHE, SELECTORS, PromptBank, attach_idp, attention_to_prompts, idp_reference, prompt_cache,
                         reference_choice)

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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
def test_law(any_model, side, attention):
    prompts = make_prompts(any_model)
    ids, mask = make_batch(side=side)
    bank = PromptBank.from_prompts(any_model, prompts)
    expected, choice = idp_reference(any_model, prompts, ids, mask)
    with attach_idp(any_model, bank, attention=attention) as idp:
        for call in range(3):                              # a cache that leaks shows at the second call
            logits = any_model(ids, attention_mask=mask).logits
            assert idp.choice.tolist() == choice.tolist(), f"call {call}"
            assert_same(logits, expected, mask)


def test_law_is_not_trivial(any_model):
    """The batches above must make different choices, and the choice must matter, or the law proves nothing."""
    bank = PromptBank.from_prompts(any_model, make_prompts(any_model))
    ids, mask = make_batch(B=24, T=6)
    with attach_idp(any_model, bank) as idp:
        chosen = any_model(ids, attention_mask=mask).logits
    assert len(set(idp.choice.tolist())) > 1
    with attach_idp(any_model, bank, "fixed", k=0):
        fixed = any_model(ids, attention_mask=mask).logits
    assert (chosen - fixed).abs().max() > 1e-2


def test_choice_by_hand(any_model):
    """argmax of a mean attention computed here from A itself, for equal and unequal lengths."""
    prompts = make_prompts(any_model)
    bank = PromptBank.from_prompts(any_model, prompts)
    ids, mask = make_batch(side="none")
    with attach_idp(any_model, bank) as idp:
        any_model(ids, attention_mask=mask)
    assert idp.choice.tolist() == [reference_choice(any_model, prompts, row[None]) for row in ids]


def test_attention_to_prompts_is_one_softmax():
    torch.manual_seed(0)
    B, h, h_kv, T, S, d_k = 2, 4, 2, 5, 7, 8
    q, k, K_p = torch.randn(B, h, T, d_k), torch.randn(B, h_kv, T, d_k), torch.randn(h_kv, S, d_k)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = h // h_kv, True
    A = attention_to_prompts(module, q, k, K_p, mask, scaling=0.3)
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
    A = torch.rand(2, 3, 4, 5)                             # (B, h, T, S)
    owner, real = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    scores = SELECTORS[selector](A, real, owner)
    for b in range(2):
        n = int(real[b].sum())
        for k in range(2):
            block = A[b, :, :n][:, :, owner == k]          # (h, n, n_k)
            expected = {"mean_attention": block.mean(), "max_attention": block.max(), "last_token": block[:, -1].mean(),
                        "total_attention": block.sum(-1).mean()}[selector]
            assert torch.isclose(scores[b, k], expected, atol=1e-6)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_selector_obeys_the_law(selector):
    """Whatever the rule chose, the logits are those of that prompt alone; the same holds after generate."""
    model = tiny_model("llama")
    prompts, (ids, mask) = make_prompts(model), make_batch()
    bank = PromptBank.from_prompts(model, prompts)
    options = {"fixed": {"k": 1}, "random": {"generator": torch.Generator().manual_seed(0)},
               "oracle": {"loss": prompt_losses(model, bank, ids, mask)}}.get(selector, {})
    with attach_idp(model, bank, selector, **options) as idp:
        logits = model(ids, attention_mask=mask).logits
    assert idp.scores.shape == (6, 3) and idp.choice.tolist() == idp.scores.argmax(1).tolist()
    for b, k in enumerate(idp.choice.tolist()):            # run alone, at the position that belongs to N = 8
        with attach_idp(model, bank, "fixed", k=k):
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
    assert [order[k] for k in idp.choice.tolist()] == choice.tolist()
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
            assert idp.choice.item() == choice[b].item()
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

def greedy_from_scratch(model, prompts, ids, mask, tokens):
    """Recompute everything for every token: the prompt chosen at prefill, as embeddings, no cache."""
    _, choice = idp_reference(model, prompts, ids, mask)
    embed, N, rows = model.get_input_embeddings(), max(map(len, prompts)), []
    for b, k in enumerate(choice.tolist()):
        row = ids[b, mask[b].bool()][None]
        for _ in range(tokens):
            E = torch.cat([prompts[k][None], embed(row)], 1)
            positions = torch.arange(N - len(prompts[k]), N + row.shape[1])[None]
            row = torch.cat([row, model(inputs_embeds=E, position_ids=positions).logits[:, -1].argmax(-1)[None]], 1)
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
@pytest.mark.parametrize("how", [dict(num_beams=3), dict(do_sample=True), dict(num_beams=2, do_sample=True)])
def test_sampling_and_beams_agree_with_no_cache(name, how):
    """The cached generation equals one that recomputes the whole sequence, choice included, at each step."""
    model = without_eos(tiny_model(name))
    bank, (ids, mask) = PromptBank.from_prompts(model, make_prompts(model)), make_batch(side="left")
    with attach_idp(model, bank) as idp:
        model(ids, attention_mask=mask)
        choice = idp.choice.repeat_interleave(how.get("num_beams", 1))
        torch.manual_seed(0)
        cached = model.generate(ids, attention_mask=mask, max_new_tokens=5, **how)
    oracle = -F.one_hot(choice, bank.m).float()            # the same choice, kept at every recomputation
    with attach_idp(model, bank, "oracle", loss=oracle):
        torch.manual_seed(0)
        recomputed = model.generate(ids, attention_mask=mask, max_new_tokens=5, use_cache=False, **how)
    assert cached.tolist() == recomputed.tolist()


def test_losers_leave_the_cache(any_model):
    prompts, (ids, mask) = make_prompts(any_model), make_batch()
    bank = PromptBank.from_prompts(any_model, prompts)
    with attach_idp(any_model, bank) as idp:
        cache = any_model(ids, attention_mask=mask, use_cache=True)[CACHE]
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == bank.N + ids.shape[1]
        assert torch.equal(layer.keys[:, :, :bank.N], bank.keys[i][idp.choice])
        assert torch.equal(layer.values[:, :, :bank.N], bank.values[i][idp.choice])


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
    with attach_idp(any_model, bank, "oracle", loss=-F.one_hot(choice, bank.m).float()):
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
    from transformers import DynamicCache
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
        with pytest.raises(ValueError, match="exceed the model's limit"):
            model(torch.ones(1, 125, dtype=torch.long))
        with pytest.raises(RuntimeError, match="call the model"):
            model.model(ids)
    plain = model(ids, use_cache=True)[CACHE]
    with attach_idp(model, bank), pytest.raises(ValueError, match="without this prompt bank"):
        model(ids[:, :1], **{CACHE: plain})
    model.gradient_checkpointing_enable()
    model.train()
    with attach_idp(model, bank), pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids)


def test_model_is_left_as_it_was(any_model):
    ids, mask = make_batch()
    before = any_model(ids, attention_mask=mask).logits
    implementation = any_model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attach_idp(any_model, PromptBank.from_prompts(any_model, make_prompts(any_model))):
        any_model(ids, attention_mask=mask)
        1 / 0
    assert any_model.config._attn_implementation == implementation
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
    out = subprocess.run([sys.executable, str(ROOT / "idp_minimal.py")], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    fused, slow = (line.split(":")[1] for line in out.stdout.splitlines() if line.startswith("chosen"))
    assert fused.strip() == slow.strip()
