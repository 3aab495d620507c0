"""EoRA: a correction of low rank that is computed while the model is compressed, against slow twins."""
import argparse

import pytest
import torch

import compress
import recover
from conftest import tiny_model
from methods.eora import EoRA, eora
from methods.lora import LoRA, linears_in_blocks
from methods.registry import METHODS, load_adapter
from support.architectures import weight_of

IDS = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(0))


def problem(out=12, columns=20, tokens=200, used=None, seed=0):
    """E (out, in), X (tokens, in) with correlated columns, of `used` directions, and H, in float64."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    E, X = random(out, columns), random(tokens, used or columns) @ random(used or columns, columns)
    return E, X, X.T @ X / tokens


def cost(E, B, A, X):
    """||X (E - B A)^T||_F^2, what is minimised."""
    return ((X @ (E - B.double() @ A.double()).T) ** 2).sum().item()


@pytest.mark.parametrize("out, columns", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_no_matrix_of_this_rank_is_nearer(r, out, columns):
    """The least cost is known without H's eigenvectors: the tail of the singular values of E X^T."""
    E, X, H = problem(out, columns)
    B, A = eora(E, H, r)
    assert B.shape == (out, r) and A.shape == (r, columns) and B.dtype == A.dtype == torch.float32
    least = (torch.linalg.svdvals(E @ X.T)[r:] ** 2).sum().item()
    assert cost(E, B, A, X) == pytest.approx(least, rel=1e-5)


def test_the_closed_form_through_cholesky():
    """H = L L^T: the truncated SVD of E L, times L^-1, is the same matrix B A."""
    E, X, H = problem()
    L = torch.linalg.cholesky(H)
    P, sigma, V = torch.linalg.svd(E @ L)
    expected = (P[:, :4] * sigma[:4]) @ V[:4] @ torch.linalg.inv(L)
    B, A = eora(E, H, 4)
    assert torch.allclose(B.double() @ A.double(), expected, atol=1e-5)


def test_every_step_away_costs_more():
    E, X, H = problem()
    B, A = (part.double() for part in eora(E, H, 3))
    best, generator = cost(E, B, A, X), torch.Generator().manual_seed(1)
    for _ in range(50):
        dB, dA = (torch.randn(part.shape, generator=generator).double() * 0.1 for part in (B, A))
        assert cost(E, B + dB, A, X) > best and cost(E, B, A + dA, X) > best
    plain = torch.linalg.svd(E, full_matrices=False)       # the nearest to E itself: what H is there for
    assert cost(E, plain[0][:, :3] * plain[1][:3], plain[2][:3], X) > 1.01 * best


@pytest.mark.parametrize("used", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_no_token_has_cost_nothing(used, dtype):
    """H of rank `used`: finite, as good as can be, and A reads nothing of a direction that never comes."""
    E, X, H = problem(used=used)
    B, A = eora(E.to(dtype), H.to(dtype), 3)
    assert A.isfinite().all() and B.isfinite().all()
    least = (torch.linalg.svdvals(E @ X.T)[3:] ** 2).sum().item()
    assert cost(E, B, A, X) == pytest.approx(least, rel=1e-3, abs=1e-4 * cost(E, B * 0, A, X))
    null = torch.linalg.eigh(H)[1][:, :-used]              # (in, in - used)
    assert (A.double() @ null).abs().max() < 1e-3 * A.abs().max()


def test_nothing_to_correct_and_more_rank_than_there_is():
    E, X, H = problem(out=3, columns=5)
    B, A = eora(E, H, 7)
    assert B.shape == (3, 7) and A.shape == (7, 5) and torch.allclose(B @ A, E.float(), atol=1e-5)
    for E, H in ((0 * E, H), (E, 0 * H)):
        B, A = eora(E, H, 2)
        assert (B @ A == 0).all()


# --- While compressing ----------------------------------------------------------------------------------

def compressed_with(arch, name="rtn", targets=None, r=4, **settings):
    """A tiny model, compressed under the eyes of EoRA. -> model, method, {path: (W, Q, H)}."""
    model, seen = tiny_model(arch), {}
    method = EoRA(model, r=r, targets=targets)

    def observe(path, W, Q, H):
        """Keep copies, and show them to the method."""
        seen[path] = W.clone(), Q.clone(), H.clone()
        method.observe(path, W, Q, H)
    compress.compress_model(model, None, name, IDS, observe=observe, **settings)
    return model, method, seen


@pytest.mark.parametrize("name", sorted(compress.COMPRESSORS))
def test_every_compressor_shows_what_it_did(name):
    """W is the dense weight, Q the compressed one, H of the inputs that the walk meets, once a layer."""
    settings = {"group_size": 16}
    model, _, seen = compressed_with("llama", name, **settings)
    dense, twin = linears_in_blocks(tiny_model("llama")), tiny_model("llama")
    assert list(seen) == list(dense)
    for path, (W, Q, H) in seen.items():
        assert torch.equal(W, weight_of(dense[path])) and not torch.equal(W, Q)
        assert torch.equal(Q, weight_of(model.get_submodule(path))) and H.shape == (W.shape[1],) * 2
    compress.compress_model(twin, None, name, IDS, **settings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters())), "seeing changes nothing"


