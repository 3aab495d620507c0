"""Our adapter folders in the real PEFT, and PEFT's in ours. Skipped where PEFT is not installed."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_model
from methods.lora import LoRA, linears_in_blocks
from methods.prompts import Prefix, SoftPrompts
from methods.registry import load_adapter
from support import adapters
from support.cli import UserError

peft = pytest.importorskip("peft", reason="pip install peft to check adapters against the real thing")
ARCHITECTURES = ["llama", "qwen2", "opt", "gpt2", "gpt_neox"]


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return request.param


def ids_of(rows=3, tokens=9):
    """Token ids, the same each time."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))


def moved(method):
    """The method with all trainables away from their start, so that nothing is the identity."""
    with torch.no_grad():
        for tensor in method.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return method


def assert_same(ours, theirs, plain):
    """Logits agree to rounding, and are not those of the model without an adapter."""
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max() <= 1e-5 * scale
    assert (ours - plain).abs().max() > 1e-3 * scale, "the adapter does nothing"


@torch.no_grad()
def compare(arch, folder):
    """The logits of a folder in this project and in PEFT, each on a model of its own."""
    model, ids = tiny_model(arch), ids_of()
    plain = model(ids).logits
    with load_adapter(model, folder).inference():
        ours = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), folder).eval()(ids).logits[:, -ids.shape[1]:]
    assert_same(ours, theirs, plain)


# --- PEFT's folders -------------------------------------------------------------------------------------

def names_in(arch):
    """Names that the configs below need: two layers' last names, a whole one, the list of blocks."""
    names = list(linears_in_blocks(tiny_model(arch)))
    last = list(dict.fromkeys(name.split(".")[-1] for name in names))
    blocks = names[0].split(".0.")[0].split(".")[-1]
    return {"first": last[0], "second": last[1], "whole": names[0], "list": blocks}


LORA_CONFIGS = {  # name of the case -> function of names_in() -> settings of LoraConfig
    "plain": lambda at: {},
    "rslora": lambda at: {"use_rslora": True},
    "dropout": lambda at: {"lora_dropout": 0.3},
    "patterns": lambda at: {"target_modules": [at["first"], at["second"]], "rank_pattern": {at["first"]: 3},
                            "alpha_pattern": {rf".*\.0\..*{at['second']}": 11, f"^{at['whole']}": 5}},
    "rslora with patterns": lambda at: {"use_rslora": True, "target_modules": [at["first"]],
                                        "rank_pattern": {at["whole"]: 4}, "alpha_pattern": {at["whole"]: 9}},
    "some layers": lambda at: {"layers_to_transform": [0, 2]},
    "one layer, with its list": lambda at: {"layers_to_transform": 1, "layers_pattern": at["list"]},
    "regular expression": lambda at: {"target_modules": rf".*\.[12]\..*({at['first']}|{at['second']})"},
    "all linear": lambda at: {"target_modules": "all-linear"},
    "excluded": lambda at: {"target_modules": [at["first"], at["second"]], "exclude_modules": [at["whole"]]},
    "excluded by expression": lambda at: {"target_modules": [at["first"]], "exclude_modules": r".*\.1\..*"},
    "gaussian start": lambda at: {"init_lora_weights": "gaussian"},
    "orthogonal start": lambda at: {"init_lora_weights": "orthogonal"},
}


def peft_lora(arch, **settings):
    """A model of PEFT's with LoRA whose A and B are random."""
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "lora_alpha": 6, **settings})
    model = peft.get_peft_model(tiny_model(arch), config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.3)
    return model


@pytest.mark.parametrize("case", LORA_CONFIGS)
def test_we_read_pefts_lora(case, arch, tmp_path):
    settings = LORA_CONFIGS[case](names_in(arch))
    if case == "orthogonal start" and arch == "gpt2":
        pytest.skip("PEFT has it for nn.Linear alone")
    theirs, model, ids = peft_lora(arch, **settings), tiny_model(arch), ids_of()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        plain = model(ids).logits
        with load_adapter(model, tmp_path).inference():
            ours = model(ids).logits
        assert_same(ours, theirs(ids).logits, plain)


def test_we_read_an_adapter_that_eva_started(tmp_path):
    """EVA shares the ranks out among layers, some of which get none, and leaves the base weights alone."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=2.0))
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    batch = {"input_ids": ids_of(4, 12), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    peft.initialize_lora_eva_weights(theirs, [batch] * 4, show_progress_bar=False)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    compare("llama", tmp_path)


@pytest.mark.parametrize("case", LORA_CONFIGS)
def test_what_we_read_and_save_again_is_the_same_in_peft(case, tmp_path):
    """Ranks, alphas and layers of a folder survive our save(), as PEFT reads it."""
    theirs, model = peft_lora("llama", **LORA_CONFIGS[case](names_in("llama"))), tiny_model("llama")
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs").save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids_of()).logits, theirs(ids_of()).logits, atol=1e-5)
    compare("llama", tmp_path / "ours")


def peft_prompt(name, arch, **settings):
    """A model of PEFT's with a random prompt or prefix."""
    torch.manual_seed(3)
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[name]
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)
    return peft.get_peft_model(tiny_model(arch), config).eval()


