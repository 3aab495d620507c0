"""Our adapter folders in the real PEFT, and PEFT's in ours. PEFT is never needed: skipped where it is not installed."""
import pytest
import torch

from conftest import tiny_model
from methods import LoRA, Prefix, SoftPrompts, load_adapter

peft = pytest.importorskip("peft", reason="pip install peft to check adapters against the real thing")


@pytest.fixture(params=["llama", "opt", "gpt2", "gpt_neox", "qwen2"])
def arch(request):
    return request.param


def moved(method):
    """The method with all trainables away from their start, so that nothing is the identity."""
    with torch.no_grad():
        for tensor in method.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return method


BUILD = {"lora": lambda model: LoRA(model, r=2, alpha=6), "prompt": lambda model: SoftPrompts(model, [5])}


@pytest.mark.parametrize("name", sorted(BUILD))
def test_peft_reads_our_folder(name, arch, tmp_path):
    model, ids = tiny_model(arch), torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    method = moved(BUILD[name](model))
    method.save(tmp_path / "adapter")
    with torch.no_grad():
        plain = model(ids).logits
        with method.inference():
            ours = model(ids).logits
        theirs = peft.PeftModel.from_pretrained(tiny_model(arch), tmp_path / "adapter").eval()(ids).logits[:, -ids.shape[1]:]
    scale = max(1.0, ours.abs().max().item())
    assert (ours - theirs).abs().max() <= 1e-5 * scale
    assert (ours - plain).abs().max() > 1e-3 * scale, "the adapter does nothing"


def theirs_made_by_peft(name, model):
    """A fresh PEFT model of the same kind."""
    config = {"lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, init_lora_weights=False),
              "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
              "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)}[name]()
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", sorted(BUILD))
def test_we_read_pefts_folder(name, arch, tmp_path):
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    theirs = theirs_made_by_peft(name, tiny_model(arch))
    theirs.save_pretrained(tmp_path / "adapter")
    model = tiny_model(arch)
    with torch.no_grad(), load_adapter(model, tmp_path / "adapter").inference():
        ours, expected = model(ids).logits, theirs(ids).logits[:, -ids.shape[1]:]
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_prefix_folder_has_pefts_keys_and_shapes(tmp_path):
    """PEFT's own prefix forward depends on its transformers version, so names, shapes and settings are compared."""
    from safetensors.torch import load_file
    import json
    theirs_made_by_peft("prefix", tiny_model("llama")).save_pretrained(tmp_path / "theirs")
    Prefix(tiny_model("llama"), 5).save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    same = ("peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "prefix_projection")
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
