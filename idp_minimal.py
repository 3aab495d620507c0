"""IDP, inference-time dynamic prompting: the whole method in one file.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867; tags such as [§3.2] mean its ICLR 2024
submission, "(Dynamic) Prompting might be all you need to repair Compressed LLMs" (OpenReview SyuQKk7sX2).
IDP keeps m soft prompts, learnt apart, and lets each input choose one at inference: the prompt on which the
input's own attention is largest on average. The choice is made inside the attention forward pass, so it
costs no extra pass; what was not chosen is masked away.

    python idp_minimal.py     # demo: tiny random model, CPU, seconds; fused pass against the slow reference
    bank = PromptBank.from_prompts(model, [P_0, P_1, P_2])       # P_k: (n_k, d) embeddings
    with attach_idp(model, bank) as idp:
        logits = model(input_ids, attention_mask=mask).logits    # (B, T, V): prompts add no rows
        idp.choice                                               # (L, B): what each layer chose for each row
        model.generate(input_ids, attention_mask=mask, max_new_tokens=20)

Letters: B batch, T input tokens, m prompts, n_k tokens of prompt k, N = max n_k, S = sum n_k, h heads, h_kv
key heads, d width, d_k head width, L layers. A (B, h, T, S): attention of the input to prompt tokens.

The paper's words allow several readings, each a setting: layers="every", the literal one, chooses in each
layer, "first" once for all; scores="logits" takes A before the softmax, where the paper's -inf stands,
"probabilities" after one over all prompts and the causal input. DEVIATES: nothing known.
"""
import argparse
import contextlib
import inspect
import uuid
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 renamed the cache, as argument and as output; older releases do not know the new name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# --- 1. Soft prompts and their bank of keys and values [§3.2: Z = P_1 .. P_m] -------------------------------
# A soft prompt P_k is n_k vectors that take the place of token embeddings. Prompts do not see one another
# (A_[Z_i : Z_j] = -inf), nor, under a causal mask, what follows: so each runs through the model once, ever,
# and only its keys and values are kept.

class PromptBank:
    """Keys and values of m prompts: L tensors (m, h_kv, N, d_k) each, with zeros left of a short prompt."""

    def __init__(self, keys, values, lengths):
        self.keys, self.values, self.lengths = keys, values, lengths
        self.m, self.N, self.uneven = len(lengths), max(lengths), len(set(lengths)) > 1
        self.mark = uuid.uuid4().hex                       # by this a cache, or a copy of one, knows its bank
        self.owner = torch.arange(self.m).repeat_interleave(torch.tensor(lengths))  # (S,) on the CPU: no wait
        n = torch.tensor(lengths, device=keys[0].device)[:, None]                                  # (m, 1)
        self.valid = torch.arange(self.N, device=n.device) >= self.N - n   # (m, N) True at a prompt's token
        self.tokens = self.valid.flatten().nonzero()[:, 0]   # (S,) where those stand when (m, N) is flat
        self.mean_keys = [k.detach().float().sum(2) / n[..., None] for k in keys]    # L x (m, h_kv, d_k)

    @classmethod
    @torch.no_grad()
    def from_prompts(cls, model, prompts):
        """Run each prompt alone, once, and keep what it leaves in the cache. prompts: m tensors (n_k, d).

        d: width of the token embeddings. Raises ValueError: no prompt, a wrong shape, a number not finite.
        """
        E, shapes = model.get_input_embeddings().weight, [tuple(P.shape) for P in prompts]     # E (V, d)
        if not prompts or any(len(x) != 2 or x[0] < 1 or x[1] != E.shape[1] for x in shapes):
            raise ValueError(f"prompts must be one or more tensors (n_k >= 1, {E.shape[1]}), got {shapes}")
        if not all(P.to(E).isfinite().all() for P in prompts):
            raise ValueError(f"prompts must be finite numbers in the model's {E.dtype}")
        N = max(map(len, prompts))
        layers = [prompt_cache(model, P, N) for P in prompts]                                 # m x L x (k, v)
        pad = lambda x: F.pad(x[0], (0, 0, N - x.shape[2], 0))                                # (h_kv, N, d_k)
        keys = [torch.stack([pad(k) for k, _ in layer]) for layer in zip(*layers)]     # L x (m, h_kv, N, d_k)
        values = [torch.stack([pad(v) for _, v in layer]) for layer in zip(*layers)]
        return cls(keys, values, [len(P) for P in prompts])


