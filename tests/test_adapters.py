"""Adapter folders: whose weights they are for, and that a broken one is refused in one line."""
import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import CONFIGS, tiny_model
from methods.lora import LoRA, LoRALinear, linears_in_blocks
from methods.prompts import Prefix, SoftPrompts
from methods.registry import load_adapter
from support.adapters import CONFIG, IDP_CONFIG, RECIPE, WEIGHTS, by_pattern, is_plain_pattern
from support.cli import UserError
from support.recipe import recipe_of

BUILD = {"lora": lambda model: LoRA(model, r=2, alpha=6), "prompt": lambda model: SoftPrompts(model, [5]),
         "prefix": lambda model: Prefix(model, 5),
         "idp": lambda model: SoftPrompts(model, [2, 4], selector="last_token")}


def ids_of(rows=4, tokens=9):
    """Token ids, the same each time."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))


def model_with(arch, **settings):
    """A random model of CONFIGS[arch] with other settings."""
    torch.manual_seed(0)
    made = {**CONFIGS[arch], **settings}
    made = AutoConfig.for_model(made.pop("model_type"), **made)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def moved(method):
    """The method with all trainables away from their start, so that nothing is the identity."""
    with torch.no_grad():
        for tensor in method.tensors().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return method


@torch.no_grad()
def logits(model, method):
    """Logits with the method applied."""
    with method.inference():
        return model(ids_of()).logits


# --- Whole folders --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BUILD)
def test_half_precision_folders_are_read(name, tmp_path):
    """PEFT may store float16 or bfloat16; trainables are float32 all the same."""
    model = tiny_model("llama")
    moved(BUILD[name](model)).save(tmp_path)
    for path in tmp_path.rglob(WEIGHTS):
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    assert all(tensor.dtype == torch.float32 for tensor in load_adapter(model, tmp_path).tensors().values())


def test_lora_of_unequal_ranks_and_alphas_survives_a_folder(tmp_path):
    model = tiny_model("llama")
    linears = linears_in_blocks(model)
    names = list(linears)[:3]
    layers = {name: LoRALinear(linears[name], r=k + 1, alpha=2 * k + 1, rslora=True)
              for k, name in enumerate(names)}
    method = moved(LoRA(model, layers=layers))
    method.save(tmp_path)
    again = load_adapter(model, tmp_path)
    assert {name: (layer.r, layer.alpha, layer.scaling) for name, layer in again.layers.items()} == {
        name: (layer.r, layer.alpha, layer.scaling) for name, layer in layers.items()}
    assert torch.equal(logits(model, again), logits(model, method))


def test_patterns_follow_pefts_rule():
    """The end of a name, from a dot on; the first that matches. [peft utils/other.py: get_pattern_key]"""
    names = [f"model.layers.{name}" for name in ("0.q_proj", "1.q_proj", "10.v_proj", "0.xq_proj")]
    patterns = {"layers.0.q_proj": 1, r"^model\.layers\.1\..*": 2, "(q|v)_proj": 3}
    assert list(by_pattern(patterns, names, 8).values()) == [1, 2, 3, 8]
    assert list(by_pattern(None, names, 8).values()) == [8] * 4


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*x", "(.|.)(.|.)(.|.)(.|.)(.|.)x", ".*.*.*.*.*x", "[", "(",
                                     "a{99999999999}", "(?i)q_proj", "x" * 201])
def test_patterns_that_may_run_forever_are_no_patterns(pattern):
    assert not is_plain_pattern(pattern)


# --- Whose weights: recipes -----------------------------------------------------------------------------

def compressed(seed=0):
    """A tiny model and what compress.py would say of it."""
    model = tiny_model("llama", seed)
    for linear in linears_in_blocks(model).values():
        linear.weight.data = (linear.weight.data * 4).round() / 4
    model.compression = {"compressor": "rtn", "settings": {"bits": 2}, "base_model": "toy",
                         "calibration": {"nsamples": 4, "seqlen": 8}}
    return model


@pytest.mark.parametrize("name", BUILD)
def test_an_adapter_of_a_compressed_model_is_refused_on_the_dense_one(name, tmp_path):
    moved(BUILD[name](compressed())).save(tmp_path)
    assert json.loads((tmp_path / RECIPE).read_text()) == recipe_of(compressed())
    load_adapter(compressed(), tmp_path)
    with pytest.raises(UserError, match="--adapter.*rtn.*dense"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_the_same_recipe_with_other_bits_is_said_and_not_refused(tmp_path, capsys):
    moved(BUILD["lora"](compressed())).save(tmp_path)
    load_adapter(compressed(seed=1), tmp_path)
    assert "not the same bit for bit" in capsys.readouterr().err


@pytest.mark.parametrize("said, is_said", [("facebook/opt-125m", True), ("/other/path/Tiny-LLaMA/", False),
                                           ("", False), (None, False)])
def test_a_folder_without_a_recipe_may_name_another_base(said, is_said, tmp_path, capsys):
    """The same weights have many names, so a name alone refuses nothing."""
    model = tiny_model("llama")
    model.config.name_or_path = "someone/tiny-llama"
    moved(BUILD["lora"](model)).save(tmp_path)
    (tmp_path / RECIPE).unlink()
    change(tmp_path / CONFIG, base_model_name_or_path=said)
    load_adapter(model, tmp_path)
    assert ("opt-125m" in capsys.readouterr().err) is is_said


# --- Broken folders -------------------------------------------------------------------------------------

def change(path, **values):
    """Write some keys of a JSON file anew; ... removes a key."""
    obj = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in obj.items() if value is not ...}))


def config(**values):
    """A fault: keys of adapter_config.json."""
    return lambda folder: change(folder / CONFIG, **values)


def idp_config(**values):
    """A fault: keys of idp_config.json."""
    return lambda folder: change(folder / IDP_CONFIG, **values)


def recipe(**values):
    """A fault: keys of recipe.json."""
    return lambda folder: change(folder / RECIPE, **values)


def text(name, content):
    """A fault: a file with this text, or these bytes."""
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def tensors(function):
    """A fault: other tensors. function: ({name: tensor}) -> {name: tensor}."""
    def fault(folder):
        """Read, change, write."""
        named = function(load_file(folder / WEIGHTS))
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / WEIGHTS)
    return fault


def each(function):
    """A fault: another tensor in place of each."""
    return tensors(lambda named: {name: function(tensor) for name, tensor in named.items()})


def removed(name):
    """A fault: a file is missing."""
    return lambda folder: (folder / name).unlink()


def cut(name, bytes_left):
    """A fault: a file that ends early."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:bytes_left])


