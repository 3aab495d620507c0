"""Recover: the main job. Compress a language model, then get its knowledge back; print one table.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867. The base model stays frozen; what is trained is small:

    prompt   one soft prompt of n tokens in front of the input            (Lester et al. 2021)
    prefix   trained keys and values in every layer                       (Li and Liang 2021; the paper's second baseline)
    idp      m soft prompts, learnt separately; each input chooses one    (the paper; idp_minimal.py)
    lora     W + (alpha / r) B A on some linear layers                    (Hu et al. 2021)

    python recover.py --method idp                                       # toy model, CPU, no network, about a minute
    python recover.py --method lora --model facebook/opt-125m --compressor gptq --bits 3 --out runs/lora
    python recover.py --method prompt --model runs/compressed            # a folder that compress.py wrote

Writes, with --out DIR: adapter/ (PEFT layout), results.json, results.md, items.json. All methods see the same training
tokens in the same order. Letters: n tokens per prompt, m prompts, N the longest, r rank, d width, B batch, T tokens.
"""
import contextlib
import json
import math
import pathlib
import shlex
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import compress
import evaluate
import loading
from idp_minimal import SELECTORS, PromptBank, attach_idp, prompt_cache
from loading import UserError


# --- 1. The methods: each trains little and leaves the base model's weights alone -----------------------------------------
# Interface: groups() lists of trainables that are clipped together; losses(ids) -> (B,) one mean loss per row;
# training() and inference() are context managers under which the model is trained or used; tensors() what is saved.
# EXERCISE: add a remedy. One class with this interface, one line in METHODS; tests/test_recover.py grades it.

def row_losses(logits, ids):
    """Mean next-token loss of each row, over real tokens only. logits (B, T, V), ids (B, T) -> (B,) float32.

    The first real token is not scored: without a prompt nothing predicts it, so with one it must not count either.
    """
    loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T-1)
    return loss.mean(1)


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

    def __init__(self, model, lengths, seed=0, text_ids=None, selector="mean_attention"):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.selector, self.lengths, self.N = model, selector, list(lengths), max(lengths)
        self.prompts = [nn.Parameter(initial_prompt(model, n, generator, text_ids)) for n in lengths]

    def groups(self):
        """One group per prompt: clipping must not couple prompts that learn separately."""
        return [[P] for P in self.prompts]

    def losses(self, ids, owner=None):
        """ids (B, T); row b trains prompt owner[b], b mod m when not given. -> (B,)."""
        (B, T), N, embed = ids.shape, self.N, self.model.get_input_embeddings()
        owner = torch.arange(B, device=ids.device) % len(self.prompts) if owner is None else owner
        padded = torch.stack([F.pad(P, (0, 0, N - len(P), 0)) for P in self.prompts])          # (m, N, d)
        X = torch.cat([padded[owner].to(embed.weight), embed(ids)], dim=1)                     # (B, N+T, d)
        lengths = torch.tensor(self.lengths, device=ids.device)[owner]                         # (B,)
        columns = torch.arange(N + T, device=ids.device)[None]                                 # (1, N+T)
        mask = (columns >= N - lengths[:, None]).long()                                        # (B, N+T)
        # Prompts predict nothing that counts: the head runs on the T real rows only.
        logits = self.model(inputs_embeds=X, attention_mask=mask, position_ids=columns.expand(B, -1),
                            logits_to_keep=T, use_cache=False).logits                          # (B, T, V)
        return row_losses(logits, ids)

    def training(self):
        """Nothing to attach: the prompt goes in as embeddings."""
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
        """attach_idp builds the pass; losses() refreshes the bank, whose tensors carry the gradient."""
        return contextlib.nullcontext()

    def inference(self):
        """A bank made of the trained tensors, cast to the model's dtype."""
        dtype, n = self.model.dtype, self.keys[0].shape[2]
        bank = PromptBank([k.to(dtype) for k in self.keys], [v.to(dtype) for v in self.values], [n])
        return attach_idp(self.model, bank, "fixed")

    def losses(self, ids):
        """ids (B, T) -> (B,)."""
        with self.inference():
            return row_losses(self.model(ids, use_cache=False).logits, ids)

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

    @torch.no_grad()
    def merge(self, recompress=None):
        """Fold B A into W. recompress: W (out, in) -> W, to put the sum back on a grid or under a mask.

        Without it a merged weight leaves the grid (or fills the zeros) of the compressed one: the same outputs, but no
        longer a compressed model. With it the model stays compressed, and what is compared is another model.
        """
        if self.unmerged is not None:
            return
        self.unmerged = self.linear.weight.data
        transposed = isinstance(self.linear, Conv1D)
        W = self.unmerged.T if transposed else self.unmerged                                   # (out, in)
        W = (W.float() + self.scaling * (self.B @ self.A).float()).to(W.dtype)
        W = recompress(W) if recompress else W
        self.linear.weight.data = W.T.contiguous() if transposed else W

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
        return row_losses(self.model(ids, use_cache=False).logits, ids)

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
# NOT IN PAPER: the peak learning rates, chosen per method by the sweep that tutorial.md prints.
LEARNING_RATES = {"prompt": 3e-2, "prefix": 1e-2, "idp": 3e-2, "lora": 3e-3}


