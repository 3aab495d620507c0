"""Weights: a model's folder and what lies in it, looked at before transformers does.

A stranger's folder can hang, fill the memory, run code or load random numbers in silence. So its config.json,
its weights' headers and its reports are checked first, and each mistake is one line that names --model, the
file and the fix.
"""
import math
import pathlib
import re

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from support.architectures import ARCHS
from support.cli import UserError
from support.files import (
    FLOATING, OBJECT, STRING, TYPES, Tensors, list_of, one_of, or_null, read_fields, whole_number)


# --- 1. transformers, called safely -------------------------------------------------------------------------

PART = {AutoConfig: "config.json", AutoTokenizer: "tokenizer", GenerationConfig: "generation_config.json"}


def from_pretrained(kind, source, name, **extra):
    """kind.from_pretrained(source), safely. Raises UserError with the first words of whatever it raises."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its reports of many lines: ours is one, and an error
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **extra)
    except Exception as error:  # damaged folders and lost networks raise many types
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--model {name}: its {PART.get(kind, 'weights')} cannot be loaded "
                        f"({words[:200]}); use toy, smollm2, a folder that save_pretrained wrote with "
                        "safetensors, or a hub id with network access") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


# --- 2. A folder, looked at before transformers does --------------------------------------------------------

INDEX = "model.safetensors.index.json"                     # of weights in several files
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

# Tensors that old checkpoints hold and no model reads: masks and frequencies that are computed today.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(attn|attention)\.(masked_)?bias$")


def check_folder(path, name):
    """Check what a model's folder says of itself. -> its compression.json, or {}. Raises UserError."""
    config = read_fields(path / "config.json", "--model")
    check_config(config, name)
    if (path / "adapter_config.json").exists():  # transformers would load the base that it names instead
        raise UserError(f"--model {name}: holds an adapter (adapter_config.json); give the model that it was "
                        "trained on, and this folder as --adapter")
    if not any((path / file).exists() for file in TOKENIZERS):
        raise UserError(f"--model {name}: has no tokenizer; copy {TOKENIZERS[0]} and its config there")
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        fields = read_fields(path / file, "--model") if (path / file).exists() else None
        for key in SPECIAL if fields else ():              # a list, of as many tokens as end a text
            several = isinstance(fields.obj.get(key), list)
            fields(key, list_of(whole_number(0, 10**7)) if several else or_null(whole_number(-1, 10**7)))
    if (path / INDEX).exists():
        check_index(path / INDEX, [file.name for file in path.glob("*.safetensors")])
    if (path / "compression.json").exists():
        return read_compression(path / "compression.json")
    if any((path / file).exists() for file in ("packed.safetensors", "compression.grids")):
        raise UserError(f"--model {name}: has lost the compression.json of compress.py; write it again")
    return {}


def check_config(config, name):
    """Refuse what transformers would take, or take very long over. config: of config.json.

    Other sizes are refused when the model is described (skeleton) and compared with the weights.
    """
    config("model_type", one_of(*ARCHS))
    for key in ("num_hidden_layers", "n_layer"):
        config(key, whole_number(1, 1000), None)
    for key in ("sliding_window", "max_position_embeddings"):
        config(key, or_null(whole_number(1, 10**7)), None)
    if config.obj.get("quantization_config") is not None:
        raise UserError(f"--model {name}: quantized by another tool (quantization_config); give a dense one")


def check_index(index, there=None):
    """Refuse an index of shards that names anything but plain safetensors files. there: those of a folder.

    transformers would open a pickle that is named there, also with use_safetensors=True.
    """
    for shard in read_fields(index, "--model")("weight_map", OBJECT).values():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+[.]safetensors", shard)
        if not plain or there is not None and shard not in there:
            raise UserError(f"--model {index}: names {str(shard)[:80]}, not a safetensors file in the "
                            "folder; download it again")


def check_hub(name):
    """The same of a model on the hub. What keeps its index from being read, its weights will meet too."""
    index = cached_file(name, INDEX, _raise_exceptions_for_gated_repo=False,
                        _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)
    if index:
        check_index(index)


def tensors_in(path):
    """{name: (shape, type)} of every tensor in a folder's weights, from the files' headers."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with Tensors(file, "--model") as opened:
            found.update({name: opened.form(name) for name in opened.names})
    return found


REPORT = {  # what is read of compression.json, and what it may be
    "compressor": STRING, "base_model": STRING, "weight_bytes": whole_number(1, 2**50),
    "calibration": OBJECT, "settings": OBJECT}


def read_compression(path):
    """compression.json, checked. -> dict. Raises UserError."""
    fields = read_fields(path, "--model")
    for key, rule in REPORT.items():
        fields(key, rule)
    return fields.obj


# --- 3. Weights ---------------------------------------------------------------------------------------------

def skeleton(config, name):
    """The model that a config describes, without its numbers (on the meta device): it takes no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config's values can be wrong in as many ways as there are values
        raise UserError(f"--model {name}: its config.json describes no model ({str(error).strip()[:200]}); "
                        "give the one that belongs to the weights") from error


def check_weights(empty, path):
    """Refuse weights that are not floating point, and a config.json that describes far more than there are.

    Twice as many: an embedding may stand for a head that is missing, and is then named, see check_report.
    """
    found = tensors_in(path)
    for name, (_, kind) in found.items():
        if TYPES.get(kind) not in FLOATING and not COMPUTED.search(name):
            raise UserError(f"--model {path}: {name} is {kind}, not floating point; give the dense original")
    described = sum(parameter.numel() for parameter in empty.parameters())
    stored = sum(math.prod(shape) for shape, _ in found.values())
    if stored and described > 2 * stored:
        raise UserError(f"--model {path}: its config.json describes {described:,} weights, and its files "
                        f"hold {stored:,}; they belong to different models")


def check_report(report, name):
    """Refuse what transformers lets pass: random numbers for missing tensors, tensors left over."""
    wrong = {"lack": report["missing_keys"], "have no place for": report["unexpected_keys"],
             "have another shape of": [key[0] for key in report["mismatched_keys"]]}
    for words, keys in wrong.items():
        keys = sorted(str(key) for key in keys if not COMPUTED.search(str(key)))
        if keys:
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise UserError(f"--model {name}: its weights {words} {keys[0]}{more} (random numbers would "
                            "stand in, or a part be left out); use a complete model")


def fill(empty, weights, dtype, folder):
    """A model on the CPU out of its skeleton and {name: tensor in dtype}.

    transformers does it, as for any folder: tied weights, and what is computed rather than stored.
    """
    model, report = from_pretrained(type(empty), None, folder, config=empty.config, state_dict=weights,
                                    dtype=dtype, output_loading_info=True)
    check_report(report, folder)
    if (pathlib.Path(folder) / "generation_config.json").exists():
        model.generation_config = from_pretrained(GenerationConfig, folder, folder)
    return model
