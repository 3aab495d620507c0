"""Architectures: which models there are, on which device, in which numbers, and how much they can read.

Add an architecture: one line in ARCHS.
"""
import collections
import platform

import torch
import torch.nn as nn
import transformers
from transformers.pytorch_utils import Conv1D

from support.cli import DTYPES, UserError


# --- 1. Devices and numbers ---------------------------------------------------------------------------------

def pick_device(name):
    """auto -> cuda, else mps, else cpu. -> torch.device. Raises UserError for a device this machine lacks."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + gpus
    if name == "auto":
        return torch.device(gpus[0] if gpus else available[-1])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise UserError(f"--device {name}: not available here; use one of: auto {' '.join(available)}")
    return torch.device(wanted)


def pick_dtype(name, device, model_name):
    """auto -> float32 on a CPU and for the toy, else bfloat16, or float16 where the device lacks that."""
    if name != "auto":
        return DTYPES[name]
    kind = torch.device(device).type
    if kind == "cpu" or model_name == "toy":
        return torch.float32
    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def versions():
    """Versions of what moves a number. -> {"python", "torch", "transformers"}."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__}


def device_name(device):
    """A name a reader can compare: the GPU's own, or the processor with its thread count."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.device(device).type} ({platform.machine()}, {torch.get_num_threads()} threads)"


# --- 2. Architectures: what differs is a row, not a file ----------------------------------------------------

# Where the decoder blocks sit, and which linears LoRA adapts by default: PEFT's, so that both agree.
Arch = collections.namedtuple("Arch", "blocks lora")
ARCHS = {
    "llama": Arch("model.layers", ("q_proj", "v_proj")),               # LLaMA, SmolLM, TinyLlama
    "mistral": Arch("model.layers", ("q_proj", "v_proj")),
    "qwen2": Arch("model.layers", ("q_proj", "v_proj")),
    "qwen3": Arch("model.layers", ("q_proj", "v_proj")),
    "opt": Arch("model.decoder.layers", ("q_proj", "v_proj")),
    "gpt2": Arch("transformer.h", ("c_attn",)),
    "gpt_neox": Arch("gpt_neox.layers", ("query_key_value",)),         # Pythia
}


def arch_of(model):
    """-> the Arch of a model (or of its config). Raises UserError for an architecture that has no row."""
    config = getattr(model, "config", model)
    if config.model_type not in ARCHS:
        raise UserError(f"--model: {config.model_type!r} is not supported; use one of: {' '.join(ARCHS)}")
    return ARCHS[config.model_type]


def blocks_of(model):
    """-> nn.ModuleList of the decoder blocks, the only part that is compressed."""
    return model.get_submodule(arch_of(model).blocks)


def linears_of(block):
    """{name: layer} of the linear layers in a block; GPT-2 calls them Conv1D and stores W^T."""
    return {name: module for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def linears_in_blocks(model):
    """{name in the model: layer} of the linear layers of all blocks: never lm_head or the embeddings."""
    return {f"{arch_of(model).blocks}.{name}": layer for name, layer in linears_of(blocks_of(model)).items()}


def weight_of(layer):
    """A view of a layer's weight as W (out, in)."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def as_stored(layer, W):
    """W (out, in) as the layer's weight holds it; contiguous."""
    return W.T.contiguous() if isinstance(layer, Conv1D) else W.contiguous()


def room(model, columns=0):
    """How many tokens a model reads beside `columns` prompt tokens; below 1 when these alone are too many.

    The limit is its positions. Behind a prompt it is its sliding window too: a window that moves past the
    prompt loses it.
    """
    limits = [getattr(model.config, "max_position_embeddings", None)]
    limits += [getattr(model.config, "sliding_window", None)] if columns else []
    return min(filter(None, limits), default=2**31) - columns


def check_room(model, flag, tokens, columns=0):
    """Raise UserError, before any work, when `tokens` of a flag do not fit beside `columns` prompt tokens."""
    if tokens > room(model, columns):
        most = f"{max(0, room(model, columns))} tokens" + f" beside {columns} prompt tokens" * bool(columns)
        raise UserError(f"{flag} {tokens}: the model reads {most}; use fewer")