def prompt_cache(model, P, N):
    """Keys and values of one prompt run alone. P: (n, d) -> L pairs of (1, h_kv, n, d_k).

    NOT IN PAPER: prompts are right-aligned, at positions N-n .. N-1, so that the input starts at N. With RoPE
    this is exactly the prompt alone; a table of learned positions (OPT, GPT-2) must be trained there too.
    """
    weight, cache = model.get_input_embeddings().weight, DynamicCache()
    positions = torch.arange(N - len(P), N, device=weight.device)[None]                        # (1, n)
    model(inputs_embeds=P[None].to(weight), position_ids=positions, use_cache=True,
          attention_mask=torch.ones_like(positions), **{CACHE: cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- 2. Score [§3.2: mean attention] ------------------------------------------------------------------------
# A selector maps a layer's attention to prompt tokens onto one score per prompt; the largest wins. All have
# one signature:  A (B, h, T, S), real (B, T) bool, owner (S,) -> (B, m).

def prompt_logits(query, K_p, scaling):
    """A before the softmax. query (B, h, T, d_k), K_p (B or 1, h_kv, S, d_k) -> (B, h, T, S)."""
    K_p = K_p.repeat_interleave(query.shape[1] // K_p.shape[1], dim=1)                        # (B, h, S, d_k)
    # A_tj = q_t . k_j / sqrt(d_k)
    return (query @ K_p.transpose(2, 3)).float() * scaling


def prompt_probabilities(query, key, K_p, mask, scaling):
    """A after one softmax over all prompts and the causal input. mask (B, 1, T, T) bool."""
    own = prompt_logits(query, key, scaling).masked_fill(~mask, -torch.inf)                    # (B, h, T, T)
    logits = torch.cat([prompt_logits(query, K_p, scaling), own], dim=3)                     # (B, h, T, S+T)
    return logits.softmax(-1)[..., :K_p.shape[2]]


def mean_attention(A, real, owner):
    """The paper's rule: s_k = mean of A_[Z_k : X], over heads, input tokens and tokens of prompt k."""
    # NOT IN PAPER: real tokens only, so that padding cannot change the choice
    a = (A.mean(1) * real[..., None]).sum(1) / real.sum(1, keepdim=True)                       # (B, S)
    member = F.one_hot(owner).to(a, non_blocking=True)     # (S, m); a GPU need not be waited for
    return a @ member / member.sum(0)                                                          # (B, m)


def mean_logits(query, real, mean_keys, scaling):
    """mean_attention under scores="logits", exactly, without A: the mean of products is a product of means.

    query (B, h, T, d_k); real (B, T) bool, None where all are; mean_keys (m, h_kv, d_k) -> (B, m) float32.
    """
    # s_k = mean over h, t, j in P_k of q_t . k_j / sqrt(d_k) = mean over h of (mean_t q_t) . (mean_j k_j) ...
    if real is None:
        mean_q = query.mean(2, dtype=torch.float32)                                            # (B, h, d_k)
    else:
        weight = real / real.sum(1, keepdim=True)                                              # (B, T)
        mean_q = (weight[:, None, None] @ query.float())[:, :, 0]                              # (B, h, d_k)
    mean_q = mean_q.unflatten(1, (mean_keys.shape[1], -1)).mean(2)                          # (B, h_kv, d_k)
    return mean_q.flatten(1) @ mean_keys.flatten(1).T * (scaling / mean_keys.shape[1])


SELECTORS = {"mean_attention": mean_attention}             # methods/selectors.py adds others, and controls


# --- 3. Choice, fused into the attention forward pass [§3.2: argmax; mask] [Fig. 4] -------------------------
# What models hand on and attention may leave aside (IDP.check sees to a sliding window); the rest is refused.
UNDERSTOOD = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "num_items_in_batch",
              "sliding_window"}


def idp_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, idp=None, **kwargs):
    """One attention layer with IDP inside; transformers calls it after positions and cache update.

    query (B, h, T, d_k); key, value (B, h_kv, N + past + T, d_k), whose first N columns are empty at prefill.
    idp: the pass, as IDP.before_forward made it. Returns (out (B, T, h, d_k), A or None).
    """
    if idp is None:
        raise RuntimeError("under attach_idp, call the model that was attached, not one of its submodules")
    unknown = [name for name in kwargs.keys() - UNDERSTOOD if kwargs[name] is not None]
    if unknown:                                            # such as s_aux of GPT-OSS, softcap of Gemma 2
        raise ValueError(f"attach_idp does not know what {unknown} asks of the attention of this model")
    bank, i, layer = idp.of.bank, module.layer_idx, idp.cache.layers[module.layer_idx]
    if idp.prefill:
        layer.choice = choose_prompt(idp, i, query, key[:, :, bank.N:], scaling)               # (B,)
        # `key` and `value` are the cache's own tensors: writing here leaves the winner in it, and no loser.
        key[:, :, :bank.N] = bank.keys[i][layer.choice]                                    # (B, h_kv, N, d_k)
        value[:, :, :bank.N] = bank.values[i][layer.choice]
    if bank.uneven:                                        # hide the padding of a short prompt
        idp.mask[..., :bank.N] = bank.valid[layer.choice][:, None, None]
    return idp.of.attend(module, query, key, value, idp.mask, scaling=scaling, dropout=dropout)


def choose_prompt(call, i, query, key, scaling):
    """Each row's prompt in layer i, argmax_k s_k. query (B, h, T, d_k), key (B, h_kv, T, d_k) -> (B,).

    Within generate only the n tokens of its input count, and the r rows (beams) that repeat an input share
    its choice, which is made once. NOT IN PAPER: a tie goes to the lowest k, so that runs repeat.
    """
    idp, bank, asked = call.of, call.of.bank, call.asked
    where, n, r = i if idp.layers == "every" else 0, asked.tokens, len(query) // asked.rows
    if where not in asked.made:
        q, real = query[::r, :, :n], call.real[::r, :n]                           # (B/r, h, n, d_k), (B/r, n)
        if idp.rule is mean_attention and idp.reading == "logits":
            scores = mean_logits(q, real if call.hides else None, bank.mean_keys[i], scaling)  # (B/r, m)
        else:
            K_p = bank.keys[i].transpose(0, 1).flatten(1, 2)[None, :, bank.tokens]         # (1, h_kv, S, d_k)
            mask = call.mask[::r, :, :n, bank.N:bank.N + n]                                   # (B/r, 1, n, n)
            A = (prompt_logits(q, K_p, scaling) if idp.reading == "logits" else
                 prompt_probabilities(q, key[::r, :, :n], K_p, mask, scaling))                # (B/r, h, n, S)
            scores = idp.rule(A, real, bank.owner, **idp.options)                              # (B/r, m)
        asked.made[where] = scores.argmax(1), scores
    return asked.made[where][0].repeat_interleave(r)


# --- 4. Into a Hugging Face model ---------------------------------------------------------------------------

class PromptCache(DynamicCache):
    """A cache whose length leaves out its first N columns, the prompt of each row: layer.choice (B,)."""

    @staticmethod
    def reserve(cache, bank, B):
        """Make an empty cache, the caller's, one of these: (B, h_kv, N, d_k) a layer, with nothing chosen."""
        for layer, (k, v) in enumerate(zip(bank.keys, bank.values)):
            cache.update(k.new_zeros(B, *k.shape[1:]), v.new_zeros(B, *v.shape[1:]), layer)
            cache.layers[layer].choice = ()
        cache.__class__, cache.mark, cache.N = PromptCache, bank.mark, bank.N

    def get_seq_length(self, layer_idx=0):
        return max(super().get_seq_length(layer_idx) - self.N, 0)

    def get_mask_sizes(self, *args, **kwargs):             # asked by a model that makes its own mask
        raise ValueError("this cache holds a prompt, which the model does not count: go on under attach_idp")

    def crop(self, tokens_to_remove):
        if not -self.get_seq_length() < tokens_to_remove <= 0:
            raise ValueError(f"crop takes -n, to remove n of {self.get_seq_length()} tokens, but not all")
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        for layer in self.layers:
            layer.choice = layer.choice[indices]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats):
        choice = self.layers[0].choice
        self.batch_select_indices(torch.arange(len(choice), device=choice.device).repeat_interleave(repeats))

    def reset(self):
        self.__init__()                                    # older releases would keep columns of zeros