@pytest.mark.parametrize("name, settings", [
    ("prompt", {}), ("prefix", {}), ("prefix", {"prefix_projection": True, "encoder_hidden_size": 16})])
def test_we_read_pefts_prompts(name, settings, arch, tmp_path):
    theirs, model, ids = peft_prompt(name, arch, **settings), tiny_model(arch), ids_of()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        plain = model(ids).logits
        with load_adapter(model, tmp_path).inference():
            ours = model(ids).logits
        assert_same(ours, theirs(ids).logits[:, -ids.shape[1]:], plain)


def test_a_prompt_of_opt_350m_has_another_width_in_peft(tmp_path):
    """PEFT gives it the hidden size, and its own forward pass then fails: the embeddings are narrower."""
    peft_prompt("prompt", "opt-350m").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="token_dim is 32; it must be 16"):
        load_adapter(tiny_model("opt-350m"), tmp_path)


# --- Ours -----------------------------------------------------------------------------------------------

BUILD = {"lora": lambda model: LoRA(model, r=2, alpha=6), "prompt": lambda model: SoftPrompts(model, [5]),
         "prefix": lambda model: Prefix(model, 5)}


@pytest.mark.parametrize("name", BUILD)
def test_peft_reads_our_folder(name, arch, tmp_path):
    moved(BUILD[name](tiny_model(arch))).save(tmp_path)
    compare(arch, tmp_path)


def test_peft_reads_each_prompt_of_a_set(tmp_path):
    moved(SoftPrompts(tiny_model("llama"), [3, 5])).save(tmp_path)
    for k in "01":
        compare("llama", tmp_path / "prompts" / k)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_our_folder_has_pefts_keys_and_shapes(name, arch, tmp_path):
    peft_prompt(name, arch).save_pretrained(tmp_path / "theirs")
    BUILD[name](tiny_model(arch)).save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / adapters.WEIGHTS) for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    ours, theirs = (json.loads((tmp_path / who / adapters.CONFIG).read_text()) for who in ("ours", "theirs"))
    same = {"peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads",
            "num_transformer_submodules", *(["prefix_projection"] if name == "prefix" else [])}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


# --- Every key of PEFT's configs ------------------------------------------------------------------------

# Keys of peft 0.21.2 that are not in our tables: each may change what is computed, so it must be off.
REFUSED = {
    "LORA": {"alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "kasa_config",
             "layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config",
             "modules_to_save", "monteclora_config", "runtime_config", "target_parameters",
             "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config"},
    "PROMPT_TUNING": {"modules_to_save"},
    "PREFIX_TUNING": {"modules_to_save"},
}
CONFIGS = {"LORA": peft.LoraConfig, "PROMPT_TUNING": peft.PromptTuningConfig,
           "PREFIX_TUNING": peft.PrefixTuningConfig}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_of_pefts_config_is_understood_or_refused(kind):
    keys, table = {field.name for field in dataclasses.fields(CONFIGS[kind])}, vars(adapters)[kind]
    assert not set(table) & REFUSED[kind]
    if peft.__version__ == "0.21.2":                       # a later PEFT may have more: refused while in use
        assert keys == set(table) | REFUSED[kind]
    assert set(table) <= keys, "a key that PEFT does not have"


@pytest.mark.parametrize("kind, key", [(kind, key) for kind in REFUSED for key in sorted(REFUSED[kind])])
def test_a_key_that_may_change_the_function_is_refused_by_name(kind, key, tmp_path):
    build = {"LORA": peft_lora, "PROMPT_TUNING": lambda arch: peft_prompt("prompt", arch),
             "PREFIX_TUNING": lambda arch: peft_prompt("prefix", arch)}[kind]
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / adapters.CONFIG).read_text())
    for value in (True, "x", ["x"], {"x": 1}, 7, 0):
        (tmp_path / adapters.CONFIG).write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"--adapter.*{key}"):
            load_adapter(tiny_model("llama"), tmp_path)


REAL = {  # adapters that PEFT makes and we refuse -> (settings, what the message names)
    "DoRA": ({"use_dora": True}, "use_dora is true"),
    "a bias of the adapter": ({"lora_bias": True, "init_lora_weights": False}, "lora_bias"),
    "biases of the model": ({"bias": "all"}, "bias is \"all\""),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "the head": ({"target_modules": ["lm_head"]}, "lm_head"),
    "the embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    "new tokens": ({"trainable_token_indices": [4, 5]}, "trainable_token_indices"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is \"pissa\""),
    "PiSSA, few iterations": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is \"olora\""),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("case", REAL)
def test_what_we_do_not_compute_is_refused_by_name(case, tmp_path):
    settings, word = REAL[case]
    peft_lora("llama", **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=word):
        load_adapter(tiny_model("llama"), tmp_path)