def with_nan(tensor):
    """The tensor with one NaN."""
    tensor.view(-1)[3] = float("nan")
    return tensor


def without(part):
    """A fault: the tensors whose names hold `part` are missing."""
    return tensors(lambda named: {name: tensor for name, tensor in named.items() if part not in name})


def renamed(old, new):
    """A fault: `new` instead of `old` in each tensor's name."""
    return tensors(lambda named: {name.replace(old, new): tensor for name, tensor in named.items()})


def a_folder(name):
    """A fault: a folder where a file should be."""
    def fault(folder):
        """Put it there."""
        (folder / name).unlink()
        (folder / name).mkdir()
    return fault


def linked_out(folder):
    """A fault: a prompt's folder is a link that leads out."""
    shutil.move(folder / "prompts" / "0", folder.parent / "outside")
    (folder / "prompts" / "0").symlink_to(folder.parent / "outside")


def deep(levels=100_000):
    """JSON that is nested deeply."""
    return '{"peft_type": ' + "[" * levels + "]" * levels + "}"


def recipe_of_depth(levels):
    """A recipe nested as deep as JSON is still read."""
    return lambda folder: (folder / RECIPE).write_text(
        '{"base_model": "", "weights": "", "compression": ' + '{"x": ' * levels + "1" + "}" * levels + "}")


