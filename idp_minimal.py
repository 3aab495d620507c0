"""IDP, inference-time dynamic prompting: the whole method in one file.

Paper: "Do Compressed LLMs Forget Knowledge? An Experimental Study with Practical Implications", arXiv
2310.00867. A compressed language model may have *displaced* its knowledge rather than forgotten it; a soft
prompt can redirect it. IDP keeps m soft prompts, learnt separately, and lets each input choose one at
inference: the prompt to which its own first-layer attention is largest on average. The choice is made inside
the attention forward pass, so it costs no extra pass: every layer afterwards sees the chosen prompt only.

    python idp_minimal.py            # demo: tiny random model, CPU, seconds; fused pass against the slow reference

    bank = PromptBank.from_prompts(model, [P_0, P_1, P_2])            # P_k: (n_k, d) embeddings
    with attach_idp(model, bank) as idp:
        logits = model(input_ids, attention_mask=mask).logits         # (B, T, V): prompts add no rows
        idp.choice                                                    # (B,) the prompt that each sequence chose
        model.generate(input_ids, attention_mask=mask, max_new_tokens=20)

Letters: B batch, T input tokens, m prompts, n_k tokens of prompt k, N = max n_k, S = sum n_k, h heads, h_kv
key heads, d width, d_k head width, L layers. A is an attention matrix after its softmax.

The paper's text was not at hand when this was written, so steps are tagged by topic, [IDP: prompts] [IDP:
bank] [IDP: score] [IDP: choice] [IDP: fusion], and what its public abstract leaves open is marked NOT IN
PAPER with our reason. DEVIATES: nothing known.
"""
import contextlib
import inspect
import uuid
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the cache, as argument and as output; older releases do not know the new name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# --- 1. Soft prompts and their bank of keys and values [IDP: prompts] [IDP: bank] ---------------------------
# A soft prompt P_k is n_k vectors that take the place of token embeddings. Under a causal mask its keys and
# values depend on nothing that follows, so each prompt runs through the model once, ever, and only its keys
# and values are kept.

@dataclass
class PromptBank:
    """Keys and values of m prompts in every layer.

    keys, values: L tensors (m, h_kv, N, d_k); a prompt shorter than N is padded with zeros on the left.
    lengths: the m numbers n_k.
    """
    keys: list
    values: list
    lengths: list

    def __post_init__(self):
        device = self.keys[0].device
        self.m, self.N = len(self.lengths), max(self.lengths)
        lengths = torch.tensor(self.lengths, device=device)
        # valid: (m, N) True where a column holds a prompt token; tokens: (S,) where those stand when (m, N)
        # is flat; owner: (S,) the prompt of each. All three are made once, and owner stays on the CPU, so
        # that no pass reads them back; mark: by this a cache, or a copy of one, knows the bank that filled
        # it.
        self.valid = torch.arange(self.N, device=device) >= self.N - lengths[:, None]
        self.tokens = self.valid.flatten().nonzero()[:, 0]
        self.owner = torch.arange(self.m).repeat_interleave(lengths.cpu())
        self.mark, self.uneven = uuid.uuid4().hex, len(set(self.lengths)) > 1

    @classmethod
    @torch.no_grad()
    def from_prompts(cls, model, prompts):
        """Run each prompt alone, once, and keep what it leaves in the cache. prompts: m tensors (n_k, d).

        d is the width of the model's token embeddings, which in OPT-350m is narrower than its hidden size.
        Raises ValueError when there is no prompt, or one has the wrong shape or a number that is not finite.
        """
        embedding = model.get_input_embeddings().weight
        if not prompts or any(P.dim() != 2 or len(P) < 1 or P.shape[1] != embedding.shape[1] for P in prompts):
            raise ValueError(f"prompts must be one or more tensors (n_k >= 1, {embedding.shape[1]}), "
                             f"got {[tuple(P.shape) for P in prompts]}")
        if not all(P.to(embedding).isfinite().all() for P in prompts):
            raise ValueError(f"prompts must be finite numbers in the model's {embedding.dtype}")
        N = max(len(P) for P in prompts)
        layers = [prompt_cache(model, P, N) for P in prompts]                                 # m x L x (k, v)
        pad = lambda x: F.pad(x[0], (0, 0, N - x.shape[2], 0))                                # (h_kv, N, d_k)
        keys = [torch.stack([pad(k) for k, _ in layer]) for layer in zip(*layers)]     # L x (m, h_kv, N, d_k)
        values = [torch.stack([pad(v) for _, v in layer]) for layer in zip(*layers)]
        return cls(keys, values, [len(P) for P in prompts])


