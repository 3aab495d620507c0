"""Prompts: soft prompts, one or several, and trained keys and values.

    prompt   one soft prompt of n tokens in front of the input            (Lester et al. 2021)
    prefix   trained keys and values in every layer, the paper's baseline (Li and Liang 2021)
    idp      m soft prompts, learnt separately; each input chooses one    (the paper; idp_minimal.py)

Letters: n tokens per prompt, m prompts, N the longest, d width, B batch, T tokens.
"""
import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache

from idp_minimal import CACHE, SELECTORS, PromptBank, attach_idp, prompt_cache
from methods import selectors                          # noqa: F401, more rules join SELECTORS
from methods.losses import row_losses
from support.adapters import (IDP, IDP_CONFIG, PREFIX_TUNING, PROMPT_TUNING, RECIPE, base_of,
                              check_keys, folder_inside, open_weights, read_config, read_tensor, same_as,
                              write_peft)
from support.architectures import room
from support.cli import UserError
from support.files import one_of, whole_number
from support.output import write_json
from support.recipe import recipe_of


# --- 1. Soft prompts ----------------------------------------------------------------------------------------

def initial_prompt(model, n, generator):
    """n random rows of the embedding table to start a soft prompt from. -> (n, d) float32.

    Random normal vectors lie far from every embedding and learn much more slowly. NOT IN PAPER: which start
    the authors used.
    """
    weight = model.get_input_embeddings().weight
    rows = torch.randint(len(weight), (n,), generator=generator)
    return weight[rows.to(weight.device)].float().clone()  # (n, d)


def mask_among(real, dtype):
    """What each token of a prompt may see, to be added to attention logits. real (m, N) -> (m, 1, N, N).

    Given (m, N), transformers would read it back from the device at every step. Padding sees itself: a row of
    no columns might give NaN.
    """
    N = real.shape[1]
    seen = real[:, None] & torch.ones(N, N, dtype=torch.bool).tril() | torch.eye(N, dtype=torch.bool)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class SoftPrompts:
    """`prompt` (one) and `idp` (m): trained vectors in front of the input. [Lester et al.] [§3.3.1]

    The m prompts are trained side by side and know nothing of one another: each learns from every row, as m
    separate runs of ordinary prompt tuning would. Choosing exists at inference only. So IDP's training costs
    m prompts.
    """
    counted = slice(None)                                  # tokens that count, of those after the first

    def __init__(self, model, lengths, seed=0, selector="mean_attention", layers="every", scores="logits"):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.lengths = model, [lengths] if isinstance(lengths, int) else list(lengths)
        self.reading = {"selector": selector, "layers": layers, "scores": scores}
        self.prompts = [nn.Parameter(initial_prompt(model, n, generator)) for n in self.lengths]
        # Prompts stand at the right end of N columns. Made once: a copy to the device is a wait in each step.
        self.N = max(self.lengths)
        padding = self.N - torch.tensor(self.lengths)      # (m,)
        real = torch.arange(self.N) >= padding[:, None]    # (m, N)
        self.mask = real.long().to(self.prompts[0].device)
        self.prompt_mask = None if real.all() else mask_among(real, model.dtype).to(self.mask.device)

    def groups(self):
        """One group per prompt: clipping must not couple prompts that learn separately."""
        return [[P] for P in self.prompts]

    def losses(self, ids, owner=None, teacher=None):
        """ids (B, T) -> (m B,): every row under every prompt. With owner (B,): row b under prompt owner[b] ->
        (B,).

        No prompt sees the rows that follow it: so each runs once a step, and its rows share keys and values.
        """
        m, copies = len(self.prompts), 1
        if owner is None:
            copies = m                                     # the teacher reads each row once
            owner = torch.arange(m, device=ids.device).repeat_interleave(len(ids))
            ids = ids.repeat(m, 1)                                                             # (m B, T)
        (B, T), N = ids.shape, self.N
        padded = torch.stack([F.pad(P, (0, 0, N - len(P), 0)) for P in self.prompts])   # (m, N, d)
        positions = torch.arange(N + T - 1, device=ids.device)[None]                    # (1, N+T-1)
        cache = DynamicCache()
        self.model.base_model(inputs_embeds=padded.to(self.model.dtype), attention_mask=self.prompt_mask,
                              position_ids=positions[:, :N].expand(m, -1), use_cache=True, **{CACHE: cache})
        # L pairs of (B, h_kv, N, d_k): each row gets its prompt's keys and values
        cache = DynamicCache([(layer.keys[owner], layer.values[owner]) for layer in cache.layers])
        mask = torch.cat([self.mask[owner], torch.ones_like(ids[:, 1:])], dim=1)        # (B, N+T-1)
        return row_losses(self.model, ids, self.counted, teacher, copies, attention_mask=mask, use_cache=True,
                          position_ids=positions[:, N:].expand(B, -1), **{CACHE: cache})

    def training(self):
        """Nothing to attach: losses() runs prompts and rows itself."""
        return contextlib.nullcontext()

    def inference(self):
        """The prompts as a bank of keys and values, one chosen per input. [§3.2]"""
        bank = PromptBank.from_prompts(self.model, [P.detach() for P in self.prompts])
        return attach_idp(self.model, bank, **self.reading)

    def parts(self):
        """{row: method} of what IDP is compared with: each prompt alone, and all in a row. [Tab. 3]"""
        if len(self.prompts) == 1:
            return {}
        named = {f"prompt {k + 1} alone ({n} tokens)": [P.detach()] for k, (n, P) in
                 enumerate(zip(self.lengths, self.prompts))}
        named["concatenated"] = [torch.cat([P.detach() for P in self.prompts])]
        return {name: soft_prompts_from(self.model, prompts) for name, prompts in named.items()}

    def tensors(self):
        """-> {name: tensor}, what a checkpoint holds."""
        return {f"prompts.{k}": P for k, P in enumerate(self.prompts)}

    def save(self, folder):
        """One PEFT folder for a single prompt; for several, prompts/0, prompts/1, ... and idp_config.json."""
        if len(self.prompts) == 1:
            return self.save_prompt(folder, self.prompts[0])
        for k, P in enumerate(self.prompts):
            self.save_prompt(folder / "prompts" / str(k), P)
        write_json(folder / IDP_CONFIG, {
            "method": "idp", **self.reading, "lengths": self.lengths,
            "prompts": [f"prompts/{k}" for k in range(len(self.prompts))], **base_of(self.model)})
        write_json(folder / RECIPE, recipe_of(self.model))

    def save_prompt(self, folder, P):
        """One soft prompt in PEFT's PROMPT_TUNING layout."""
        write_peft(folder, self.model, {"prompt_embeddings": P}, {
            "peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(P), "token_dim": P.shape[1],
            "num_transformer_submodules": 1, "num_attention_heads": self.model.config.num_attention_heads,
            "num_layers": self.model.config.num_hidden_layers, "prompt_tuning_init": "RANDOM"})


