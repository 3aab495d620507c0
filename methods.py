"""Methods: the small trainable things that are to bring knowledge back, and how they lie on disk.

    prompt   one soft prompt of n tokens in front of the input            (Lester et al. 2021)
    prefix   trained keys and values in every layer                       (Li and Liang 2021; the paper's second baseline)
    idp      m soft prompts, learnt separately; each input chooses one    (the paper; idp_minimal.py)
    lora     W + (alpha / r) B A on some linear layers                    (Hu et al. 2021)

    method = LoRA(model, r=8, alpha=16)                    # the model's own weights stay frozen, bit for bit
    method.losses(ids)                                     # (B,) what recover.py's training loop minimises
    with method.inference(): model(ids)                    # the model with the method applied
    method.save(folder); load_adapter(model, folder)       # PEFT's layout

Letters: n tokens per prompt, m prompts, N the longest, r rank, d width, B batch, T tokens.
"""
import contextlib
import json
import math
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import loading
from idp_minimal import CACHE, PromptBank, attach_idp, prompt_cache
from loading import UserError


# --- 1. The methods: each trains little and leaves the base model's weights alone -----------------------------------------
# Interface: groups() lists of trainables that are clipped together; losses(ids) -> (B,) one mean loss per row;
# training() and inference() are context managers under which the model is trained or used; tensors() what is saved.
# EXERCISE: add a remedy. One class with this interface, one line in METHODS; tests/test_recover.py grades it.

class TokenLosses(torch.autograd.Function):
    """Cross entropy of every token, from the last hidden states, a few tokens at a time.

    (tokens, V) logits and their gradient would be the largest tensors of a step. The head is frozen, so a chunk's part of
    d loss / d hidden is known as soon as its logits are, and nothing else has to be kept.
    """
    CHUNK = 128                                            # tokens

    @staticmethod
    def forward(ctx, hidden, targets, head):
        """hidden (tokens, d), targets (tokens,), head: a frozen linear layer d -> V. -> (tokens,) float32."""
        losses, gradient = [], torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), TokenLosses.CHUNK):
            rows, target = slice(i, i + TokenLosses.CHUNK), targets[i:i + TokenLosses.CHUNK, None]
            logp = head(hidden[rows]).float().log_softmax(1)                                   # (chunk, V)
            losses.append(-logp.gather(1, target)[:, 0])
            if gradient is not None:
                # d loss / d logits = softmax(logits) - onehot(target)
                p = logp.exp_().scatter_add_(1, target, -torch.ones_like(losses[-1])[:, None])
                gradient[rows] = p.to(head.weight.dtype) @ head.weight                         # (chunk, d)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, given):
        """given (tokens,): d result / d loss of each token."""
        gradient, = ctx.saved_tensors
        return (gradient * given[:, None]).to(gradient.dtype), None, None                      # the product in float32


def row_losses(model, ids, counted=slice(None), **kwargs):
    """Mean next-token loss of each row of ids (B, T). -> (B,). counted: which of the T-1 tokens that follow another.

    The first token is not scored: without a prompt nothing predicts it, so with one it must not count either. The last
    predicts nothing, so it does not run. kwargs: mask, positions and cache of the first T-1. Raises ValueError when the head
    is to be trained: its gradient is what TokenLosses leaves out.
    """
    head = model.get_output_embeddings()
    if head.weight.requires_grad:
        raise ValueError("row_losses gives lm_head no gradient: freeze it, or use F.cross_entropy on its logits")
    hidden = model.base_model(ids[:, :-1], **kwargs).last_hidden_state[:, counted]             # (B, counted, d)
    targets = ids[:, 1:][:, counted]
    losses = TokenLosses.apply(hidden.flatten(0, 1), targets.flatten(), head)
    return losses.view(targets.shape).mean(1)


def initial_prompt(model, n, generator, text_ids=None):
    """n rows of the embedding table to start a soft prompt from. -> (n, d) float32.

    Random vocabulary rows (or the tokens of a text, repeated to length): random normal vectors lie far from every
    embedding and learn much more slowly. NOT IN PAPER: which initialisation the authors used.
    """
    weight = model.get_input_embeddings().weight
    if text_ids is None:
        text_ids = torch.randint(len(weight), (n,), generator=generator)
    rows = text_ids.repeat(math.ceil(n / len(text_ids)))[:n]
    return weight[rows.to(weight.device)].float().clone()                                      # (n, d)


