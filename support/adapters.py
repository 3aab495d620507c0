"""Adapters on disk: PEFT's layout, written and read, and the table of what each key of a config may be.

    write_peft(folder, model, tensors, config)     # adapter_config.json, its weights and recipe.json
    config, kind = read_config(folder)             # Fields of its config, and its peft_type
    check_keys(config, LORA)                       # every key is understood and in range, or it is off
    with open_weights(folder) as file:             # support.files.Tensors
        A = read_tensor(file, name, (r, d_in), model.dtype)

Nothing that a folder says is believed: keys, types, ranges and shapes are compared with the model before
memory is asked for, and each mistake is one line that names --adapter, the file, the value and the fix. What
PEFT's keys mean was read in the source of peft 0.21.2; tests/test_peft.py walks all of them.
"""
import json
import os
import pathlib
import re

from safetensors.torch import save_file

from support.cli import HUGE, TINY, UserError, say
from support.files import (
    BOOL, OBJECT, STRING, Tensors, is_whole, list_of, number, one_of, or_null, read_fields, whole_number)
from support.output import write_json
from support.recipe import check_recipe, recipe_of

CONFIG, IDP_CONFIG = "adapter_config.json", "idp_config.json"
WEIGHTS, RECIPE = "adapter_model.safetensors", "recipe.json"
AGAIN = "give the adapter/ folder that recover.py or PEFT wrote"
MAX_PROMPTS = 1000                                         # in a set
MAX_RANK = 65536                                           # wider than any layer


# --- 1. What the keys of a config may be --------------------------------------------------------------------
# Rules as in support.files: (test, words). A pattern is a regular expression that a stranger wrote. Some of
# those run for hours, so only short ones are taken: few branches, and no repeated group.

MAX_BRANCHES, MAX_BRANCHES_IN_ALL, MAX_PATTERNS = 4, 64, 4096


def same_as(value):
    """The rule for a number that the model decides."""
    return lambda given: is_whole(given) and given == value, f"{value}, as in this model"


def branches(pattern):
    """How many characters of a regular expression make a matcher try several ways."""
    return sum(pattern.count(character) for character in "*+?{(")


def is_plain_pattern(pattern):
    """Is this a regular expression that ends soon, whatever it is matched with?"""
    if len(pattern) > 200 or branches(pattern) > MAX_BRANCHES or re.search(r"\)[*+?{]", pattern):
        return False
    if re.search(r"\(\?[aiLmsux]+\)", pattern):            # flags: Python 3.10 alone takes them here
        return False
    try:
        re.compile(whole_pattern(pattern))
        return True
    except (re.error, OverflowError):
        return False


def whole_pattern(pattern):
    """A pattern as PEFT uses it: the end of a layer's name, from a dot or its start on."""
    return rf"(.*\.)?({pattern})$"


def pattern_of(rule):
    """The rule for rank_pattern and alpha_pattern: an object from patterns to values that keep a rule."""
    def test(value):
        """Every key a plain pattern, every value within the rule."""
        return (isinstance(value, dict) and len(value) <= MAX_PATTERNS
                and sum(map(branches, value)) <= MAX_BRANCHES_IN_ALL
                and all(map(is_plain_pattern, value)) and all(map(rule[0], value.values())))
    words = "an object of layer names or short regular expressions without repeated groups, each with"
    return or_null((test, f"{words} {rule[1]}"))


def either(one, many, words):
    """The rule for a value that keeps one of two rules, or is null."""
    return or_null((lambda value: one[0](value) or many[0](value), words))


TEXT_OR_NULL, BOOL_OR_NULL, OBJECT_OR_NULL = or_null(STRING), or_null(BOOL), or_null(OBJECT)
INDEX = (is_whole, "a layer's index")
INDICES = either(INDEX, list_of(INDEX), "a list of layer indices")
NAMES = either(STRING, list_of(STRING), "a list of names, or one regular expression")  # never run here
PATHS = (lambda value: list_of(STRING)[0](value) and 1 <= len(value) <= MAX_PROMPTS,
         f"a list of 1 to {MAX_PROMPTS} folders inside this one, such as prompts/0")
SIZE = whole_number(1, 10**9)                              # the model decides what is right
RANK = whole_number(1, MAX_RANK)
ALPHA = number(TINY, HUGE)

