"""Contract tests over METHODS without the training loop: a new remedy is graded without editing a test."""
import argparse
import copy

import pytest
import torch
import torch.nn as nn
from transformers import DynamicCache

from conftest import CONFIGS, tiny_model
from idp_minimal import CACHE, PromptBank, attach_idp
from methods.lora import LoRA, LoRALinear
from methods.losses import NoCache, TokenDivergences, TokenLosses, row_losses
from methods.prompts import SoftPrompts
from methods.registry import METHODS, load_adapter
from support.cli import FLAGS, UserError

ARGS = argparse.Namespace(**{name: flag.default for name, flag in FLAGS.items()})
ARGS.__dict__.update(prompt_length=4, prompt_lengths=[2, 4], rank=2, alpha=4)


def build(name, model, seed=0):
    """A method with small settings, as the command line would build it."""
    row = METHODS[name]
    return row.build(model, **row.settings(ARGS), seed=seed)


def ids_of(rows, tokens):
    """Token ids, the same each time."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))


def slow_losses(logits, ids):
    """The twin of row_losses: from the logits (B, T, V) of the whole row. -> (B,)."""
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return -logp[..., 0].mean(1)


# --- Every method ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_all_that_is_particular_to_a_method(name):
    row = METHODS[name]
    assert set(row.flags) <= set(FLAGS) and (row.sizes is None or row.sizes[0] in row.flags)
    if row.rates is None:                                  # nothing is trained
        assert callable(build(name, tiny_model("llama")).observe)
    else:
        assert set(row.rates) == {"toy", "other"} and all(0 < rate < 1 for rate in row.rates.values())
    readers = {other.read for other in METHODS.values() if other.peft_type == row.peft_type}
    assert readers == {row.read}, "whose is a folder?"


@pytest.mark.parametrize("name", METHODS)
def test_save_load_same_logits(name, any_model, tmp_path):
    method, ids = build(name, any_model), ids_of(5, 9)
    with torch.no_grad():
        for tensor in method.tensors().values():           # away from the start, LoRA's B included
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        with method.inference():
            expected = any_model(ids).logits
        method.save(tmp_path / "adapter")
        again = load_adapter(any_model, tmp_path / "adapter")
        assert isinstance(method, type(again)) and again.tensors().keys() == method.tensors().keys()
        with again.inference():
            assert torch.equal(any_model(ids).logits, expected)
        assert not torch.allclose(any_model(ids).logits, expected, atol=1e-3), "the adapter does nothing"


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_that_is_trained_is_the_loss_that_is_used(name, any_model):
    """losses() has a fast way of its own; inference() is what evaluation sees. One prompt: no choice."""
    method = SoftPrompts(any_model, [5]) if name == "idp" else build(name, any_model)
    ids = ids_of(4, 10)
    with torch.no_grad():
        with method.inference():
            used = slow_losses(any_model(ids).logits, ids)
        with method.training():
            assert torch.allclose(method.losses(ids), used, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_seeds_decide_the_start(name):
    first, same, other = (build(name, tiny_model("llama"), seed).tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    if name in ("prompt", "prefix", "idp", "lora"):        # a remedy may also start from the same place always
        assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_as_before_whatever_happens_inside(name):
    model, ids = tiny_model("llama"), ids_of(2, 7)
    before, method = model(ids).logits, build(name, model)
    for context in (method.training, method.inference):
        with pytest.raises(ZeroDivisionError), context():
            1 / 0
    assert torch.equal(model(ids).logits, before)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_trainable_count_is_the_formula():
    model = tiny_model("llama")                            # d 32, 3 layers, h_kv d_k = 16
    count = {name: sum(t.numel() for t in build(name, model).tensors().values()) for name in METHODS}
    assert count["prompt"] == 4 * 32                       # n d
    assert count["idp"] == (2 + 4) * 32                    # sum n_k d
    assert count["prefix"] == 3 * 2 * 16 * 4               # L 2 h_kv d_k n
    assert count["lora"] == 3 * 2 * ((32 + 32) + (32 + 16))  # L r (in + out), q_proj and v_proj


# --- The loss -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [5, TokenLosses.CHUNK, 2 * TokenLosses.CHUNK + 3])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_equal_cross_entropy_and_so_do_their_gradients(tokens, bias):
    torch.manual_seed(0)
    head, targets = nn.Linear(6, 50, bias=bias).double().requires_grad_(False), torch.randint(50, (tokens,))
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, dtype=torch.float64)      # rows count differently, as in an unequal batch
    ours = TokenLosses.apply(hidden, targets, head)
    gradient, = torch.autograd.grad((ours * weights).sum(), hidden)
    slow = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(ours.double(), slow, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad((slow * weights).sum(), hidden)[0], atol=1e-6)


@pytest.mark.parametrize("tokens", [5, TokenLosses.CHUNK, 2 * TokenLosses.CHUNK + 3])
@pytest.mark.parametrize("bias", [False, True])
def test_token_divergences_equal_kl_div_and_so_do_their_gradients(tokens, bias):
    """Of a teacher of another width, too: only the vocabulary is shared."""
    torch.manual_seed(0)
    head, dense_head = (nn.Linear(d, 50, bias=bias).double().requires_grad_(False) for d in (6, 9))
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    dense, weights = torch.randn(tokens, 9, dtype=torch.float64), torch.rand(tokens, dtype=torch.float64)
    ours = TokenDivergences.apply(hidden, dense, head, dense_head)
    gradient, = torch.autograd.grad((ours * weights).sum(), hidden)
    student, teacher = head(hidden).log_softmax(1), dense_head(dense).log_softmax(1)
    slow = nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
    assert torch.allclose(ours.double(), slow, atol=1e-5) and (slow > 0.01).all()
    assert torch.allclose(gradient, torch.autograd.grad((slow * weights).sum(), hidden)[0], atol=1e-5)


def test_a_model_diverges_from_itself_by_nothing():
    head, hidden = nn.Linear(6, 50).requires_grad_(False), torch.randn(9, 6, requires_grad=True)
    losses = TokenDivergences.apply(hidden, hidden.detach(), head, head)
    gradient, = torch.autograd.grad(losses.sum(), hidden)
    assert losses.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def slow_divergences(dense, logits):
    """The twin of distill: mean KL of the next-token distributions. dense, logits (B, T, V) -> (B,)."""
    p, q = dense[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(1)


@pytest.mark.parametrize("name", METHODS)
def test_distill_compares_what_is_used_with_the_dense_model(name, any_model):
    """The teacher runs as it is, without prompt or adapter, and its gradient is nobody's."""
    method = SoftPrompts(any_model, [5]) if name == "idp" else build(name, any_model)
    teacher, ids = copy.deepcopy(any_model), ids_of(4, 10)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
        with method.inference():
            used = slow_divergences(teacher(ids).logits, any_model(ids).logits)
        with method.training():
            assert torch.allclose(method.losses(ids, teacher=teacher), used, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(method.losses(ids), used, rtol=0.1), "the text's loss is another"


def test_the_teacher_reads_each_row_once(monkeypatch):
    """m prompts learn from the same B rows: every row under every prompt, against one reading of the dense model."""
    method, teacher, ids = build("idp", tiny_model("llama")), tiny_model("llama", seed=1), ids_of(4, 10)
    expected = torch.cat([method.losses(ids, torch.full((4,), k), teacher) for k in range(2)])
    seen, forward = [], teacher.base_model.forward
    monkeypatch.setattr(teacher.base_model, "forward", lambda rows, **kwargs: seen.append(rows) or forward(rows, **kwargs))
    assert torch.allclose(method.losses(ids, teacher=teacher), expected, atol=1e-5)
    assert len(seen) == 1 and torch.equal(seen[0], ids[:, :-1])


def test_uniform_model_loses_log_vocabulary():
    head = nn.Linear(6, 50, bias=False).requires_grad_(False)
    nn.init.zeros_(head.weight)
    losses = TokenLosses.apply(torch.randn(9, 6), torch.randint(50, (9,)), head)
    assert torch.allclose(losses, torch.tensor(50.0).log())


def test_which_tokens_count():
    """counted picks among the tokens that follow another: of the last one alone, the loss is that token's."""
    model, ids = tiny_model("llama"), ids_of(3, 8)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.allclose(row_losses(model, ids), slow_losses(logits, ids), atol=1e-5)
        last = row_losses(model, ids, slice(-1, None))
        assert torch.allclose(last, slow_losses(logits[:, -2:], ids[:, -2:]), atol=1e-5)
        teacher = tiny_model("llama", seed=1)
        last = row_losses(model, ids, slice(-1, None), teacher)
        assert torch.allclose(last, slow_divergences(teacher(ids).logits[:, -2:], logits[:, -2:]), atol=1e-5)


def test_a_cache_that_keeps_nothing_changes_nothing(any_model):
    cache, ids = NoCache(), ids_of(3, 8)
    with torch.no_grad():
        assert torch.equal(row_losses(any_model, ids, **{CACHE: cache}), row_losses(any_model, ids, use_cache=False))
    assert not cache.layers


def test_a_head_to_be_trained_is_refused_rather_than_left_out():
    model = tiny_model("opt")
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head"):
        row_losses(model, ids_of(2, 6))


# --- Prompts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_training_and_inference_see_the_same_prompt(arch):
    """The loss in training (embeddings) is that in inference (bank), for prompts of unequal lengths."""
    model, ids = tiny_model(arch), ids_of(4, 10)
    method = build("idp", model)
    bank = PromptBank.from_prompts(model, [P.detach() for P in method.prompts])
    with torch.no_grad():
        for k in range(2):
            trained = method.losses(ids, owner=torch.full((4,), k))
            with attach_idp(model, bank, "fixed", k=k):
                used = slow_losses(model(ids).logits, ids)
            assert torch.allclose(trained, used, atol=1e-4, rtol=1e-5)


def test_a_step_makes_no_constant(monkeypatch):
    """torch.tensor on a device is a copy that has to be waited for; what a step needs is made beforehand."""
    method, ids = build("idp", tiny_model("llama")), ids_of(4, 10)
    expected = method.losses(ids)
    made, plain = [], torch.tensor

    def counting(*args, **kwargs):
        """torch.tensor; what is made is noted, but for the empty tensors of a new DynamicCache."""
        if args[0] != []:
            made.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counting)
    assert torch.equal(method.losses(ids), expected) and not made