class SoftPrompts:
    """`prompt` (one) and `idp` (m): trained vectors in front of the input. [Lester et al.] [IDP: prompts]

    Rows of a batch are dealt out to the m prompts in turn, and each prompt's loss is the mean over its own rows: so m
    prompts learn separately, each on its own share of the data, in one pass. Equal training tokens for every m.
    """
    peft_type = "PROMPT_TUNING"
    counted = slice(None)                                  # tokens that count, of those after the first

    def __init__(self, model, lengths, seed=0, text_ids=None, selector="mean_attention"):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.selector, self.lengths, self.N = model, selector, list(lengths), max(lengths)
        self.prompts = [nn.Parameter(initial_prompt(model, n, generator, text_ids)) for n in lengths]

    def groups(self):
        """One group per prompt: clipping must not couple prompts that learn separately."""
        return [[P] for P in self.prompts]

    def losses(self, ids, owner=None):
        """ids (B, T); row b trains prompt owner[b], b mod m when not given. -> (B,).

        No prompt sees the rows that follow it: so each runs once a step, and its rows share the keys and values.
        """
        (B, T), N, m = ids.shape, self.N, len(self.prompts)
        owner = torch.arange(B, device=ids.device) % m if owner is None else owner
        padded = torch.stack([F.pad(P, (0, 0, N - len(P), 0)) for P in self.prompts])          # (m, N, d)
        positions = torch.arange(N + T - 1, device=ids.device)[None]                           # (1, N+T-1)
        mask = (positions[:, :N] >= N - torch.tensor(self.lengths, device=ids.device)[:, None]).long()  # (m, N)
        cache = DynamicCache()
        self.model.base_model(inputs_embeds=padded.to(self.model.dtype), attention_mask=mask, use_cache=True,
                              position_ids=positions[:, :N].expand(m, -1), **{CACHE: cache})
        cache = DynamicCache([(layer.keys[owner], layer.values[owner]) for layer in cache.layers])  # L x (B, h_kv, N, d_k)
        mask = torch.cat([mask[owner], torch.ones_like(ids[:, 1:])], dim=1)                    # (B, N+T-1)
        return row_losses(self.model, ids, self.counted, attention_mask=mask, use_cache=True,
                          position_ids=positions[:, N:].expand(B, -1), **{CACHE: cache})

    def training(self):
        """Nothing to attach: losses() runs prompts and rows itself."""
        return contextlib.nullcontext()

    def inference(self):
        """The prompts as a bank of keys and values, one chosen per input. [IDP: bank] [IDP: choice]"""
        return attach_idp(self.model, PromptBank.from_prompts(self.model, [P.detach() for P in self.prompts]), self.selector)

    def tensors(self):
        """-> {name: tensor}, what a checkpoint holds."""
        return {f"prompts.{k}": P for k, P in enumerate(self.prompts)}

    def save(self, folder):
        """One PEFT folder for a single prompt; for several, prompts/0, prompts/1, ... and idp_config.json."""
        if len(self.prompts) == 1:
            return self.save_prompt(folder, self.prompts[0])
        for k, P in enumerate(self.prompts):
            self.save_prompt(folder / "prompts" / str(k), P)
        loading.write_json(folder / "idp_config.json", {
            "method": "idp", "prompts": [f"prompts/{k}" for k in range(len(self.prompts))], "lengths": self.lengths,
            "selector": self.selector, "base_model_name_or_path": self.model.config.name_or_path})

    def save_prompt(self, folder, P):
        """One soft prompt in PEFT's PROMPT_TUNING layout."""
        write_peft(folder, self.model, {"prompt_embeddings": P}, {
            "peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(P), "token_dim": P.shape[1],
            "num_transformer_submodules": 1, "num_attention_heads": self.model.config.num_attention_heads,
            "num_layers": self.model.config.num_hidden_layers, "prompt_tuning_init": "RANDOM"})