LAYER, IN_FILE = "model.layers.0.self_attn.q_proj", "base_model.model.model."
GPTQ = {"compressor": "gptq", "settings": {"bits": 3}}
BROKEN = {  # name of the fault -> (whose folder, what is done to it, what the message says beside --adapter)
    # files
    "no config": ("lora", removed(CONFIG), "holds no adapter_config.json"),
    "two configs": ("lora", text(IDP_CONFIG, "{}"), "two adapters"),
    "no weights": ("lora", removed(WEIGHTS), WEIGHTS),
    "a pickle": ("lora", lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "pickle"),
    "weights cut": ("lora", cut(WEIGHTS, 900), "cannot be read"),
    "weights cut in the header": ("prompt", cut(WEIGHTS, 5), "cannot be read"),
    "weights empty": ("prefix", cut(WEIGHTS, 0), "cannot be read"),
    "weights are a folder": ("lora", a_folder(WEIGHTS), "is not a file"),
    "config cut": ("lora", cut(CONFIG, 40), "is not JSON"),
    "config a list": ("lora", text(CONFIG, "[1, 2]"), "holds a list"),
    "config not UTF-8": ("prompt", text(CONFIG, b'{"peft_type": "\xff"}'), "not UTF-8"),
    "config nested deeply": ("lora", text(CONFIG, deep()), "nested too deeply"),
    "config with NaN": ("lora", config(lora_alpha=float("nan")), "NaN is not JSON"),
    "config with half a character": ("lora", text(CONFIG, '{"peft_type": "\\ud800"}'), "surrogate"),
    # whose adapter
    "peft_type missing": ("lora", config(peft_type=...), "peft_type is null"),
    "peft_type unknown": ("lora", config(peft_type="ADALORA"), "peft_type ADALORA"),
    "peft_type a list": ("lora", config(peft_type=["LORA"]), "peft_type is"),
    "peft_type of another method": ("lora", config(peft_type="PREFIX_TUNING"), "is"),
    "another task": ("lora", config(task_type="SEQ_CLS"), "task_type"),
    "base a number": ("lora", config(base_model_name_or_path=7), "base_model_name_or_path"),
    "an unknown key in use": ("lora", config(use_something_new=[1]), "use_something_new"),
    "DoRA": ("lora", config(use_dora=True), "use_dora is true"),
    "trained embeddings": ("prompt", config(modules_to_save=["embed_tokens"]), "modules_to_save"),
    # LoRA
    "r zero": ("lora", config(r=0), "r is 0"),
    "r huge": ("lora", config(r=10**12), "r is 1000000000000"),
    "r a text": ("lora", config(r="8"), 'r is "8"'),
    "r true": ("lora", config(r=True), "r is true"),
    "r missing": ("lora", config(r=...), "r is null"),
    "r of other tensors": ("lora", config(r=3), "lora_A.weight is (2, 32), and (3, 32)"),
    "alpha infinite": ("lora", text(CONFIG, '{"peft_type": "LORA", "lora_alpha": 1e999}'), "not JSON"),
    "alpha zero": ("lora", config(lora_alpha=0), "lora_alpha is 0"),
    "alpha a list": ("lora", config(lora_alpha=[16]), "lora_alpha is [16]"),
    "targets numbers": ("lora", config(target_modules=[1]), "target_modules is [1]"),
    "bias trained": ("lora", config(bias="all"), 'bias is "all"'),
    "a start that changes W": ("lora", config(init_lora_weights="pissa"), 'init_lora_weights is "pissa"'),
    "rank pattern a list": ("lora", config(rank_pattern=[8]), "rank_pattern is [8]"),
    "rank pattern no expression": ("lora", config(rank_pattern={"[": 2}), "rank_pattern"),
    "rank pattern that runs forever": ("lora", config(rank_pattern={r"(\w+\.?)+x": 2}), "rank_pattern"),
    "rank pattern of other tensors": ("lora", config(rank_pattern={LAYER: 3}), LAYER),
    "alpha pattern a text": ("lora", config(alpha_pattern={LAYER: "16"}), "alpha_pattern"),
    "layers a text": ("lora", config(layers_to_transform="0"), "layers_to_transform"),
    "no tensors": ("lora", tensors(lambda named: {}), "no tensors"),
    "an extra tensor": ("lora", tensors(lambda named: {**named, "extra": torch.ones(2)}), "place for extra"),
    "a half missing": ("lora", without("layers.1.self_attn.v_proj.lora_B"), f"lacks {IN_FILE}layers.1"),
    "targets of other layers": ("lora", config(target_modules=["q_proj"]), "do not mean model.layers.0.self"),
    "no targets": ("lora", config(target_modules=[]), "do not mean model.layers.0.self_attn.q_proj"),
    "other blocks": ("lora", config(layers_to_transform=[0, 2]), "do not mean model.layers.1.self"),
    "a layer missing": ("lora", without("layers.1.self_attn.v_proj"), "model.layers.1.self_attn.v_proj"),
    "a layer too deep": ("lora", renamed("layers.2.", "layers.3."), f"no place for {IN_FILE}layers.3"),
    "the head": ("lora", renamed(LAYER, "lm_head"), "no place for base_model.model.lm_head"),
    "the embeddings": ("lora", renamed(f"{LAYER}.lora_A.weight", "model.embed_tokens.lora_embedding_A"),
                       f"no place for {IN_FILE}embed_tokens"),
    "shapes the wrong way": ("lora", each(lambda tensor: tensor.T), "is (32, 2), and (2, 32)"),
    "one-dimensional": ("lora", each(lambda tensor: tensor.flatten()), "(64,)"),
    "no elements": ("lora", each(lambda tensor: tensor[:0]), "(0, 32)"),
    "integers": ("lora", each(lambda tensor: tensor.int()), "holds I32"),
    "eight bits": ("lora", each(lambda tensor: tensor.to(torch.float8_e4m3fn)), "holds F8_E4M3"),
    "not a number": ("lora", each(with_nan), "not finite"),
    # prompts
    "prompt of no tokens": ("prompt", config(num_virtual_tokens=0), "num_virtual_tokens is 0"),
    "prompt longer than it is": ("prompt", config(num_virtual_tokens=6), "(5, 32), and (6, 32)"),
    "prompt without room": ("prompt", config(num_virtual_tokens=128), "a whole number from 1 to 127"),
    "prompt without memory": ("prompt", config(num_virtual_tokens=10**9), "a whole number from 1 to 127"),
    "prompt of another width": ("prompt", config(token_dim=64), "token_dim is 64"),
    "prompt of another depth": ("prompt", config(num_layers=4), "num_layers is 4"),
    "prompt of an encoder and a decoder": ("prompt", config(num_transformer_submodules=2), "submodules is 2"),
    "prompt one-dimensional": ("prompt", each(lambda tensor: tensor[0]), "is (32,), and (5, 32)"),
    "prompt of integers": ("prompt", each(lambda tensor: tensor.long()), "holds I64"),
    "prompt not a number": ("prompt", each(with_nan), "not finite"),
    "prompt under another name": ("prompt", renamed("prompt", "soft"), "lacks prompt_embeddings"),
    "prefix of another depth": ("prefix", config(num_layers=2), "num_layers is 2"),
    "prefix of other heads": ("prefix", config(num_attention_heads=4), "num_attention_heads is 4"),
    "prefix of another width": ("prefix", config(token_dim=32), "token_dim is 32"),
    "prefix of fewer layers": ("prefix", each(lambda tensor: tensor[:, :64]), "is (5, 64), and (5, 96)"),
    "prefix without room": ("prefix", config(num_virtual_tokens=1000), "a whole number from 1 to 127"),
    "prefix infinite": ("prefix", each(lambda tensor: tensor / 0), "not finite"),
    # sets of prompts
    "path up": ("idp", idp_config(prompts=["..", "prompts/1"]), "no folder inside"),
    "path up, hidden": ("idp", idp_config(prompts=["prompts/../../x", "prompts/1"]), "no folder inside"),
    "path from the root": ("idp", idp_config(prompts=["/etc", "prompts/1"]), "no folder inside"),
    "path with a zero": ("idp", idp_config(prompts=["prompts/0\0", "prompts/1"]), "no folder inside"),
    "path very long": ("idp", idp_config(prompts=["x" * 5000, "prompts/1"]), "no folder inside"),
    "a link out": ("idp", linked_out, "no folder inside"),
    "a prompt missing": ("idp", lambda folder: shutil.rmtree(folder / "prompts" / "1"), "prompts/1"),
    "no prompts": ("idp", idp_config(prompts=[], lengths=[]), "prompts is []"),
    "too many prompts": ("idp", idp_config(prompts=["prompts/0"] * 1001, lengths=[2] * 1001), "1 to 1000"),
    "prompts no list": ("idp", idp_config(prompts="prompts/0"), "prompts is"),
    "unknown selector": ("idp", idp_config(selector="best"), 'selector is "best"'),
    "selector that needs the answers": ("idp", idp_config(selector="oracle"), 'selector is "oracle"'),
    "lengths of other prompts": ("idp", idp_config(lengths=[2, 5]), "lengths is [2, 5], and the prompts have [2, 4] tokens"),
    "too few lengths": ("idp", idp_config(lengths=[2]), "lengths is [2], and the prompts have [2, 4] tokens"),
    "lengths texts": ("idp", idp_config(lengths=["2", "4"]), "lengths is"),
    "a set of another method": ("idp", idp_config(method="mixture"), "method is"),
    "LoRA in a set": ("idp", lambda folder: change(folder / "prompts/0" / CONFIG, peft_type="LORA"),
                      "must be PROMPT_TUNING"),
    "a set in a set": ("idp", lambda folder: shutil.copy(folder / IDP_CONFIG, folder / "prompts/0"),
                       "two adapters"),
    # recipes
    "recipe of another compression": ("lora", recipe(weights="0", compression=GPTQ), 'gptq {"bits": 3}'),
    "recipe of another model": ("idp", recipe(weights="0", base_model="someone/else"), "someone/else"),
    "recipe a list": ("lora", text(RECIPE, "[]"), "holds a list"),
    "recipe without weights": ("lora", recipe(weights=...), "weights is null"),
    "recipe without settings": ("lora", recipe(compression={"compressor": "rtn"}), "settings is null"),
    "recipe nested deeply": ("lora", recipe_of_depth(800), "compressor is null"),
}


