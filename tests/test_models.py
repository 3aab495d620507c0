"""Folders of models: good ones load as saved, damaged ones are refused in one line, none runs its code."""
import builtins
import json
import pathlib
import pickle
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from conftest import CONFIGS, save_tiny, tiny_model, tiny_tokenizer
from experiments import toy_model
from support import architectures, weights
from support.cli import UserError
from support.models import load_model

HUGE = "9" * 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny LLaMA, untied, as one file; and what compress.py would say of it, under another name."""
    return save_tiny(tiny_model("llama"), tmp_path_factory.mktemp("whole"))


# --- good folders -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_good_folders(arch, tmp_path):
    """Tied and untied, one file and shards, three dtypes: the weights come back, in the dtype that is asked
    for."""
    for tied in (False, True):
        model = tiny_model(arch, tie_word_embeddings=tied)
        for stored, asked in ((torch.float32, "auto"), (torch.bfloat16, "float32"),
                              (torch.float16, "bfloat16")):
            folder = save_tiny(model.to(stored), tmp_path / f"{tied}{stored}",
                               max_shard_size="20KB" if tied else "1GB")
            assert (len(list(folder.glob("*.safetensors"))) > 1) == tied
            loaded, tokenizer = load_model(str(folder), dtype=asked)
            wanted = torch.float32 if asked == "auto" else getattr(torch, asked)
            for name, tensor in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], tensor.to(wanted)), name
            assert loaded.dtype == wanted and loaded.compression == {} and len(tokenizer) == 97
            assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
            same = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
            assert same == tied or arch == "opt-350m"
        model.float()


def test_the_toy_and_only_its_special_tokens():
    model, tokenizer = load_model("toy")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.get_vocab() == toy_model.build_tokenizer().get_vocab()
    assert model.config.name_or_path == "toy" and model.compression == {}


def test_generation_settings_count_for_nothing(whole, tmp_path):
    """Greedy is greedy: of generation_config.json only the special tokens are kept, LLaMA 3's list of ends
    too."""
    folder = shutil.copytree(whole, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({
        "eos_token_id": [2, 5], "pad_token_id": -1, "repetition_penalty": 1.5, "num_return_sequences": 3,
        "num_beams": 3, "stop_strings": ["x"]}))
    config = load_model(str(folder))[0].generation_config
    assert (config.eos_token_id, config.pad_token_id) == ([2, 5], None)
    assert not config.repetition_penalty and not config.stop_strings and not config.num_return_sequences


def test_the_bare_names_of_old_gpt2_folders(tmp_path):
    """GPT-2's own checkpoint has no "transformer." before its names, and holds masks that nobody reads
    today."""
    model = tiny_model("gpt2")
    folder = save_tiny(model, tmp_path / "m")
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in
               load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(folder))[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_pythias_old_buffers_are_left_out(tmp_path):
    folder = save_tiny(tiny_model("gpt_neox"), tmp_path / "m")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(folder))


# --- broken ones --------------------------------------------------------------------------------------------

def config(**changes):
    """Damage: other values in config.json."""
    return setting("config.json", **changes)


def setting(name, **changes):
    """Damage: other values in a JSON file, which may not exist yet."""
    def damage(folder):
        path = folder / name
        obj = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**obj, **changes}))
    return damage


def content(name, data):
    """Damage: a file that holds just this, text or bytes."""
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def gone(*names):
    """Damage: files that are not there."""
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change):
    """Damage: change(tensors) edits the dict of weights."""
    def damage(folder):
        found = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


def put(name, value, index=(0,)):
    """Damage: one number of one tensor."""
    return tensors(lambda found: found[name].__setitem__(index, value))


def pickled(folder):
    """Only a pickle, which would write a file when it is opened."""
    gone("model.safetensors")(folder)
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Opened(folder / "opened"), file)


class Opened:
    """What a pickle can do: here it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.write_text, (self.path, "x")