class Prefix:
    """`prefix`: the keys and values themselves are trained, in every layer: IDP's bank with m = 1. [Li and Liang]

    DEVIATES: no re-parametrisation by an MLP; it starts from the cache of a prompt of random vocabulary rows.
    """
    peft_type = "PREFIX_TUNING"

    def __init__(self, model, n, seed=0, text_ids=None):
        self.model = model
        P = initial_prompt(model, n, torch.Generator().manual_seed(seed), text_ids)
        with torch.no_grad():
            cache = prompt_cache(model, P, n)                                                  # L x (1, h_kv, n, d_k)
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

    def losses(self, ids):
        """ids (B, T) -> (B,)."""
        dtype, rows = self.model.dtype, len(ids)
        cache = DynamicCache([(k.to(dtype).expand(rows, -1, -1, -1), v.to(dtype).expand(rows, -1, -1, -1))
                              for k, v in zip(self.keys, self.values)])                        # L x (B, h_kv, n, d_k)
        return row_losses(self.model, ids, use_cache=True, **{CACHE: cache})

    def tensors(self):
        """-> {name: tensor}, what a checkpoint holds."""
        named = [("keys", self.keys), ("values", self.values)]
        return {f"{name}.{i}": t for name, tensors in named for i, t in enumerate(tensors)}

    def save(self, folder):
        """PEFT's PREFIX_TUNING layout: (n, 2 L h_kv d_k), keys and values of each layer in turn."""
        L, (_, h_kv, n, d_k) = len(self.keys), self.keys[0].shape
        pairs = torch.stack([t[0] for kv in zip(self.keys, self.values) for t in kv])          # (2L, h_kv, n, d_k)
        write_peft(folder, self.model, {"prompt_embeddings": pairs.permute(2, 0, 1, 3).reshape(n, -1)}, {
            "peft_type": "PREFIX_TUNING", "num_virtual_tokens": n, "token_dim": h_kv * d_k, "prefix_projection": False,
            "num_transformer_submodules": 1, "num_attention_heads": h_kv, "num_layers": L})


class LoRALinear(nn.Module):
    """y = x W^T + (alpha / r) x A^T B^T, with W frozen. [Hu et al. 2021]

    A (r, in) starts random, B (out, r) at zero: step 0 is exactly the base layer. Works on nn.Linear and GPT-2's Conv1D.
    """

    def __init__(self, linear, r=8, alpha=16, generator=None):
        super().__init__()
        if r < 1:
            raise ValueError(f"rank r must be at least 1, got {r}")
        d_in, d_out = linear.weight.shape if isinstance(linear, Conv1D) else linear.weight.shape[::-1]
        device = linear.weight.device
        bound = 1 / math.sqrt(d_in)                        # PEFT's kaiming_uniform(a=sqrt 5) is U(-1/sqrt in, 1/sqrt in)
        self.linear, self.r, self.scaling, self.unmerged = linear, r, alpha / r, None
        self.A = nn.Parameter(((torch.rand(r, d_in, generator=generator) * 2 - 1) * bound).to(device))
        self.B = nn.Parameter(torch.zeros(d_out, r, device=device))

    def forward(self, x):
        """x (..., in) -> (..., out); the two small products run in float32 and are cast back."""
        y = self.linear(x)
        if self.unmerged is not None:
            return y
        return y + (self.scaling * ((x.to(self.A.dtype) @ self.A.T) @ self.B.T)).to(y.dtype)

    def base_weight(self):
        """The base layer's W (out, in), whichever way it is stored."""
        W = self.linear.weight.data
        return W.T if isinstance(self.linear, Conv1D) else W

    @torch.no_grad()
    def merge(self, recompress=None):
        """Fold B A into W. recompress: W (out, in) -> W, to put the sum back on a grid or under a mask.

        Without it a merged weight leaves the grid (or fills the zeros) of the compressed one: the same outputs, but no
        longer a compressed model. With it the model stays compressed, and what is compared is another model.
        """
        if self.unmerged is not None:
            return
        self.unmerged = self.linear.weight.data
        W = self.base_weight()                                                                     # (out, in)
        W = (W.float() + self.scaling * (self.B @ self.A).float()).to(W.dtype)
        W = recompress(W) if recompress else W
        self.linear.weight.data = W.T.contiguous() if isinstance(self.linear, Conv1D) else W

    @torch.no_grad()
    def unmerge(self):
        """Put W back, bit for bit: it was kept, since adding and subtracting in floating point would not return it."""
        if self.unmerged is not None:
            self.linear.weight.data, self.unmerged = self.unmerged, None