@pytest.fixture(scope="module")
def whole_folders(tmp_path_factory):
    """An adapter of each method for the tiny LLaMA, to be broken."""
    root = tmp_path_factory.mktemp("whole")
    for name in BUILD:
        moved(BUILD[name](tiny_model("llama"))).save(root / name)
    return root


@contextlib.contextmanager
def refused(*words):
    """The block raises UserError, in one line that names the flag and all these words."""
    with pytest.raises(UserError) as error:
        yield
    message = str(error.value)
    assert "--adapter" in message and "\n" not in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_one_line(fault, whole_folders, tmp_path):
    name, break_it, word = BROKEN[fault]
    folder = shutil.copytree(whole_folders / name, tmp_path / "adapter")
    break_it(folder)
    with refused(str(folder), word):
        load_adapter(tiny_model("llama"), folder)


@pytest.mark.parametrize("name", BUILD)
def test_an_adapter_of_a_model_with_more_layers_is_refused(name, tmp_path):
    """Four layers into two, without a recipe, as PEFT would have written it."""
    deep_model = model_with("llama", num_hidden_layers=4)
    moved(BUILD[name](deep_model)).save(tmp_path)
    (tmp_path / RECIPE).unlink()
    with refused("layers"):
        load_adapter(model_with("llama", num_hidden_layers=2), tmp_path)