class IDP(SimpleNamespace):
    """What attach_idp gives. Of the last choice made: choice (L, B), scores (L, B, m); "first": without L."""
    asked = choice = scores = None                         # asked: the input of the generate that is running

    def before_forward(self, model, args, kwargs):
        """Forward pre-hook: make room for N prompt columns in cache, mask and positions."""
        kwargs, bank, device = by_name(model.forward, args, kwargs), self.bank, self.bank.valid.device
        caches = [*(kwargs.pop(name, None) for name in ("cache", "past_key_values")), DynamicCache()]
        cache = next(c for c in caches if c is not None)   # callers may use either name
        mask = kwargs.get("attention_mask")
        B, T = next(kwargs[x] for x in ("input_ids", "inputs_embeds") if kwargs.get(x) is not None).shape[:2]
        prefill, past = DynamicCache.get_seq_length(cache) == 0, cache.get_seq_length()   # past: real tokens
        asked = self.asked or SimpleNamespace(rows=B, tokens=T, full=False, made={})
        self.check(model, cache, prefill, B, past, T, mask)
        again = kwargs.get("use_cache") is False           # within generate: each step reads every token
        if self.asked and not prefill and again or prefill and (T < asked.tokens or asked.made and not again):
            raise ValueError("generate chooses once, by its whole input: no chunks, no second input or cache")
        if prefill:
            PromptCache.reserve(cache, bank, B)
        # A GPU is not asked whether a mask hides anything: the answer would cost a wait at every token.
        hides = mask is not None and not asked.full and (mask.is_cuda or not bool(mask.all()))
        real = mask.bool() if hides else torch.ones(B, past + T, dtype=torch.bool, device=device)
        positions = kwargs.get("position_ids")             # the real tokens' own, from 0
        if positions is None:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]                     # (B, T)
        # call: what the layers of this pass share. prefill: choose, put the winners in the cache; real (B, T)
        # bool: tokens; hides: not all of them are; mask (B, 1, T, N + past + T) bool, None: sees everything.
        call = SimpleNamespace(of=self, asked=asked, cache=cache, prefill=prefill, real=real[:, past:],
                               hides=hides, mask=None)
        if hides or bank.uneven or T > 1 or prefill:
            before = real[:, None, None].expand(-1, -1, T, -1).tril(past)                # (B, 1, T, past + T)
            call.mask = F.pad(before, (bank.N, 0), value=True)     # all prompt columns, tokens up to oneself
        # idp_attention reads call.mask; the model gets some 4-D mask, or GPT-2 looks for padding itself.
        kwargs.update({CACHE: cache}, attention_mask=bank.valid[None, None], idp=call,
                      position_ids=positions + bank.N)
        return (), kwargs

    def after_forward(self, model, args, kwargs, output):
        """Forward hook: show the choice; give no cache to who wanted none."""
        if kwargs["idp"].prefill:
            made = [torch.stack(x) for x in zip(*kwargs["idp"].asked.made.values())]
            self.choice, self.scores = made if self.layers == "every" else (x[0] for x in made)
        if kwargs.get("use_cache") is False and CACHE in output:
            return type(output)(**{name: value for name, value in output.items() if name != CACHE})

    def check(self, model, cache, prefill, B, past, T, mask):
        """Refuse what would lose the prompt or choose by a part of the input, and what has no room."""
        if type(cache) not in (DynamicCache, PromptCache) or cache.offloading:
            raise ValueError(f"attach_idp needs a DynamicCache on the device, got {type(cache).__name__}")
        if not (prefill or getattr(cache, "mark", 0) == self.bank.mark and len(cache.layers[-1].choice) == B):
            raise ValueError(f"the cache was not filled by this bank, to the end, for {B} rows; prefill it")
        if mask is not None and mask.shape != (B, past + T):
            raise ValueError(f"attention_mask must be (B, past + T), {(B, past + T)}: {tuple(mask.shape)}")
        if model.training and any(getattr(x, "gradient_checkpointing", False) for x in model.modules()):
            raise ValueError("gradient checkpointing drops the cache that holds the prompt: switch one off")
        limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        if (room := min(filter(None, limits), default=torch.inf)) < self.bank.N + past + T:
            raise ValueError(f"{self.bank.N} prompt tokens and {past + T} of input exceed {room} positions")

    def generate(self, model, plain, args, kwargs):
        """model.generate within the block: note its input, which chooses, and go on."""
        kwargs, before = by_name(plain, args, kwargs), self.asked
        inputs = [kwargs[x] for x in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(x) is not None]
        rows, tokens = inputs[0].shape[:2] if inputs else (1, 1)                       # (1, 1): a BOS token
        full = kwargs.get("attention_mask") is not None and bool(kwargs["attention_mask"].all())
        self.asked = SimpleNamespace(rows=rows, tokens=tokens, full=full, made={})
        try:
            return plain(**kwargs)
        finally:
            self.asked = before                            # not None where a model assists itself