def prompt_cache(model, P, N):
    """Keys and values of one prompt run alone. P: (n, d) -> L pairs of (1, h_kv, n, d_k).

    NOT IN PAPER: prompts are right-aligned, at positions N-n .. N-1, so that the input always starts at N.
    With relative positions (RoPE) this is exactly the prompt alone; a learned position table (OPT, GPT-2)
    must be trained there too.
    """
    weight, cache = model.get_input_embeddings().weight, DynamicCache()
    positions = torch.arange(N - len(P), N, device=weight.device)[None]                        # (1, n)
    model(inputs_embeds=P[None].to(weight), position_ids=positions, attention_mask=torch.ones_like(positions),
          use_cache=True, **{CACHE: cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- 2. Score [IDP: score] ----------------------------------------------------------------------------------
# A selector maps the first layer's attention to prompt tokens onto one score per prompt; the largest wins.
# All have one signature:  A (B, h, T, S), real (B, T) bool, owner (S,) -> (B, m).
# EXERCISE: add a rule. One function, one line in SELECTORS; the tests of the law pick it up.

def attention_to_prompts(module, query, key, K_prompts, mask, scaling):
    """A over every prompt token, as if all prompts and the causal input shared one softmax.

    query (B, h, T, d_k), key (B, h_kv, T, d_k), K_prompts (h_kv, S, d_k), mask (B, 1, T, T) bool -> (B, h, T,
    S) float32.
    """
    B, h, T, _ = query.shape
    K_p = K_prompts.expand(B, -1, -1, -1)                                                  # (B, h_kv, S, d_k)
    S = K_p.shape[2]
    # How much of each query's attention falls on prompts at all: attention whose values are 1 on prompt
    # tokens and 0 on the input. The fused kernel computes the softmax over all S + T columns without ever
    # holding (T, S + T).
    K_all = torch.cat([K_p, key], dim=2)                                                 # (B, h_kv, S+T, d_k)
    on_prompts = torch.cat([torch.ones_like(K_p), torch.zeros_like(key)], dim=2)
    all_mask = torch.cat([mask.new_ones(B, 1, T, S), mask], dim=3)                            # (B, 1, T, S+T)
    mass = sdpa_attention_forward(module, query, K_all, on_prompts, all_mask, scaling=scaling)[0][..., 0]  # (B, T, h)
    # A_tj = mass_t * softmax over prompt tokens only: the two factors of one softmax over everything.
    K_p = K_p.repeat_interleave(h // K_p.shape[1], dim=1)                                     # (B, h, S, d_k)
    logits = (query @ K_p.transpose(2, 3)).float() * scaling                                   # (B, h, T, S)
    return mass.transpose(1, 2)[..., None].float() * logits.softmax(-1)


def per_prompt_mean(a, owner):
    """Mean over the tokens of each prompt. a: (B, S) -> (B, m)."""
    member = F.one_hot(owner).to(a, non_blocking=True)     # (S, m); a GPU need not be waited for
    return a @ member / member.sum(0)


def mean_attention(A, real, owner):
    """The paper's rule. s_k = mean of A over heads, input tokens and the n_k tokens of prompt k.

    NOT IN PAPER: heads of the first layer, whose queries no prompt has influenced yet; real tokens only, so
    that padding cannot change the choice; one softmax over all prompts and the causal input, so that scores
    compare.
    """
    a = (A.mean(1) * real[..., None]).sum(1) / real.sum(1, keepdim=True)                       # (B, S)
    return per_prompt_mean(a, owner)


def total_attention(A, real, owner):
    """s_k = n_k times the mean: the sum over the prompt's tokens, which favours long prompts."""
    return mean_attention(A, real, owner) * torch.bincount(owner).to(A.device, non_blocking=True)


def max_attention(A, real, owner):
    """s_k = max of A over heads, real input tokens and the tokens of prompt k."""
    a = (A * real[:, None, :, None]).amax((1, 2))                                              # (B, S)
    return torch.stack([part.amax(1) for part in a.split(torch.bincount(owner).tolist(), dim=1)], dim=1)


def last_token(A, real, owner):
    """s_k = mean of A over heads and prompt tokens, for the last real input token alone."""
    T = real.shape[1]
    last = T - 1 - real.flip(1).long().argmax(1)                                               # (B,)
    a = A.mean(1)[torch.arange(len(A), device=A.device), last]                                 # (B, S)
    return per_prompt_mean(a, owner)


def random_choice(A, real, owner, generator=None):
    """Control: a random prompt for each sequence."""
    return torch.rand(len(A), int(owner[-1]) + 1, generator=generator).to(A, non_blocking=True)


def fixed_choice(A, real, owner, k=0):
    """Control: prompt k for every sequence, a single soft prompt."""
    return F.one_hot(torch.full((len(A),), k, device=A.device), int(owner[-1]) + 1).to(A)


def oracle_choice(A, real, owner, loss=None):
    """Upper bound, for analysis: the lowest loss on the answer itself. loss: (B, m), see
    choosing.py:prompt_losses.
    """
    return -loss.to(A)


SELECTORS = {"mean_attention": mean_attention, "total_attention": total_attention, "max_attention": max_attention,
             "last_token": last_token, "random": random_choice, "fixed": fixed_choice, "oracle": oracle_choice}


# --- 3. Choice, fused into the attention forward pass [IDP: choice] [IDP: fusion] ---------------------------

# What models hand on and attention may leave aside. IDP.check sees to a sliding window.
UNDERSTOOD = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "num_items_in_batch",
              "sliding_window"}


def idp_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, idp=None, **kwargs):
    """One attention layer with IDP inside. transformers calls it in place of its own, after positions and
    cache update.

    query (B, h, T, d_k); key, value (B, h_kv, N + past + T, d_k), whose first N columns are empty at prefill.
    Returns (out (B, T, h, d_k), A or None).
    """
    if idp is None:
        raise RuntimeError("under attach_idp, call the model that was attached, not one of its submodules")
    unknown = [name for name in kwargs.keys() - UNDERSTOOD if kwargs[name] is not None]
    if unknown:                                            # such as s_aux of GPT-OSS, softcap of Gemma 2
        raise ValueError(f"attach_idp does not know what {unknown} asks of the attention of this model")
    if idp.prefill:
        bank, N = idp.idp.bank, idp.idp.bank.N
        if idp.choice is None:                          # the first layer: score, choose once, narrow the mask
            choose_prompt(idp, module, query, key[:, :, N:], scaling)
        # `key` and `value` are the cache's own tensors: writing here leaves the chosen prompt in the cache
        # and no loser.
        key[:, :, :N] = bank.keys[module.layer_idx][idp.choice]                            # (B, h_kv, N, d_k)
        value[:, :, :N] = bank.values[module.layer_idx][idp.choice]
    attend = sdpa_attention_forward if idp.idp.attention == "sdpa" else eager_attention
    return attend(module, query, key, value, idp.mask, scaling=scaling, dropout=dropout)


def choose_prompt(call, module, query, key, scaling):
    """Score every prompt by the first layer's attention and keep the best: one choice per sequence, made
    once.

    query (B, h, T, d_k), key (B, h_kv, T, d_k): the input alone. Sets call.choice (B,), idp.scores,
    idp.choice. Within generate only the n tokens of its input count, and the r rows (beams) that repeat an
    input share its choice.
    """
    idp, bank = call.idp, call.idp.bank
    asked = idp.asked or SimpleNamespace(rows=len(query), tokens=query.shape[2], choice=None)
    n, r = asked.tokens, len(query) // asked.rows
    if asked.choice is None:                               # else a later pass of generate(use_cache=False)
        K_prompts = bank.keys[module.layer_idx].transpose(1, 2).flatten(0, 1)[bank.tokens].transpose(0, 1)  # (h_kv, S, d_k)
        mask = call.mask[::r, :, :n, bank.N:bank.N + n]                                       # (B/r, 1, n, n)
        A = attention_to_prompts(module, query[::r, :, :n], key[::r, :, :n], K_prompts, mask, scaling)  # (B/r, h, n, S)
        idp.scores = idp.rule(A, call.real[::r, :n], bank.owner, **idp.options)                # (B/r, m)
        # choice = argmax_k s_k; NOT IN PAPER: a tie goes to the lowest k, so that runs repeat
        idp.choice = asked.choice = idp.scores.argmax(1)                                       # (B/r,)
    call.choice = asked.choice.repeat_interleave(r)                                            # (B,)
    call.mask[..., :bank.N] = bank.valid[call.choice][:, None, None]           # hide a short prompt's padding


def eager_attention(module, query, key, value, mask, scaling, dropout=0.0):
    """The same attention in plain PyTorch, to read or to look inside. Returns (out (B, T, h, d_k), A (B, h,
    T, .)).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)         # (B, h, ., d_k)
    logits = (query @ key.transpose(2, 3)).float() * scaling                                   # (B, h, T, .)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    A = F.dropout(logits.softmax(-1).to(query.dtype), dropout, module.training)
    return (A @ value).transpose(1, 2).contiguous(), A


AttentionInterface.register("idp", idp_attention)   # no mask function of that name: the mask is ours, in Call


# --- 4. Into a Hugging Face model ---------------------------------------------------------------------------

class PromptCache(DynamicCache):
    """A cache whose length leaves out its first N columns: the prompt that each row chose.

    choice (B,) lies in the first layer, so that copies of the layers have it, and goes wherever the rows go.
    """

    def get_seq_length(self, layer_idx=0):
        return max(super().get_seq_length(layer_idx) - self.N, 0)

    def get_mask_sizes(self, *args, **kwargs):             # asked by a model that makes its own mask
        raise ValueError("this cache holds a prompt that the plain model does not count: go on under attach_idp")

    def crop(self, tokens_to_remove):
        if not -self.get_seq_length() < tokens_to_remove <= 0:
            raise ValueError(f"crop takes -n, to remove n of {self.get_seq_length()} tokens, but not all of them")
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.layers[0].choice = self.layers[0].choice[indices]

    def batch_repeat_interleave(self, repeats):
        rows = torch.arange(len(self.layers[0].choice), device=self.layers[0].choice.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def reset(self):
        self.__init__()                                    # older releases would keep columns of zeros


# Settings of generate and what they may be: other values keep the cache elsewhere or call the model in other
# ways.
GENERATE = {"cache_implementation": (None, "dynamic"), "guidance_scale": (None, 1), "token_healing": (None, False),
            "custom_generate": (None,), "trust_remote_code": (None, False)}


class IDP:
    """What `with attach_idp(...) as idp` gives: idp.choice (B,) and idp.scores (B, m) of the last choice
    made.
    """

    def __init__(self, bank, selector, attention, options):
        self.bank, self.rule, self.attention, self.options = bank, selector, attention, options
        self.choice = self.scores = self.asked = None

    def before_forward(self, model, args, kwargs):
        """Forward pre-hook: make room for N prompt columns in cache, mask and positions. Prompts add no
        rows.
        """
        kwargs, bank, device = by_name(model.forward, args, kwargs), self.bank, self.bank.valid.device
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]             # callers may use either name
        cache = next((c for c in caches if c is not None), None)
        cache = DynamicCache() if cache is None else cache
        mask = None if self.asked and self.asked.full else kwargs.get("attention_mask")
        B, T = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None).shape[:2]
        # call: what the attention layers of this pass share. prefill: choose, and put the chosen prompt in
        # the cache; mask (B, 1, T, N + past + T) bool, None when nothing is hidden; real (B, T) bool: queries
        # that are tokens.
        prefill = DynamicCache.get_seq_length(cache) == 0
        call = SimpleNamespace(idp=self, prefill=prefill, mask=None, real=None, choice=None)
        past = 0 if prefill else cache.get_seq_length()                             # real tokens before these
        if prefill and self.asked and self.asked.choice is not None and kwargs.get("use_cache") is not False:
            raise ValueError("a second input within one generate: the first has chosen, and this one could not")
        self.check(model, cache, prefill, B, past, T, mask)
        if prefill:
            reserve_columns(cache, bank, B)
        positions = kwargs.get("position_ids")             # the real tokens' own, from 0
        if positions is None and mask is None:
            positions = torch.arange(past, past + T, device=device)[None]                      # (1, T)
        elif positions is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]                     # (B, T)
        # A GPU is not asked whether a mask hides anything: the answer would cost a wait at every token.
        hides = bank.uneven or mask is not None and (mask.is_cuda or not bool(mask.all()))
        if hides or T > 1 or prefill:                 # else one token that sees everything, without a mask
            real = torch.ones(B, past + T, dtype=torch.bool, device=device) if mask is None else mask.bool()
            prompt = real.new_ones(B, bank.N) if prefill else bank.valid[cache.layers[0].choice]
            call.mask, call.real = visible(real, past, prompt), real[:, past:]
        # idp_attention reads call.mask; the model must only get some 4-D mask, or GPT-2 searches each input
        # for padding.
        kwargs.update({CACHE: cache}, attention_mask=bank.valid[None, None], position_ids=positions + bank.N, idp=call)
        return (), kwargs

    def after_forward(self, model, args, kwargs, output):
        """Forward hook: note the choice. Who wanted no cache gets none, or generate(use_cache=False) would
        go on from it.
        """
        if kwargs["idp"].prefill:
            kwargs[CACHE].layers[0].choice = kwargs["idp"].choice
        if kwargs.get("use_cache") is False and CACHE in output:
            return type(output)(**{name: value for name, value in output.items() if name != CACHE})

    def check(self, model, cache, prefill, B, past, T, mask):
        """Refuse what would lose the prompt or choose by a part of the input, and what has no room."""
        if type(cache) not in (DynamicCache, PromptCache) or cache.offloading:
            raise ValueError(f"attach_idp needs a DynamicCache that is not offloaded, got {type(cache).__name__}")
        if not prefill and (getattr(cache, "mark", None) != self.bank.mark or len(cache.layers[0].choice) != B):
            raise ValueError("the cache was filled without this prompt bank, not to the end, or not for "
                             f"{B} rows: prefill under the same attach_idp")
        if prefill and self.asked and T < self.asked.tokens:
            raise ValueError(f"prefill_chunk_size: {T} of {self.asked.tokens} input tokens cannot choose for all")
        if mask is not None and mask.shape != (B, past + T):
            raise ValueError(f"attention_mask must be (B, past + T) = {(B, past + T)} over real tokens, without the "
                             f"prompt's columns; got {tuple(mask.shape)}")
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError("gradient checkpointing drops the cache that holds the prompt: switch one of the two off")
        limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        if any(limit and self.bank.N + past + T > limit for limit in limits):
            raise ValueError(f"{self.bank.N} prompt tokens + {past + T} input tokens exceed the model's limit of "
                             f"{min(filter(None, limits))} positions: shorten the input or the prompts")

    def generate(self, model, plain, args, kwargs):
        """model.generate within the block: refuse what cannot be right, note the input, then go on as
        always.
        """
        kwargs = by_name(plain, args, kwargs)
        sources = [vars(config) for config in (model.generation_config, kwargs.get("generation_config")) if config]
        settings = {name: value for source in (*sources, kwargs) for name, value in source.items() if value is not None}
        for name, known in GENERATE.items():
            if settings.get(name) not in known:
                raise ValueError(f"attach_idp cannot be right with generate({name}={settings[name]!r}): leave it out")
        if settings.get("use_cache") is False and settings.keys() & {"cache", "past_key_values"}:
            raise ValueError("generate(use_cache=False) reads every token at each step: give it no cache")
        inputs = [settings[name] for name in ("inputs_embeds", "inputs", "input_ids") if name in settings]
        (rows, tokens), before = inputs[0].shape[:2] if inputs else (1, 1), self.asked   # (1, 1): a BOS token
        full = "attention_mask" in settings and bool(settings["attention_mask"].all())         # later it grows by ones
        self.asked = SimpleNamespace(rows=rows, tokens=tokens, full=full, choice=None)
        try:
            return plain(**kwargs)
        finally:
            self.asked = before                            # not None where a model assists itself


def by_name(function, args, kwargs):
    """All arguments by name, as the function itself would bind those given by position."""
    return dict(**inspect.signature(function).bind_partial(*args).arguments, **kwargs) if args else kwargs


def reserve_columns(cache, bank, B):
    """Fill an empty cache with N columns per layer that the attention layers will overwrite with the chosen
    prompt.
    """
    for layer, (k, v) in enumerate(zip(bank.keys, bank.values)):
        cache.update(k.new_zeros(B, *k.shape[1:]), v.new_zeros(B, *v.shape[1:]), layer)    # (B, h_kv, N, d_k)
    cache.__class__ = PromptCache                          # in place: the caller may hold this very cache
    cache.mark, cache.N, cache.layers[0].choice = bank.mark, bank.N, ()            # (): no row has chosen yet


def visible(real, past, prompt):
    """Prompt columns as given, then real tokens up to oneself. (B, past + T), (B, N) -> (B, 1, T, N + past +
    T).
    """
    B, total = real.shape
    T = total - past
    causal = torch.ones(T, total, dtype=torch.bool, device=real.device).tril(past)             # (T, past + T)
    tokens = causal[None, None] & real[:, None, None]                                    # (B, 1, T, past + T)
    return torch.cat([prompt[:, None, None].expand(B, 1, T, -1), tokens], dim=3)


@contextlib.contextmanager
def attach_idp(model, bank, selector="mean_attention", attention="sdpa", **options):
    """Within the block, model(...) and model.generate(...) choose and use a prompt from the bank.

    selector: a key of SELECTORS, or a function with their signature; options go to it (fixed: k=; random:
    generator=; oracle: loss=).
    attention: "sdpa" (fast) or "eager" (plain, returns A when output_attentions=True). Gradients flow to
    inputs and weights, and to a bank whose tensors require them; gradient checkpointing is refused.
    A prompt is chosen once per sequence, by the whole input of the first pass or of generate. Within the
    block:
    right    model(...) with or without a cache; going on with the cache that a pass or generate returned, its copies,
             after crop, with rows repeated or selected; an empty DynamicCache of one's own; generate: greedy,
             sampling, beams, use_cache=False, prompt_lookup_num_tokens, assistant_model
    refused  other caches (static, quantized, offloaded, filled elsewhere); prefill_chunk_size that splits the
             input; guidance_scale, token_healing, custom_generate; going on outside the block
    Raises ValueError for these, an unknown selector or a model whose attention cannot be replaced.
    """
    selector = SELECTORS.get(selector, selector)
    if not callable(selector) or attention not in ("sdpa", "eager"):
        raise ValueError(f"selector {selector!r} must be one of {sorted(SELECTORS)}, attention {attention!r} sdpa or eager")
    before, plain, own = model.config._attn_implementation, getattr(model, "generate", None), "generate" in vars(model)
    if before == "idp":
        raise ValueError("this model is under attach_idp already")
    idp = IDP(bank, selector, attention, options)
    model.set_attn_implementation("idp")
    if model.config._attn_implementation != "idp":         # unsupported classes only warn
        raise ValueError(f"the attention of {type(model).__name__} cannot be replaced")
    hooks = [model.register_forward_pre_hook(idp.before_forward, with_kwargs=True),
             model.register_forward_hook(idp.after_forward, with_kwargs=True)]
    model.generate = lambda *args, **kwargs: idp.generate(model, plain, args, kwargs)
    try:
        yield idp
    finally:
        del model.generate
        if own:
            model.generate = plain
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


# --- 5. The slow, obvious version: choose first, then run only that prompt ----------------------------------

@torch.no_grad()
def idp_reference(model, prompts, input_ids, attention_mask=None):
    """What the fused pass must equal. One sequence at a time, without padding, bank, hook or own attention
    function.

    prompts: m tensors (n_k, d); input_ids, attention_mask: (B, T). Returns logits (B, T, V), zero at padding,
    and choice (B,).
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embed, N, rows, choice = model.get_input_embeddings(), max(map(len, prompts)), [], []
    for ids, real in zip(input_ids, mask.bool()):
        k = reference_choice(model, prompts, ids[real][None])
        E = torch.cat([prompts[k].to(embed.weight), embed(ids[real])])[None]               # (1, n_k + T_b, d)
        positions = torch.arange(N - len(prompts[k]), N + int(real.sum()), device=ids.device)[None]
        out = model(inputs_embeds=E, position_ids=positions, attention_mask=torch.ones_like(positions)).logits[0]
        rows.append(out.new_zeros(len(ids), out.shape[-1]))                                    # (T, V)
        rows[-1][real] = out[len(prompts[k]):]
        choice.append(k)
    return torch.stack(rows), torch.tensor(choice, device=input_ids.device)


def reference_choice(model, prompts, ids):
    """argmax_k of the mean of the first layer's A, from transformers' own eager attention over all prompts
    at once.
    """
    N, before = max(len(P) for P in prompts), model.config._attn_implementation
    model.set_attn_implementation("eager")
    caches = [prompt_cache(model, P, N) for P in prompts]
    joined = DynamicCache([tuple(torch.cat(pair, dim=2) for pair in zip(*layer)) for layer in zip(*caches)])
    S, T = sum(len(P) for P in prompts), ids.shape[1]
    A = model(ids, **{CACHE: joined}, position_ids=torch.arange(N, N + T, device=ids.device)[None],
              attention_mask=ids.new_ones(1, S + T), output_attentions=True).attentions[0]  # (1, h, T, S + T)
    model.set_attn_implementation(before)
    return max(range(len(prompts)), key=lambda k: A[..., sum(map(len, prompts[:k])):][..., :len(prompts[k])].mean())


# --- 6. Demo ------------------------------------------------------------------------------------------------

def demo():
    """Tiny random LLaMA, three prompts of unequal length, a padded batch: predict, then show."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    prompts = [torch.randn(n, 64) for n in (4, 6, 8)]
    ids, mask = torch.randint(1, 100, (5, 12)), torch.ones(5, 12, dtype=torch.long)
    mask[0, 8:] = mask[1, :4] = 0                          # two shorter sequences, padded right and left
    with attach_idp(model, PromptBank.from_prompts(model, prompts)) as idp:
        logits = model(ids, attention_mask=mask).logits    # (5, 12, 100)
    expected, choice = idp_reference(model, prompts, ids, mask)
    print("mean attention to each prompt, one row per sequence:\n", idp.scores)
    print(f"chosen, fused pass:     {idp.choice.tolist()}\nchosen, slow reference: {choice.tolist()}")
    error = ((logits - expected) * mask[..., None]).abs().max().item()
    print(f"largest difference of logits: {error:.1e}  (the law: below 1e-5)")


if __name__ == "__main__":
    demo()