class LoRA:
    """`lora`: LoRALinear in place of the named linear layers of every block; never lm_head or the embeddings."""
    peft_type = "LORA"

    def __init__(self, model, r=8, alpha=16, targets=None, seed=0):
        self.model, self.r, self.alpha = model, r, alpha
        self.targets = list(targets or loading.arch_of(model).lora)
        generator, blocks = torch.Generator().manual_seed(seed), loading.arch_of(model).blocks
        linears = {name: module for name, module in model.named_modules()
                   if name.startswith(blocks + ".") and isinstance(module, (nn.Linear, Conv1D))}
        self.base = {name: linear for name, linear in linears.items() if name.split(".")[-1] in self.targets}
        missing = set(self.targets) - {name.split(".")[-1] for name in self.base}
        if missing:
            known = sorted({name.split(".")[-1] for name in linears})
            raise UserError(f"--targets {','.join(self.targets)}: no {', '.join(sorted(missing))} in the blocks; "
                            f"use some of: {' '.join(known)}")
        self.layers = {name: LoRALinear(linear, r, alpha, generator) for name, linear in self.base.items()}

    def groups(self):
        """All matrices are clipped together, as usual."""
        return [[t for layer in self.layers.values() for t in (layer.A, layer.B)]]

    @contextlib.contextmanager
    def inference(self):
        """Put the LoRALinears in place; take them out again on exit."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        try:
            yield self
        finally:
            for name, linear in self.base.items():
                self.model.set_submodule(name, linear)

    training = inference

    def losses(self, ids):
        """ids (B, T) -> (B,)."""
        return row_losses(self.model, ids, use_cache=False)

    def tensors(self):
        """-> {name: tensor} under PEFT's names."""
        named = {}
        for name, layer in self.layers.items():
            named[f"base_model.model.{name}.lora_A.weight"] = layer.A
            named[f"base_model.model.{name}.lora_B.weight"] = layer.B
        return named

    def save(self, folder):
        """PEFT's LORA layout."""
        conv1d = any(isinstance(linear, Conv1D) for linear in self.base.values())
        write_peft(folder, self.model, self.tensors(), {
            "peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": self.targets, "fan_in_fan_out": conv1d, "init_lora_weights": True, "use_rslora": False})


METHODS = {  # name -> (class, its settings from the command line)
    "prompt": (SoftPrompts, lambda args, text: dict(lengths=[args.prompt_length], text_ids=text)),
    "prefix": (Prefix, lambda args, text: dict(n=args.prompt_length, text_ids=text)),
    "idp": (SoftPrompts, lambda args, text: dict(lengths=args.prompt_lengths, text_ids=text, selector=args.selector)),
    "lora": (LoRA, lambda args, text: dict(r=args.rank, alpha=args.alpha, targets=args.targets)),
}


def snapshot(method):
    """A copy of the trainables."""
    return {name: tensor.detach().clone() for name, tensor in method.tensors().items()}


@torch.no_grad()
def put_back(method, tensors):
    """Write saved values into the trainables."""
    for name, tensor in method.tensors().items():
        tensor.copy_(tensors[name])


# --- 2. Adapters on disk ----------------------------------------------------------------------------------------------------

def write_peft(folder, model, tensors, config):
    """adapter_config.json and adapter_model.safetensors as PEFT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"task_type": "CAUSAL_LM", "inference_mode": True, "modules_to_save": None, "revision": None,
              "base_model_name_or_path": model.config.name_or_path, **config}
    loading.write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model, folder):
    """An adapter folder, ours or PEFT's -> a method whose `with method.inference():` applies it. Raises UserError."""
    folder = pathlib.Path(folder)
    if (folder / "idp_config.json").exists():
        config = json.loads((folder / "idp_config.json").read_text())
        prompts = [load_file(folder / name / "adapter_model.safetensors")["prompt_embeddings"] for name in config["prompts"]]
        return soft_prompts_from(model, prompts, config["selector"])
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"--adapter {folder}: holds no adapter_config.json nor idp_config.json; give the adapter/ folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    readers = {"LORA": lora_from, "PREFIX_TUNING": prefix_from,
               "PROMPT_TUNING": lambda model, tensors, config: soft_prompts_from(model, [tensors["prompt_embeddings"]])}
    if config["peft_type"] not in readers:
        raise UserError(f"--adapter {folder}: peft_type {config['peft_type']} is not one of {' '.join(readers)}")
    return readers[config["peft_type"]](model, tensors, config)


def soft_prompts_from(model, prompts, selector="mean_attention"):
    """SoftPrompts holding given tensors (n_k, d)."""
    method = SoftPrompts(model, [len(P) for P in prompts], selector=selector)
    put_back(method, {f"prompts.{k}": P for k, P in enumerate(prompts)})
    return method


def prefix_from(model, tensors, config):
    """Prefix from PEFT's (n, 2 L h_kv d_k)."""
    method = Prefix(model, config["num_virtual_tokens"])
    L, (_, h_kv, n, d_k) = len(method.keys), method.keys[0].shape
    pairs = tensors["prompt_embeddings"].view(n, 2 * L, h_kv, d_k).permute(1, 2, 0, 3)[:, None]  # (2L, 1, h_kv, n, d_k)
    put_back(method, {**{f"keys.{i}": pairs[2 * i] for i in range(L)}, **{f"values.{i}": pairs[2 * i + 1] for i in range(L)}})
    return method


def lora_from(model, tensors, config):
    """LoRA from PEFT's tensors."""
    method = LoRA(model, config["r"], config["lora_alpha"], config["target_modules"])
    put_back(method, tensors)
    return method