# What is in a table is understood: it means here what it means in PEFT, or nothing once the weights are read.
# Every other key must be off, that is null, false, {} or []: it may change what the adapter computes, as
# use_dora and modules_to_save do.
COMMON = {
    "peft_type": STRING, "task_type": or_null(one_of("CAUSAL_LM")),
    "base_model_name_or_path": TEXT_OR_NULL, "auto_mapping": OBJECT_OR_NULL,
    "peft_version": TEXT_OR_NULL, "revision": TEXT_OR_NULL, "inference_mode": BOOL_OR_NULL,
}
LORA = {
    **COMMON,
    "r": RANK, "rank_pattern": pattern_of(RANK), "lora_alpha": ALPHA, "alpha_pattern": pattern_of(ALPHA),
    "use_rslora": BOOL_OR_NULL,
    "bias": one_of("none"),
    "lora_dropout": or_null(number(0, 1)),                 # in training alone
    # Which layers have an adapter is read off the tensors' names. These say how PEFT chose them.
    "target_modules": NAMES, "exclude_modules": NAMES, "layers_pattern": NAMES,
    "layers_to_transform": INDICES,
    "fan_in_fan_out": BOOL_OR_NULL,                        # the model knows which weights lie transposed
    # Starts that leave W alone; pissa, olora, corda, loftq and lora_ga take something off it.
    "init_lora_weights": or_null(one_of(True, False, "gaussian", "orthogonal", "eva")),
    "eva_config": OBJECT_OR_NULL,
    # Nothing without megatron_config and use_qalora.
    "megatron_core": TEXT_OR_NULL, "qalora_group_size": or_null(SIZE),
}
PROMPTS = {
    **COMMON,
    "num_virtual_tokens": SIZE, "token_dim": SIZE, "num_layers": or_null(SIZE),
    "num_transformer_submodules": or_null(one_of(1)),      # 2: an encoder and a decoder
}
PROMPT_TUNING = {
    **PROMPTS,
    "num_attention_heads": or_null(SIZE),                  # a prompt has none; the others say how it started
    "prompt_tuning_init": TEXT_OR_NULL, "prompt_tuning_init_text": TEXT_OR_NULL,
    "tokenizer_name_or_path": TEXT_OR_NULL, "tokenizer_kwargs": OBJECT_OR_NULL,
}
PREFIX_TUNING = {
    **PROMPTS,
    "num_attention_heads": SIZE, "init_weights": TEXT_OR_NULL,
    # With a projection PEFT saves what it led to: the keys and values themselves, as without one.
    "prefix_projection": BOOL_OR_NULL, "encoder_hidden_size": or_null(SIZE),
}
IDP = {
    "method": one_of("idp"), "prompts": PATHS, "lengths": list_of(SIZE), "selector": STRING,
    "layers": one_of("every", "first"), "scores": one_of("logits", "probabilities"),
    "base_model_name_or_path": TEXT_OR_NULL, "auto_mapping": OBJECT_OR_NULL,
}


def check_keys(config, table):
    """Raise UserError for a key out of range, and for one that is not in the table and not off."""
    for key, value in config.obj.items():
        if key in table:
            config(key, table[key])
        elif not (value is None or value is False or value == {} or value == []):
            raise UserError(f"{config.where}: {key[:80]} is {json.dumps(value)[:60]}, which may change what "
                            "the adapter computes and is not supported here; let PEFT merge it into its "
                            "model (merge_and_unload), and give that model's folder as --model")


def by_pattern(patterns, names, default):
    """The value of the first pattern that each name matches, else the default. -> {name: value}

    [peft utils/other.py: get_pattern_key]
    """
    compiled = [(re.compile(whole_pattern(pattern)), value) for pattern, value in (patterns or {}).items()]
    return {name: next((value for regex, value in compiled if regex.match(name)), default) for name in names}


# --- 2. Reading ---------------------------------------------------------------------------------------------

def find_adapter(folder):
    """The folder of --adapter. Raises UserError when there is none."""
    path = pathlib.Path(folder).expanduser()
    if not os.path.isdir(path):                            # unlike path.is_dir() it never raises
        raise UserError(f"--adapter {folder}: no such folder; {AGAIN}")
    return path