def test_prefix_equals_a_plain_cache():
    model, ids = tiny_model("llama"), ids_of(3, 8)
    method = build("prefix", model)
    pairs = [(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in zip(method.keys, method.values)]
    with torch.no_grad():
        logits = model(ids, **{CACHE: DynamicCache(pairs)}).logits
        assert torch.allclose(method.losses(ids), slow_losses(logits, ids), atol=1e-5)


# --- LoRA -----------------------------------------------------------------------------------------------

def test_lora_is_the_identity_at_step_0(any_model):
    ids = ids_of(2, 7)
    before, method = any_model(ids).logits, build("lora", any_model)
    for context in (method.training, method.inference):
        with context():
            assert torch.equal(any_model(ids).logits, before)
        with context(), torch.no_grad():
            assert torch.equal(any_model(ids).logits, before)


@pytest.mark.parametrize("rslora, scaling", [(False, 6 / 4), (True, 6 / 2)])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lora_by_hand_and_merged(arch, rslora, scaling):
    """y = x (W + s B A)^T; merging gives the same outputs, twice is once, unmerging returns W bit for bit."""
    torch.manual_seed(0)
    linear = tiny_model(arch).transformer.h[0].attn.c_attn if arch == "gpt2" else nn.Linear(32, 5)
    layer, x = LoRALinear(linear, r=4, alpha=6, rslora=rslora), torch.randn(3, 32)
    nn.init.normal_(layer.B)
    W = linear.weight.T if arch == "gpt2" else linear.weight
    by_hand, before = x @ (W + scaling * layer.B @ layer.A).T + linear.bias, linear.weight.clone()
    assert torch.allclose(layer(x), by_hand, atol=1e-4)
    layer.prepare()
    with torch.no_grad():
        assert torch.allclose(layer(x), by_hand, atol=1e-4)
    layer.merge()
    layer.merge()
    assert torch.allclose(layer(x), by_hand, atol=1e-4) and not torch.equal(linear.weight, before)
    assert layer.unmerged.device.type == "cpu"
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(linear.weight, before)


def test_merge_can_keep_a_mask():
    linear = nn.Linear(8, 4)
    linear.weight.data[:, ::2] = 0
    mask, layer = linear.weight.data != 0, LoRALinear(linear, r=2)
    nn.init.normal_(layer.B)
    layer.merge()
    assert (linear.weight.data[:, ::2] != 0).any(), "a plain merge fills the zeros"
    layer.unmerge()
    layer.merge(recompress=lambda W: W * mask)
    assert (linear.weight.data[:, ::2] == 0).all() and not torch.equal(linear.weight.data, layer.unmerged)


def test_lora_refuses_unknown_targets_and_the_head():
    for target in ("nonsense", "lm_head", "embed_tokens"):
        with pytest.raises(UserError, match=f"--targets.*{target}"):
            LoRA(tiny_model("llama"), targets=[target])
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(2, 2), r=0)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Within the block: the dtype of every matrix product with a side of 2, LoRA's rank here."""

    def __enter__(self):
        self.dtypes = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default and 2 in (*args[0].shape, *args[1].shape):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_runs_in_the_models_dtype_and_trains_in_float32(dtype):
    model, ids = tiny_model("llama").to(dtype), ids_of(4, 9)
    method = build("lora", model)
    for layer in method.layers.values():
        nn.init.normal_(layer.B, std=0.1)
    with torch.no_grad(), method.inference(), Products() as products:
        used = model(ids).logits
    assert products.dtypes == {dtype}
    with method.training(), Products() as products:
        trained = model(ids).logits
    assert products.dtypes == {torch.float32}
    assert (used - trained).abs().max() <= 0.05 * trained.abs().max()
    assert all(tensor.dtype == torch.float32 for tensor in method.tensors().values())


def test_inference_sees_what_was_trained_since_the_last_time():
    model, ids = tiny_model("llama"), ids_of(2, 7)
    method, seen = build("lora", model), []
    for _ in range(2):
        with torch.no_grad(), method.inference():
            seen.append(model(ids).logits)
        for layer in method.layers.values():
            nn.init.normal_(layer.B)
    assert not torch.equal(*seen)


def test_lora_is_saved_only_when_the_model_has_its_base_weights(tmp_path):
    """Else its recipe would be of weights that nobody has."""
    method = build("lora", tiny_model("llama"))
    with pytest.raises(AssertionError, match="outside"), method.training():
        method.save(tmp_path)
    next(iter(method.layers.values())).merge()
    with pytest.raises(AssertionError, match="unmerge"):
        method.save(tmp_path)