# --- 2. One training loop for all -------------------------------------------------------------------------------------------

def batch_at(ids, step, batch_size, seqlen, seed):
    """The random chunks of one step, a pure function of (seed, step): so a resumed run sees what the first would have.

    ids (tokens,) -> (batch_size, seqlen) long.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - seqlen + 1, (batch_size,), generator=generator)
    return ids[starts[:, None] + torch.arange(seqlen)]                                         # (B, T)


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then linear decay to zero. NOT IN PAPER: the schedule."""
    ramp = max(1, round(warmup * steps))
    return peak * min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


@contextlib.contextmanager
def checkpointed_blocks(model, enabled):
    """Recompute each block in the backward pass instead of storing its activations.

    Ours rather than transformers' switch, which only acts in training mode, and that would turn dropout on.
    """
    blocks = loading.blocks_of(model) if enabled else []
    for block in blocks:
        block.forward = (lambda forward: lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k))(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward                              # the class's own forward shows again


def train(method, ids, steps, batch_size, seqlen, lr, seed=0, accumulate=1, checkpointing=False, state_file=None,
          save_every=50, resume=False, quiet=None):
    """AdamW on the method's trainables. ids: (tokens,) long on the CPU. Returns {"loss", "seconds", "tokens"}.

    Raises UserError when the text is too short, the batch does not divide, or the loss stops being a number (the
    trainables then hold the last good state).
    """
    groups, device = method.groups(), method.model.device
    check_training(ids, batch_size, seqlen, accumulate, len(groups))
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=lr, weight_decay=0.0)
    first = restore(state_file, method, optimizer) if resume else 0
    good, loss, start = snapshot(method), float("nan"), time.time()
    with method.training(), checkpointed_blocks(method.model, checkpointing):
        bar = tqdm(range(first, steps), initial=first, total=steps, desc="train", disable=quiet, unit="step")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            batch, total = batch_at(ids, step, batch_size, seqlen, seed).to(device), 0
            for rows in batch.chunk(accumulate):
                losses = method.losses(rows)               # (B / accumulate,)
                # each of the len(groups) prompts gets the mean over its own B / len(groups) rows
                (losses.sum() * len(groups) / batch_size).backward()
                total = total + losses.detach().sum() / batch_size
            for group in groups:
                nn.utils.clip_grad_norm_(group, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 9 or step == steps - 1:        # reading the loss waits for the GPU: not at every step
                loss = total.item()
                if not math.isfinite(loss) or not all(t.isfinite().all() for t in method.tensors().values()):
                    put_back(method, good)
                    raise UserError(f"--lr {lr}: the loss stopped being a number near step {step + 1}; the state of step "
                                    f"{step - step % 10} is kept; use a smaller --lr")
                good = snapshot(method)
                bar.set_postfix(loss=f"{loss:.3f}", tok_s=int((step + 1 - first) * batch.numel() / (time.time() - start)))
            if state_file and (step + 1) % save_every == 0:
                save_state(state_file, method, optimizer, step + 1)
    return {"loss": loss, "seconds": time.time() - start, "tokens": steps * batch_size * seqlen}


def check_training(ids, batch_size, seqlen, accumulate, m):
    """Refuse what cannot train, before the first step."""
    if len(ids) < seqlen + 1:
        raise UserError(f"--text: has {len(ids)} tokens, fewer than one chunk of --train-seqlen {seqlen}; give more text")
    if batch_size % (accumulate * m):
        raise UserError(f"--batch-size {batch_size}: must be a multiple of {accumulate * m} (--accumulate {accumulate} x "
                        f"{m} prompts), so that every prompt sees equally many rows; use {accumulate * m * max(1, batch_size // (accumulate * m))}")


def snapshot(method):
    """A copy of the trainables."""
    return {name: tensor.detach().clone() for name, tensor in method.tensors().items()}


@torch.no_grad()
def put_back(method, tensors):
    """Write saved values into the trainables."""
    for name, tensor in method.tensors().items():
        tensor.copy_(tensors[name])


def save_state(path, method, optimizer, step):
    """Trainables, both Adam moments and the step in one safetensors file, whole or not at all."""
    path, state = pathlib.Path(path), {name: t.detach().contiguous() for name, t in method.tensors().items()}
    for name, tensor in method.tensors().items():
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[tensor][moment]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path) + ".tmp", metadata={"step": str(step)})
    pathlib.Path(str(path) + ".tmp").replace(path)