def sharded(change):
    """Damage: as shards with an index, which change(index) edits."""
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        half = len(weights) // 2
        index = {"metadata": {}, "weight_map": {}}
        for number, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: weights[name].clone() for name in names}, folder / file,
                      metadata={"format": "pt"})
            index["weight_map"].update(dict.fromkeys(names, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps(change(index)))
    return damage


def cut(name, size):
    """Damage: only the first bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def in_place(name):
    """Damage: a folder where a file should be."""
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    return damage


REPORT = {"compressor": "rtn", "settings": {"bits": 3}, "base_model": "toy", "weight_bytes": 1,
          "mean_error": 0.1,
          "layers": {"a": {}}, "calibration": {"nsamples": 1, "seqlen": 2}}


def report(**changes):
    """Damage: a compression.json with other values; None takes a key out."""
    def damage(folder):
        obj = {key: value for key, value in {**REPORT, **changes}.items() if value is not None}
        (folder / "compression.json").write_text(json.dumps(obj))
    return damage


def other_tokenizer(folder):
    """A tokenizer with more tokens than the model."""
    tiny_tokenizer(150).save_pretrained(folder)


def sparse_tokenizer(folder):
    """Few tokens, and one of them far beyond the embeddings."""
    path = folder / "tokenizer.json"
    obj = json.loads(path.read_text())
    obj["model"]["vocab"] = {"w0": 0, "w1": 1, "w2": 2, "far": 5000}
    path.write_text(json.dumps(obj))


NORM, HEAD = "model.norm.weight", "lm_head.weight"
QUERY, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
# a size that transformers refuses, or that is not that of the weights
UNFIT = "cannot be loaded|describes|another shape"
BROKEN = {  # name -> (damage, words of the message)
    "config: a list": (content("config.json", "[]"), "list"),
    "config: a number": (content("config.json", "7"), "int"),
    "config: not JSON": (content("config.json", "{"), "not JSON"),
    "config: empty": (content("config.json", ""), "not JSON"),
    "config: not UTF-8": (content("config.json", b'{"a": "\xff"}'), "not UTF-8"),
    "config: nested": (content("config.json", '{"a": ' + "[" * 100_000), "nested|not JSON"),
    "config: a lone surrogate": (content("config.json", '{"a": "\\ud800"}'), "surrogate"),
    "config: NaN": (content("config.json", '{"model_type": "llama", "rms_norm_eps": NaN}'), "not JSON"),
    "config: 1e999": (content("config.json", '{"model_type": "llama", "rms_norm_eps": 1e999}'), "not JSON"),
    "config: a folder": (in_place("config.json"), "not a file"),
    "config: gone": (gone("config.json"), "no config.json"),
    "config: empty object": (content("config.json", "{}"), "model_type"),
    "config: unknown type": (config(model_type="bert"), "model_type"),
    "config: type is a list": (config(model_type=["llama"]), "model_type"),
    "config: another type": (config(model_type="opt"), "weights|describes"),
    "config: 10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "config: 1000 layers": (config(num_hidden_layers=1000), "describes .* weights"),
    "config: no layer": (config(num_hidden_layers=0), "num_hidden_layers"),
    "config: layers are a text": (config(num_hidden_layers="3"), "num_hidden_layers"),
    "config: layers are true": (config(num_hidden_layers=True), "num_hidden_layers"),
    "config: one layer more": (config(num_hidden_layers=4), "lack model.layers.3"),
    "config: one layer fewer": (config(num_hidden_layers=2), "no place for model.layers.2"),
    "config: width 10^9": (config(hidden_size=10**9), UNFIT),
    "config: a wide model": (config(hidden_size=10**6), UNFIT),
    "config: twice the width": (config(intermediate_size=96), "another shape of model.layers.0.mlp"),
    "config: many tokens": (config(vocab_size=10**7), "describes .* weights"),
    "config: width is a fraction": (config(hidden_size=32.5), "hidden_size"),
    "config: no width": (config(hidden_size=-32), UNFIT),
    "config: a huge number": (content("config.json", '{"model_type": "llama", "hidden_size": %s}' % HUGE), UNFIT),
    "config: 5 heads": (config(num_attention_heads=5, head_dim=None), UNFIT),
    "config: 3 key heads": (config(num_key_value_heads=3), UNFIT),
    "config: head_dim 7": (config(head_dim=7), UNFIT),
    "config: head_dim 6": (config(head_dim=6), "another shape"),
    "config: unknown activation": (config(hidden_act="nonsense"), "describes no model|cannot be loaded"),
    "config: activation is a number": (config(hidden_act=5), "describes no model|cannot be loaded"),
    "config: epsilon is a text": (config(rms_norm_eps="small"),
                                  "rms_norm_eps|describes no model|cannot be loaded"),
    "config: rope is a text": (config(rope_parameters="yes"), "describes no model|cannot be loaded"),
    "config: rope of no kind": (config(rope_parameters={"rope_type": "nope", "rope_theta": 1.0}),
                                "describes no model|cannot be loaded"),
    "config: positions below 0": (config(max_position_embeddings=-5), "max_position_embeddings"),
    "config: no positions": (config(max_position_embeddings=0), "max_position_embeddings"),
    "config: positions are a text": (config(max_position_embeddings="many"), "max_position_embeddings"),
    "config: biases that are not there": (config(attention_bias=True), "lack .*bias"),
    "config: quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}),
                          "quantization_config"),
    "weights: gone": (gone("model.safetensors"), "cannot be loaded"),
    "weights: empty": (content("model.safetensors", b""), "cannot be read"),
    "weights: no header": (content("model.safetensors", b"x" * 1000), "cannot be read"),
    "weights: a header of 2^60 bytes": (content("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
                                        "cannot be read"),
    "weights: cut": (cut("model.safetensors", 20_000), "cannot be read"),
    "weights: a folder": (in_place("model.safetensors"), "not a file"),
    "weights: a tensor missing": (tensors(lambda found: found.pop(QUERY)), f"lack {QUERY}"),
    "weights: no head": (tensors(lambda found: found.pop(HEAD)), f"lack {HEAD}"),
    "weights: a tensor too many": (tensors(lambda found: found.update(extra=torch.ones(2))),
                                   "no place for extra"),
    "weights: another shape": (tensors(lambda found: found.update({QUERY: torch.ones(32, 31)})),
                               f"shape of {QUERY}"),
    "weights: transposed": (tensors(lambda found: found.update({UP: torch.ones(32, 48)})), f"shape of {UP}"),
    "weights: integers": (tensors(lambda found: found.update({QUERY: torch.ones(32, 32, dtype=torch.int8)})),
                          "I8"),
    "weights: long": (tensors(lambda found: found.update({NORM: torch.ones(32, dtype=torch.int64)})), "I64"),
    "weights: eight-bit floats": (
        tensors(lambda found: found.update({QUERY: found[QUERY].to(torch.float8_e4m3fn)})), "F8"),
    "weights: NaN in a norm": (put(NORM, float("nan")), f"{NORM} .*not finite"),
    "weights: infinity": (put(QUERY, float("-inf"), (0, 0)), f"{QUERY} .*not finite"),
    "weights: only a pickle": (pickled, "cannot be loaded"),
    "shards: outside": (sharded(lambda index: {"weight_map": {"a": "../../x.safetensors"}}),
                        "not a safetensors file in the folder"),
    "shards: one is missing": (sharded(lambda index: {"weight_map": {"a": "b.safetensors"}}),
                               "not a safetensors file in the folder"),
    "shards: a list": (sharded(lambda index: [1]), "list"),
    "shards: no map": (sharded(lambda index: {}), "weight_map"),
    "shards: numbers": (sharded(lambda index: {"weight_map": {"a": 1}}), "not a safetensors file in the folder"),
    "shards: a pickle": (sharded(lambda index: {**index, "weight_map": {**index["weight_map"], "a": "x.bin"}}),
                         "names x.bin, not a safetensors file"),
    "shards: a tensor is nowhere": (sharded(lambda index: {**index, "weight_map": dict.fromkeys(
        ["model.norm.weight"], "model-00001-of-00002.safetensors")}), "lack|cannot be loaded"),
    "tokenizer: gone": (gone("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "tokenizer: only settings": (gone("tokenizer.json"), "no tokenizer"),
    "tokenizer: of a larger model": (other_tokenizer, "150 tokens"),
    "tokenizer: a token far away": (sparse_tokenizer, "5001 tokens"),
    "tokenizer: a list": (content("tokenizer.json", "[]"), "cannot be loaded"),
    "tokenizer: not JSON": (content("tokenizer.json", "{"), "cannot be loaded"),
    "tokenizer: cut": (cut("tokenizer.json", 500), "cannot be loaded"),
    "tokenizer: no words": (content("tokenizer.json",
                                    '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, '
                                    '"unk_token": "w0"}}'), "tokens|cannot be loaded"),
    "tokenizer: settings are a list": (content("tokenizer_config.json", "[1]"), "list"),
    "tokenizer: settings not UTF-8": (content("tokenizer_config.json", b"\xff"), "UTF-8"),
    "generation: a list": (content("generation_config.json", "[]"), "list"),
    "generation: not JSON": (content("generation_config.json", "{,}"), "not JSON"),
    "generation: end is a text": (setting("generation_config.json", eos_token_id="</s>"), "eos_token_id"),
    "generation: end is a list of texts": (setting("generation_config.json", eos_token_id=["a"]),
                                           "eos_token_id"),
    "an adapter": (setting("adapter_config.json", base_model_name_or_path="toy", peft_type="LORA"),
                   "--adapter"),
    "compression: a list": (content("compression.json", "[]"), "list"),
    "compression: not UTF-8": (content("compression.json", b"\xfe\xff"), "UTF-8"),
    "compression: empty": (content("compression.json", "{}"), "compressor"),
    "compression: no base": (report(base_model=None), "base_model"),
    "compression: calibration is a text": (report(calibration="c4"), "calibration"),
    "compression: lost": (content("compression.grids", b""), "lost the compression.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(name, whole, tmp_path, monkeypatch):
    damage, words = BROKEN[name]
    folder = shutil.copytree(whole, tmp_path / "m")
    damage(folder)
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked the user"))
    start = time.time()
    with pytest.raises(UserError, match=f"^--model .*({words})") as refused:
        load_model(str(folder))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 700
    assert time.time() - start < 5 and not (folder / "opened").exists()


def hub_model(cache, name, folder):
    """A folder laid out as a download in the hub's cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))


def test_a_model_of_the_hub_opens_no_pickle(tmp_path, monkeypatch):
    """One file, several, and several of which the index says that one is a pickle."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    for name, change in (("me/one", None), ("me/shards", lambda index: index)):
        folder = save_tiny(tiny_model("llama"), tmp_path / "m")
        if change:
            sharded(change)(folder)
        hub_model(tmp_path / "hub", name, folder)
        assert type(load_model(name)[0]).__name__ == "LlamaForCausalLM"
    folder = save_tiny(tiny_model("llama"), tmp_path / "m")
    sharded(lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], "pytorch_model.bin")})(folder)
    torch.save({}, folder / "pytorch_model.bin")
    hub_model(tmp_path / "hub", "me/pickle", folder)
    with pytest.raises(UserError, match="names pytorch_model.bin, not a safetensors file"):
        load_model("me/pickle")


def test_a_hub_that_gives_no_index_is_no_mistake_by_itself(monkeypatch):
    """A gated repository whose files are all in the cache still loads; what is missing is said when it is asked for."""
    def refuse(*args, **kwargs):
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    assert weights.check_hub("me/one") is None


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 35


@pytest.mark.parametrize("arch, changes, words", [
    ("opt", dict(num_attention_heads=5), UNFIT), ("gpt2", dict(n_head=5), UNFIT),
    ("gpt2", dict(n_layer=10**9), "n_layer"), ("gpt2", dict(n_embd="x"), "n_embd"),
    ("gpt_neox", dict(num_attention_heads=3), UNFIT), ("opt", dict(ffn_dim=0), UNFIT),
    ("opt", dict(max_position_embeddings=10**7), "describes"),
    ("gpt2", dict(n_positions=64), "shape of .*wpe"),
    ("mistral", dict(sliding_window=0), "sliding_window"),
    ("mistral", dict(sliding_window="all"), "sliding_window"),
    ("qwen3", dict(head_dim=10**6), UNFIT),
    ("opt", dict(activation_function="nonsense"), "no model|loaded")])
def test_broken_configs_of_other_architectures(arch, changes, words, tmp_path):
    folder = save_tiny(tiny_model(arch), tmp_path / "m")
    config(**changes)(folder)
    with pytest.raises(UserError, match=f"^--model .*({words})"):
        load_model(str(folder))


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_a_folders_own_python_never_runs(model_type, whole, tmp_path, monkeypatch):
    """auto_map names classes in the folder's own files: for a type that we know ours is taken, another is
    refused."""
    folder, ran = shutil.copytree(whole, tmp_path / "m"), tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('x')\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    config(model_type=model_type, auto_map={"AutoConfig": "configuration_evil.C",
                                            "AutoModelForCausalLM": "modeling_evil.M"})(
        folder)
    setting("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})(folder)
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked the user"))
    if model_type == "llama":
        assert type(load_model(str(folder))[0]).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(UserError, match="^--model .*model_type"):
            load_model(str(folder))
    assert not ran.exists()


def test_a_tokenizer_that_only_foreign_code_knows_is_refused(whole, tmp_path, monkeypatch):
    folder, ran = shutil.copytree(whole, tmp_path / "m"), tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('x')\n"
    (folder / "tokenization_evil.py").write_text(code)
    setting("tokenizer_config.json", tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})(folder)
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked the user"))
    try:
        load_model(str(folder))  # transformers 5 takes tokenizer.json, whatever the class is called
    except UserError as error:
        assert str(error).startswith("--model")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["", " ", "no/such/folder/at/all", "x" * 5000, "a\0b",
                                  "~nobody_of_that_name/x", "..\n", "/dev/null",
                                  "a/b/c", "no-such-owner/no-such-model"])
def test_names_that_are_no_model(name):
    with pytest.raises(UserError, match="^--model"):
        load_model(name)


def test_numbers_too_large_for_float16_are_named(tmp_path):
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = 1e6
    folder = save_tiny(model, tmp_path / "m")
    load_model(str(folder))
    with pytest.raises(UserError, match=f"^--model .*{NORM}.*float32"):
        load_model(str(folder), dtype="float16")


def test_looking_for_numbers_that_are_not_is_quick():
    """No pass that takes longer than a few sums: a model of 7 billion weights is read through in seconds."""
    from support.files import all_finite
    big = torch.randn(2000, 5000)
    start = time.time()
    assert all_finite(big)
    quick, start = time.time() - start, time.time()
    big.isfinite().all()
    assert quick < time.time() - start
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for bad in ("nan", "inf", "-inf"):
            for place in (0, 17, 999):
                x = torch.randn(1000).to(dtype)
                x[place] = float(bad)
                assert not all_finite(x) and all_finite(x[:place]) and all_finite(x[place + 1:])


# --- room ---------------------------------------------------------------------------------------------------

def test_room():
    model = tiny_model("mistral", sliding_window=40)
    assert architectures.room(model) == 128 and architectures.room(model, 16) == 24
    architectures.check_room(model, "--seqlen", 128)
    for tokens, columns in ((129, 0), (25, 16)):
        with pytest.raises(UserError, match=f"--seqlen {tokens}: the model reads"):
            architectures.check_room(model, "--seqlen", tokens, columns)
    assert architectures.room(tiny_model("gpt2"), 100) == 28