def soft_prompts_from(model, prompts, **reading):
    """SoftPrompts that hold given tensors (n_k, d)."""
    method = SoftPrompts(model, [len(P) for P in prompts], **reading)
    with torch.no_grad():
        for own, P in zip(method.prompts, prompts, strict=True):
            own.copy_(P)
    return method


def read_prompt(model, config, folder):
    """A folder of PEFT's PROMPT_TUNING. -> SoftPrompts with one prompt. Raises UserError."""
    return soft_prompts_from(model, [read_embeddings(model, config, folder)])


def read_embeddings(model, config, folder):
    """The prompt (n, d) in a folder of PEFT's PROMPT_TUNING. Raises UserError when it does not fit."""
    check_keys(config, PROMPT_TUNING)
    n = config("num_virtual_tokens", whole_number(1, room(model, 1)))      # one token at least is left
    # d is the width of the token embeddings. PEFT takes the hidden size, which in OPT-350m is another and
    # fits nowhere.
    d = config("token_dim", same_as(model.get_input_embeddings().weight.shape[1]))
    if config.obj.get("num_layers") is not None:
        config("num_layers", same_as(model.config.num_hidden_layers))
    with open_weights(folder) as file:
        file.exactly(["prompt_embeddings"])
        return read_tensor(file, "prompt_embeddings", (n, d), model.dtype)


# "oracle" is for analysis: it asks for the answers' losses, which nobody has at inference.
STORED_SELECTORS = [name for name in SELECTORS if name != "oracle"]


def read_idp(model, config, folder):
    """idp_config.json and its folders of prompts. -> SoftPrompts. Raises UserError."""
    check_keys(config, IDP)
    names, lengths = config("prompts", IDP["prompts"]), config("lengths", IDP["lengths"])
    # Folders without layers and scores were written when there was one reading: the first layer, after the
    # softmax.
    reading = {"selector": config("selector", one_of(*STORED_SELECTORS)),
               "layers": config("layers", IDP["layers"], "first"),
               "scores": config("scores", IDP["scores"], "probabilities")}
    prompts = [read_member(model, config, folder, name) for name in names]
    if lengths != [len(P) for P in prompts]:
        raise UserError(f"{config.where}: lengths is {str(lengths)[:60]}, and the prompts have "
                        f"{str([len(P) for P in prompts])[:60]} tokens; copy the whole adapter again")
    return soft_prompts_from(model, prompts, **reading)