def read_config(folder):
    """-> (Fields of the folder's config, its peft_type; "IDP" for a set of prompts). Raises UserError."""
    found = [name for name in (IDP_CONFIG, CONFIG) if os.path.lexists(folder / name)]
    if not found:
        raise UserError(f"--adapter {folder}: holds no {CONFIG} nor {IDP_CONFIG}; {AGAIN}")
    if len(found) > 1:
        raise UserError(f"--adapter {folder}: holds {CONFIG} and {IDP_CONFIG}, so two adapters; remove one")
    config = read_fields(folder / found[0], "--adapter")
    return config, "IDP" if found == [IDP_CONFIG] else config("peft_type", STRING)


def open_weights(folder):
    """The folder's tensors, as Tensors. Raises UserError."""
    if not os.path.lexists(folder / WEIGHTS):
        if os.path.lexists(folder / "adapter_model.bin"):
            raise UserError(f"--adapter {folder}: holds adapter_model.bin, a pickle, which is not opened as "
                            f"it can run code; save it again as {WEIGHTS} with a current PEFT")
        raise UserError(f"--adapter {folder}: holds no {WEIGHTS}; copy the whole adapter again")
    return Tensors(folder / WEIGHTS, "--adapter")


def read_tensor(file, name, shape, dtype):
    """A tensor as float32, with this shape, finite in the model's dtype too. Raises UserError."""
    tensor = file.read(name, shape)
    if not bool(tensor.to(dtype).isfinite().all()):
        raise UserError(f"{file.where}: {name} holds numbers too large for "
                        f"{str(dtype).removeprefix('torch.')}; use --dtype float32")
    return tensor.float()


def folder_inside(folder, name, where):
    """folder/name, which a config names. Raises UserError when it leads out of folder, or is not there."""
    path = folder / name
    if not os.path.isdir(path) or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: prompts names {name[:80]!r}, no folder inside {folder}; copy it all again")
    return path


def check_base(model, folder, config):
    """Refuse an adapter of another class of models, and by its recipe one of another base or compression.

    A recipe decides (support.recipe). PEFT writes none, only a name, and the same weights have many names: a
    hub id, a mirror's, a path on another machine. So a name that differs is said and not refused; names and
    shapes of the tensors are compared in any case.
    """
    made_for = (config("auto_mapping", OBJECT_OR_NULL, None) or {}).get("base_model_class")
    if made_for not in (None, type(model).__name__):
        raise UserError(f"{config.where}: was made for a {str(made_for)[:80]}, and this model is a "
                        f"{type(model).__name__}; use the adapter's own model")
    if os.path.lexists(folder / RECIPE):
        check_recipe(read_recipe(folder / RECIPE), model, f"--adapter {folder}")
        return
    said = last_part(config("base_model_name_or_path", TEXT_OR_NULL, None) or "")
    original = getattr(model, "compression", {}).get("base_model")
    names = [last_part(name) for name in (model.config.name_or_path, original) if name]
    if said and names and said not in names:
        say("note", f"--adapter {folder}: says it was trained on {said}, and this model is {names[0]}; it is "
                    "used if names and shapes of its tensors fit")


def last_part(name):
    """'facebook/OPT-125m' and '/models/opt-125m/' -> 'opt-125m'."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def read_recipe(path):
    """recipe.json, checked. -> dict. Raises UserError."""
    fields = read_fields(path, "--adapter")
    fields("base_model", STRING)
    fields("weights", STRING)
    if fields("compression", OBJECT):
        compression = fields.within("compression")
        compression("compressor", STRING)
        compression("settings", OBJECT)
        compression("calibration", OBJECT, {})
    return fields.obj


# --- 3. Writing ---------------------------------------------------------------------------------------------

def write_peft(folder, model, tensors, config):
    """adapter_config.json and adapter_model.safetensors as PEFT writes them, and recipe.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"task_type": "CAUSAL_LM", "inference_mode": True, "modules_to_save": None, "revision": None,
              **base_of(model), **config}
    write_json(folder / CONFIG, dict(sorted(config.items())))
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / RECIPE, recipe_of(model))          # by which load_adapter refuses other weights


def base_of(model):
    """What a config says of the model that its adapter was made for, under PEFT's names."""
    made_for = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {"base_model_name_or_path": model.config.name_or_path, "auto_mapping": made_for}