def restore(path, method, optimizer):
    """Load what save_state wrote. -> the step to go on from; 0 when there is no checkpoint yet."""
    if path is None or not pathlib.Path(path).exists():
        return 0
    state = load_file(path)
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    if any(name not in state or state[name].shape != t.shape for name, t in method.tensors().items()):
        raise UserError("--resume: the checkpoint in --out belongs to other settings; use the same flags or a new --out")
    put_back(method, state)
    for name, tensor in method.tensors().items():
        optimizer.state[tensor] = {"step": torch.tensor(float(step)),
                                   **{moment: state[f"{moment}.{name}"].to(tensor.device) for moment in ("exp_avg", "exp_avg_sq")}}
    return step


# --- 3. Adapters on disk ----------------------------------------------------------------------------------------------------

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


# --- 4. The command ---------------------------------------------------------------------------------------------------------

def lengths_flag(text):
    """'16,32,64' -> [16, 32, 64], for argparse."""
    return [int(part) for part in text.split(",")]


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for anything that cannot work."""
    parser = loading.Parser(__doc__.splitlines()[0])
    loading.common_flags(parser)
    compress.add_compression_flags(parser)
    parser.add_argument("--method", default="idp", choices=sorted(METHODS), help="how to recover")
    parser.add_argument("--prompt-length", type=int, default=16, help="n, tokens of the prompt or prefix")
    parser.add_argument("--prompt-lengths", type=lengths_flag, default=[8, 8, 16, 16], help="idp: n_k of each prompt, comma-separated")
    parser.add_argument("--selector", default="mean_attention", choices=sorted(set(SELECTORS) - {"oracle"}), help="idp: how to choose")
    parser.add_argument("--init-text", default=None, help="start prompts from this text instead of random vocabulary rows")
    parser.add_argument("--rank", type=int, default=8, help="lora: r")
    parser.add_argument("--alpha", type=float, default=16, help="lora: scaling is alpha / r")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=None, help="lora: names of linear layers, comma-separated")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step, shared out among IDP's prompts")
    parser.add_argument("--train-seqlen", type=int, default=64, help="tokens per training row")
    parser.add_argument("--eval-seqlen", type=int, default=None, help="tokens per perplexity chunk; --train-seqlen when absent")
    parser.add_argument("--eval-text", default=None, help="text for perplexity; the test split of a named --text when absent")
    parser.add_argument("--lr", type=float, default=None, help=f"peak learning rate; per method when absent: {LEARNING_RATES}")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass (less memory)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args(argv)
    toy = args.model == "toy"
    args.text = args.text or ("toy" if toy else "wikitext2")
    args.tasks = args.tasks if args.tasks is not None else (loading.TOY_TASKS if toy else "")
    args.eval_text = args.eval_text or args.text
    args.lr = args.lr or LEARNING_RATES[args.method]
    args.eval_seqlen = args.eval_seqlen or args.train_seqlen
    return check(args)


def check(args):
    """Refuse impossible numbers before any model loads. -> args."""
    positive = ["prompt_length", "rank", "steps", "batch_size", "accumulate", "train_seqlen", "eval_seqlen", "alpha", "lr"]
    for name in positive:
        if getattr(args, name) < (2 if "seqlen" in name else 1 if name not in ("alpha", "lr") else 1e-12):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: too small; use a larger number")
    if not args.prompt_lengths or min(args.prompt_lengths) < 1:
        raise UserError("--prompt-lengths: every prompt needs at least one token; use for example 8,8,16,16")
    if args.resume and not args.out:
        raise UserError("--resume: needs --out DIR of the run to go on with")
    if args.checkpointing and args.method == "prefix":
        raise UserError("--checkpointing: prefix trains through the cache, which recomputing would fill twice; "
                        "use --accumulate to save memory")
    m = len(args.prompt_lengths) if args.method == "idp" else 1
    check_training(range(args.train_seqlen + 1), args.batch_size, args.train_seqlen, args.accumulate, m)
    args.compression = compress.settings_from(args)        # raises UserError
    if args.out:
        loading.check_out(args.out, "results.json") if not args.resume else None
    return args


def main(argv=None):
    """Dense, compressed, recovered: one table."""
    args = parse(argv)
    device, start = loading.pick_device(args.device), time.time()
    torch.manual_seed(args.seed)
    tasks = loading.load_tasks(args.tasks, args.limit)
    model, tokenizer = loading.load_model(args.model, device, args.dtype)
    train_ids = loading.load_text(args.text, tokenizer, "train")
    eval_ids = loading.load_text(args.eval_text, tokenizer, "test")
    check_training(train_ids, args.batch_size, args.train_seqlen, 1, 1)
    rows = []

    def measure(name, method=None, **extra):
        with method.inference() if method else contextlib.nullcontext():
            scores = evaluate.evaluate_model(model, tokenizer, eval_ids, tasks, seqlen=args.eval_seqlen, limit=args.limit)
        sizes = [t.numel() for t in method.tensors().values()] if method else []
        rows.append({"row": name, **scores, "trainable_params": sum(sizes), "extra_bytes": 4 * sum(sizes), **extra})
        print(f"{name}: done after {time.time() - start:.0f} s", file=sys.stderr)

    ready = pathlib.Path(args.model, "compression.json")   # a folder that compress.py wrote is compressed already
    if ready.exists():
        report = json.loads(ready.read_text())
    else:
        measure("dense", weight_bytes=evaluate.weight_bytes(model))
        name, settings = args.compression
        ids = compress.calibration_ids(train_ids, args.nsamples, args.seqlen, args.seed)
        report = compress.compress_model(model, tokenizer, name, ids, **settings)
        print(compress.summary(report), file=sys.stderr)
    measure("compressed", weight_bytes=report["weight_bytes"])

    build, settings = METHODS[args.method]
    text = tokenizer(args.init_text, return_tensors="pt", add_special_tokens=False).input_ids[0] if args.init_text else None
    method = build(model, **settings(args, text), seed=args.seed)
    state = pathlib.Path(args.out, "checkpoint.safetensors") if args.out else None
    training = train(method, train_ids, args.steps, args.batch_size, args.train_seqlen, args.lr, args.seed, args.accumulate,
                     args.checkpointing, state, resume=args.resume)
    measure(args.method, method, weight_bytes=report["weight_bytes"], training=training)
    print(evaluate.format_table(rows))
    if args.out:
        with loading.whole_folder(pathlib.Path(args.out) / "adapter") as folder:
            method.save(folder)
        evaluate.write_results(args.out, command="python " + shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
                               settings={k: v for k, v in vars(args).items()}, device=device, seconds=time.time() - start, rows=rows)


if __name__ == "__main__":
    loading.run(main)