def read_member(model, config, folder, name):
    """The prompt (n, d) that idp_config.json calls `name`. Raises UserError."""
    inner = folder_inside(folder, name, config.where)
    inner_config, kind = read_config(inner)
    if kind != "PROMPT_TUNING":
        raise UserError(f"{inner_config.where}: peft_type is {kind[:40]}; it must be PROMPT_TUNING")
    return read_embeddings(model, inner_config, inner)


# --- 2. Keys and values -------------------------------------------------------------------------------------

class Prefix:
    """`prefix`: keys and values themselves are trained, in every layer: IDP's bank with m = 1. [Li and Liang]

    DEVIATES: no re-parametrisation by an MLP; it starts from the cache of a prompt of random vocabulary rows.
    """

    def __init__(self, model, n, seed=0):
        self.model = model
        P = initial_prompt(model, n, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            cache = prompt_cache(model, P, n)              # L x (1, h_kv, n, d_k)
        self.keys = [nn.Parameter(k.float()) for k, _ in cache]
        self.values = [nn.Parameter(v.float()) for _, v in cache]

    def groups(self):
        """All keys and values are clipped together."""
        return [self.keys + self.values]

    def training(self):
        """Nothing to attach: losses() fills the cache itself."""
        return contextlib.nullcontext()

    def inference(self):
        """A bank made of the trained tensors, cast to the model's dtype."""
        dtype, n = self.model.dtype, self.keys[0].shape[2]
        bank = PromptBank([k.to(dtype) for k in self.keys], [v.to(dtype) for v in self.values], [n])
        return attach_idp(self.model, bank, "fixed")

    def losses(self, ids, teacher=None):
        """ids (B, T) -> (B,)."""
        dtype, rows = self.model.dtype, len(ids)
        pairs = [(k.to(dtype).expand(rows, -1, -1, -1), v.to(dtype).expand(rows, -1, -1, -1))
                 for k, v in zip(self.keys, self.values)]  # L x (B, h_kv, n, d_k)
        return row_losses(self.model, ids, teacher=teacher, use_cache=True, **{CACHE: DynamicCache(pairs)})

    def tensors(self):
        """-> {name: tensor}, what a checkpoint holds."""
        named = [("keys", self.keys), ("values", self.values)]
        return {f"{name}.{i}": t for name, tensors in named for i, t in enumerate(tensors)}

    def save(self, folder):
        """PEFT's PREFIX_TUNING layout: (n, 2 L h_kv d_k), keys and values of each layer in turn."""
        L, (_, h_kv, n, d_k) = len(self.keys), self.keys[0].shape
        pairs = torch.stack([t[0] for kv in zip(self.keys, self.values) for t in kv])   # (2L, h_kv, n, d_k)
        write_peft(folder, self.model, {"prompt_embeddings": pairs.permute(2, 0, 1, 3).reshape(n, -1)}, {
            "peft_type": "PREFIX_TUNING", "num_virtual_tokens": n, "token_dim": h_kv * d_k, "num_layers": L,
            "num_attention_heads": h_kv, "num_transformer_submodules": 1, "prefix_projection": False})


def read_prefix(model, config, folder):
    """A folder of PEFT's PREFIX_TUNING. -> Prefix. Raises UserError."""
    check_keys(config, PREFIX_TUNING)
    n = config("num_virtual_tokens", whole_number(1, room(model, 1)))      # one token at least is left
    method = Prefix(model, n)
    L, (_, h_kv, _, d_k) = len(method.keys), method.keys[0].shape
    for key, value in (("num_layers", L), ("num_attention_heads", h_kv), ("token_dim", h_kv * d_k)):
        config(key, same_as(value))
    with open_weights(folder) as file:
        file.exactly(["prompt_embeddings"])
        flat = read_tensor(file, "prompt_embeddings", (n, 2 * L * h_kv * d_k), model.dtype)
    pairs = flat.view(n, L, 2, 1, h_kv, d_k).permute(1, 2, 3, 4, 0, 5)    # (L, 2, 1, h_kv, n, d_k)
    with torch.no_grad():
        for own_k, own_v, (k, v) in zip(method.keys, method.values, pairs, strict=True):
            own_k.copy_(k)
            own_v.copy_(v)
    return method