def by_name(function, args, kwargs):
    """All arguments by name, as the function itself would bind those given by position."""
    return dict(**inspect.signature(function).bind_partial(*args).arguments, **kwargs) if args else kwargs


@contextlib.contextmanager
def attach_idp(model, bank, selector="mean_attention", layers="every", scores="logits",
               attend=sdpa_attention_forward, **options):
    """Within the block, model(...) and model.generate(...) choose and use a prompt from the bank.

    selector: a key of SELECTORS, or a function with their signature; options go to it. layers, scores: the
    readings above [§3.2]. attend: the attention kernel. Gradients flow, also to a bank that requires them.
    A choice is made once per sequence, by the whole input of the first pass or of generate; the cache keeps
    it, also copied, cropped, with rows repeated or chosen. Raises ValueError for what would lose it or choose
    by less: another kind of cache, an input in chunks, gradient checkpointing.
    """
    rule = SELECTORS.get(selector, selector)
    if not callable(rule) or layers not in ("every", "first") or scores not in ("logits", "probabilities"):
        raise ValueError(f"selector {selector!r}, layers {layers!r}, scores {scores!r}: must be one of "
                         f"{sorted(SELECTORS)}, every or first, logits or probabilities")
    before, plain = model.config._attn_implementation, getattr(model, "generate", None)
    if before == "idp":
        raise ValueError("this model is under attach_idp already")
    idp = IDP(bank=bank, rule=rule, layers=layers, reading=scores, attend=attend, options=options)
    own = "generate" in vars(model)
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


