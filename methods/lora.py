"""LoRA: W + s B A on some linear layers, W frozen; s = alpha / r. [Hu et al. 2021]

    method = LoRA(model, r=8, alpha=16)            # new; read_lora: from a folder, ours or PEFT's
    with method.inference(): model(ids)

Letters: r rank, A (r, in), B (out, r), W (out, in), s scaling.
"""
import contextlib
import math
import re

import torch
import torch.nn as nn
from transformers.pytorch_utils import Conv1D

from idp_minimal import CACHE
from methods.losses import NoCache, row_losses
from support.adapters import ALPHA, LORA, RANK, by_pattern, check_keys, open_weights, read_tensor, write_peft
from support.cli import UserError
from support.architectures import arch_of, linears_in_blocks, weight_of


# --- 1. One layer -------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = x W^T + s x A^T B^T, with W frozen. [Hu et al. 2021]

    A (r, in) starts random, B (out, r) at zero: step 0 is exactly the base layer. Works on nn.Linear and
    Conv1D. rslora: s = alpha / sqrt(r) instead of alpha / r. [rsLoRA: Kalajdzievski 2023]
    """

    def __init__(self, linear, r=8, alpha=16, generator=None, rslora=False):
        super().__init__()
        if r < 1:
            raise ValueError(f"rank r must be at least 1, got {r}")
        d_out, d_in = weight_of(linear).shape
        device = linear.weight.device
        bound = 1 / math.sqrt(d_in)                        # PEFT's kaiming_uniform(a=sqrt 5)
        self.linear, self.r, self.alpha, self.rslora = linear, r, alpha, rslora
        self.scaling = alpha / (math.sqrt(r) if rslora else r)
        self.A = nn.Parameter(((torch.rand(r, d_in, generator=generator) * 2 - 1) * bound).to(device))
        self.B = nn.Parameter(torch.zeros(d_out, r, device=device))
        self.unmerged = None                               # W while merged, on the CPU
        self.ready = None                                  # (A, s B) in W's dtype, while inference() lasts

    def prepare(self):
        """Cast A and s B once: inference is two small products without casts. Training stays in float32."""
        dtype = self.linear.weight.dtype
        self.ready = self.A.detach().to(dtype), (self.scaling * self.B.detach()).to(dtype)

    def forward(self, x):
        """x (..., in) -> (..., out). In training the two small products run in float32 and are cast back."""
        y = self.linear(x)
        if self.unmerged is not None:
            return y
        if self.ready is not None and not torch.is_grad_enabled():
            A, B = self.ready
            return y + (x @ A.T) @ B.T
        return y + (self.scaling * ((x.to(self.A.dtype) @ self.A.T) @ self.B.T)).to(y.dtype)

    @torch.no_grad()
    def merge(self, recompress=None):
        """Fold B A into W. recompress: W (out, in) -> W, to put the sum back on a grid or under a mask."""
        if self.unmerged is not None:
            return
        self.unmerged = self.linear.weight.data.cpu()      # merging is to take no memory on the device
        W = weight_of(self.linear)                         # (out, in)
        W = (W.float() + self.scaling * (self.B @ self.A).float()).to(W.dtype)
        W = recompress(W) if recompress else W
        self.linear.weight.data = W.T.contiguous() if isinstance(self.linear, Conv1D) else W

    @torch.no_grad()
    def unmerge(self):
        """Put W back, bit for bit: it was kept, as subtracting in floating point would not return it."""
        if self.unmerged is not None:
            self.linear.weight.data = self.unmerged.to(self.linear.weight.device)
            self.unmerged = None


# --- 2. A model's layers ------------------------------------------------------------------------------------

def last_name(name):
    """'model.layers.0.self_attn.q_proj' -> 'q_proj'."""
    return name.split(".")[-1]


def new_layers(model, r, alpha, targets, seed):
    """{name: LoRALinear} for the layers that targets names. Raises UserError for a name that no layer has."""
    linears, generator = linears_in_blocks(model), torch.Generator().manual_seed(seed)
    known = {last_name(name) for name in linears}
    missing = sorted(set(targets) - known)
    if missing:
        raise UserError(f"--targets {','.join(targets)}: no {', '.join(missing)} in the blocks; "
                        f"use some of: {' '.join(sorted(known))}")
    return {name: LoRALinear(linear, r, alpha, generator) for name, linear in linears.items()
            if last_name(name) in targets}


class LoRA:
    """`lora`: LoRALinear in place of some linear layers of the blocks.

    targets: names of layers, PEFT's defaults when absent. layers: {name: LoRALinear}, instead of new ones.
    """

    def __init__(self, model, r=8, alpha=16, targets=None, seed=0, layers=None):
        self.model = model
        self.layers = layers or new_layers(model, r, alpha, targets or arch_of(model).lora, seed)
        self.base = {name: layer.linear for name, layer in self.layers.items()}

    def groups(self):
        """All matrices are clipped together, as usual."""
        return [[t for layer in self.layers.values() for t in (layer.A, layer.B)]]

    @contextlib.contextmanager
    def training(self):
        """Put the LoRALinears in place; take them out again on exit."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        try:
            yield self
        finally:
            for name, linear in self.base.items():
                self.model.set_submodule(name, linear)

    @contextlib.contextmanager
    def inference(self):
        """The same, with A and B cast on entry: what is trained meanwhile does not count."""
        for layer in self.layers.values():
            layer.prepare()
        try:
            with self.training():
                yield self
        finally:
            for layer in self.layers.values():
                layer.ready = None

    def losses(self, ids, teacher=None):
        """ids (B, T) -> (B,)."""
        return row_losses(self.model, ids, teacher=teacher, use_cache=False, **{CACHE: NoCache()})

    def tensors(self):
        """-> {name: tensor} under PEFT's names."""
        named = {}
        for name, layer in self.layers.items():
            named[tensor_name(name, "A")] = layer.A
            named[tensor_name(name, "B")] = layer.B
        return named

    def save(self, folder):
        """PEFT's LORA layout. Call it unmerged and outside training(): recipe.json is of the base weights."""
        layers, linears = self.layers, linears_in_blocks(self.model)
        assert all(layer.unmerged is None for layer in layers.values()), "unmerge before save"
        assert all(linears.get(name) is self.base[name] for name in layers), "save outside training()"
        first = next(iter(layers.values()))
        write_peft(folder, self.model, self.tensors(), {
            "peft_type": "LORA", "r": first.r, "lora_alpha": first.alpha, "use_rslora": first.rslora,
            "rank_pattern": {name: x.r for name, x in layers.items() if x.r != first.r},
            "alpha_pattern": {name: x.alpha for name, x in layers.items() if x.alpha != first.alpha},
            "target_modules": targets_of(layers, linears), "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": isinstance(first.linear, Conv1D), "init_lora_weights": True})