def test_an_adapter_of_a_model_with_fewer_layers_is_refused(tmp_path):
    moved(BUILD["lora"](model_with("llama", num_hidden_layers=2))).save(tmp_path)
    (tmp_path / RECIPE).unlink()
    with refused("model.layers.2.self_attn.q_proj"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch != "llama"])
@pytest.mark.parametrize("name", BUILD)
def test_an_adapter_of_another_architecture_is_refused(name, arch, whole_folders, tmp_path):
    """LLaMA and Qwen2 call their layers alike, and here all shapes agree: the class of the base differs."""
    with refused("LlamaForCausalLM"):
        load_adapter(tiny_model(arch), whole_folders / name)


def test_without_any_word_of_the_base_names_and_shapes_decide(whole_folders, tmp_path):
    folder = shutil.copytree(whole_folders / "lora", tmp_path / "adapter")
    (folder / RECIPE).unlink()
    change(folder / CONFIG, auto_mapping=None, base_model_name_or_path=None)
    for arch in ("opt", "gpt2", "gpt_neox"):
        with refused("no place for"):
            load_adapter(tiny_model(arch), folder)
    with refused("v_proj.lora_B.weight is (16, 2)"):
        load_adapter(model_with("qwen2", num_key_value_heads=4), folder)


@pytest.mark.parametrize("path, word", [("nowhere", "no such folder"), ("file", "no such folder"),
                                        ("empty", "holds no"), ("x" * 5000, "no such folder")])
def test_what_is_no_adapter_folder_is_refused(path, word, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with refused(word):
        load_adapter(tiny_model("llama"), tmp_path / path)


def test_numbers_too_large_for_the_models_dtype_are_refused(tmp_path):
    method = BUILD["prompt"](tiny_model("llama"))
    with torch.no_grad():
        method.prompts[0][0, 0] = 1e6
    method.save(tmp_path)
    with refused("too large for float16", "--dtype float32"):
        load_adapter(tiny_model("llama").half(), tmp_path)


def test_a_refused_folder_leaves_the_model_as_it_was(whole_folders, tmp_path):
    folder = shutil.copytree(whole_folders / "lora", tmp_path / "adapter")
    BROKEN["not a number"][1](folder)
    model = tiny_model("llama")
    before = model(ids_of()).logits
    with refused("not finite"):
        load_adapter(model, folder)
    assert torch.equal(model(ids_of()).logits, before)