# --- 5. The slow, obvious version: each layer chooses, then attends as if losers were not there; a demo -----

def reference_attention(module, query, key, value, mask, scaling=None, reference=None, **kwargs):
    """One sequence, no padding, cache or bank. reference: prompts' caches, reading, choices so far."""
    caches, layers, scores, choices = reference
    repeat = lambda x: x[0].repeat_interleave(query.shape[1] // key.shape[1], 0)           # (h, columns, d_k)
    keys, values = zip(*(cache[module.layer_idx] for cache in caches), (key, value))       # the input's last
    *logits, own = [(query[0] @ repeat(k).transpose(1, 2)).float() * scaling for k in keys]  # (h, T, columns)
    own = own.masked_fill(torch.ones_like(own, dtype=torch.bool).triu(1), -torch.inf)          # (h, T, T)
    A = logits
    if scores == "probabilities":
        A = torch.cat([*logits, own], dim=2).softmax(2).split([k.shape[2] for k in keys], dim=2)[:-1]
    k = choices[0] if choices and layers == "first" else torch.stack([a.mean() for a in A]).argmax().item()
    choices.append(k)
    P = torch.cat([logits[k], own], dim=2).softmax(2).to(value.dtype)                          # (h, T, n_k+T)
    return (P @ torch.cat([repeat(values[k]), repeat(value)], dim=1)).transpose(0, 1)[None], None


AttentionInterface.register("idp", idp_attention)          # no mask function of that name: the mask is ours
AttentionInterface.register("idp_reference", reference_attention)


@torch.no_grad()
def idp_reference(model, prompts, input_ids, attention_mask=None, layers="every", scores="logits"):
    """What the fused pass must equal, under mean_attention, one sequence at a time.

    prompts: m tensors (n_k, d); input_ids, attention_mask (B, T) -> logits (B, T, V), 0 at padding; choice.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    before, N, rows, choices = model.config._attn_implementation, max(map(len, prompts)), [], []
    caches = [prompt_cache(model, P, N) for P in prompts]
    model.set_attn_implementation("idp_reference")
    for ids, real in zip(input_ids, mask.bool()):
        choices.append([])
        positions = torch.arange(N, N + int(real.sum()), device=ids.device)[None]
        out = model(ids[real][None], position_ids=positions, use_cache=False,
                    attention_mask=torch.ones(1, 1, 1, 1, device=ids.device),                     # left alone
                    reference=(caches, layers, scores, choices[-1])).logits[0]
        rows.append(out.new_zeros(len(ids), out.shape[1]).index_copy(0, real.nonzero()[:, 0], out))  # (T, V)
    model.set_attn_implementation(before)
    choices = torch.tensor(choices, device=input_ids.device).T                                 # (L, B)
    return torch.stack(rows), choices if layers == "every" else choices[0]


def demo():
    """Tiny random LLaMA, three prompts of unequal length, a padded batch: predict, then show."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128,
                             num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    prompts = [torch.randn(n, 64) for n in (4, 6, 8)]
    ids, mask = torch.randint(1, 100, (5, 12)), torch.ones(5, 12, dtype=torch.long)
    mask[0, 8:], mask[1, :4] = 0, 0                        # one padded on the right, one on the left
    with torch.no_grad(), attach_idp(model, PromptBank.from_prompts(model, prompts)) as idp:
        logits = model(ids, attention_mask=mask).logits    # (5, 12, 100)
    expected, choice = idp_reference(model, prompts, ids, mask)
    print(f"chosen, a line a layer, a column a sequence; fused pass:\n {idp.choice}")
    print(f"slow reference:\n {choice}")
    error = ((logits - expected) * mask[..., None]).abs().max().item()
    print(f"largest difference of logits: {error:.1e}  (the law: below 1e-5)")


if __name__ == "__main__":
    argparse.ArgumentParser(description="IDP's demo: the fused pass against the slow reference.").parse_args()
    demo()