def targets_of(names, linears):
    """target_modules that mean these layers: last names, or whole names when some blocks lack a layer."""
    last = {last_name(name) for name in names}
    complete = set(names) == {name for name in linears if last_name(name) in last}
    return sorted(last) if complete else sorted(names)


# --- 3. Reading ---------------------------------------------------------------------------------------------

def tensor_name(name, half):
    """PEFT's name of A or B of a layer."""
    return f"base_model.model.{name}.lora_{half}.weight"


def read_lora(model, config, folder):
    """A folder of PEFT's LORA: the tensors' names say which layers there are. -> LoRA. Raises UserError."""
    check_keys(config, LORA)
    linears = linears_in_blocks(model)
    with open_weights(folder) as file:
        names = layers_in(file, linears)
        check_targets(config, names, linears)
        ranks = by_pattern(config.obj.get("rank_pattern"), names, config("r", RANK))
        alphas = by_pattern(config.obj.get("alpha_pattern"), names, config("lora_alpha", ALPHA))
        rslora = config.obj.get("use_rslora") or False
        layers = {name: read_layer(file, name, linears[name], ranks[name], alphas[name], rslora)
                  for name in names}
    return LoRA(model, layers=layers)


def layers_in(file, linears):
    """Names of the layers of which a file holds both halves. Raises UserError for any other tensor."""
    found = set()
    for tensor in file.names:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", tensor)
        if not match or match[1] not in linears:
            raise UserError(f"{file.where}: has no place for {tensor[:120]}: here LoRA sits on linear layers "
                            f"of the blocks, such as {next(iter(linears))}, not on lm_head or embeddings; "
                            "use the adapter's own model")
        found.add(match[1])
    if not found:
        raise UserError(f"{file.where}: holds no tensors; write or download it again")
    file.exactly([tensor_name(name, half) for name in found for half in "AB"])
    return [name for name in linears if name in found]


def check_targets(config, names, linears):
    """Refuse a file whose layers are not those that a list of targets means. Regular expressions are not run.

    PEFT would drop the tensors of a layer that is not meant, and start one that has none anew.
    """
    targets, indices = config.obj.get("target_modules"), config.obj.get("layers_to_transform")
    indices = [indices] if isinstance(indices, int) else indices
    if not isinstance(targets, list):
        return
    for name in linears:
        meant = any(name == target or name.endswith(f".{target}") for target in targets)
        meant = meant and (not indices or int(re.search(r"\.(\d+)\.", name)[1]) in indices)
        if name in names and not meant:
            raise UserError(f"{config.where}: target_modules and layers_to_transform do not mean {name}, of "
                            "which there are tensors; copy the whole adapter again")
        if meant and name not in names and not config.obj.get("exclude_modules"):
            raise UserError(f"{config.where}: target_modules means {name} too, of which there are no "
                            "tensors; copy the whole adapter again")


def read_layer(file, name, linear, r, alpha, rslora):
    """One layer's LoRALinear, shapes compared with the model's before A and B are read. Raises UserError."""
    d_out, d_in = weight_of(linear).shape
    A = read_tensor(file, tensor_name(name, "A"), (r, d_in), linear.weight.dtype)
    B = read_tensor(file, tensor_name(name, "B"), (d_out, r), linear.weight.dtype)
    layer = LoRALinear(linear, r, alpha, rslora=rslora)
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
    return layer