def test_h_is_of_inputs_behind_compressed_blocks():
    """H of the last block, by a hook on the model as the walk leaves it: all before it is compressed."""
    model, _, seen = compressed_with("llama", bits=2)
    path, inputs = "model.layers.2.self_attn.q_proj", []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    model(IDS)
    handle.remove()
    X = torch.cat(inputs).flatten(0, 1)
    assert torch.allclose(seen[path][2], X.T @ X / len(X), atol=1e-4)


def test_every_layer_comes_nearer_and_the_model_too(any_model):
    arch = any_model.config.model_type
    if arch == "opt" and any_model.config.word_embed_proj_dim == 16:
        arch = "opt-350m"
    model, method, seen = compressed_with(arch, bits=2)
    assert set(method.layers) == set(seen), "every linear layer of every block"
    for path, (W, Q, H) in seen.items():
        layer = method.layers[path]
        assert layer.scaling == 1
        assert compress.relative_error(W, Q + layer.B @ layer.A, H) < compress.relative_error(W, Q, H)
    with torch.no_grad():
        dense, plain = any_model(IDS).logits, model(IDS).logits
        with method.inference():
            corrected = model(IDS).logits
    assert (corrected - dense).norm() < 0.9 * (plain - dense).norm()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_full_rank_gives_the_dense_model_back(arch):
    model, method, _ = compressed_with(arch, bits=2, r=200)
    with torch.no_grad(), method.inference():
        assert torch.allclose(model(IDS).logits, tiny_model(arch)(IDS).logits, atol=1e-2)


def test_targets_and_the_folder_are_loras(tmp_path):
    model, method, _ = compressed_with("llama", targets=["q_proj", "down_proj"])
    assert {path.split(".")[-1] for path in method.layers} == {"q_proj", "down_proj"}
    method.save(tmp_path / "adapter")
    again = load_adapter(model, tmp_path / "adapter")
    assert type(again) is LoRA and {layer.scaling for layer in again.layers.values()} == {1}
    with torch.no_grad():
        with method.inference():
            expected = model(IDS).logits
        with again.inference():
            assert torch.equal(model(IDS).logits, expected)
        for layer in again.layers.values():
            layer.merge()
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


def test_a_smaller_rank_is_cut_from_a_larger_one():
    _, method, seen = compressed_with("llama", targets=["v_proj", "up_proj"])
    smaller = method.at_rank(2)
    assert smaller.layers.keys() == method.layers.keys()
    for path, layer in smaller.layers.items():
        W, Q, H = seen[path]
        B, A = eora(W - Q, H, 2)
        assert torch.allclose(layer.B @ layer.A, B @ A, atol=1e-6) and (layer.r, layer.scaling) == (2, 1)


def test_nothing_is_trained(monkeypatch):
    """The command measures what was computed: a training would be a mistake."""
    monkeypatch.setattr(recover, "train", None)
    entry = METHODS["eora"]
    assert entry.rates is None and entry.settings(argparse.Namespace(rank=3, targets=None)) == {"r": 3, "targets": None}
    recover.main(["--method", "eora", "--rank", "2", "--limit", "4", "--nsamples", "2"])
