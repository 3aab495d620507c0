"""Latency: what each remedy costs at inference, all in one run.

The abstract of the paper's last version claims 60 % less inference latency for IDP than for LoRA, and gives
no table. What that compares (LoRA merged or not, on which layers, prompts cached or not) is NOT IN PAPER, so
each has a row: one prompt as embeddings, one as cached prefix, IDP under its four readings, LoRA unmerged on
q,v and on all linears, LoRA merged. A compressed model that is dequantized runs like the dense one: no row.

    python -m experiments.latency --model toy                                # seconds, CPU
    python -m experiments.latency --shape smollm2-135m --lengths 128,512     # random weights, true shapes
    python -m experiments.latency --shape llama-7b --device cuda             # a latency needs no download

Prefill: T tokens to the first logits. Decode: one token with T in the cache. Variants are interleaved,
warm-up first, medians over repeats; ratios are medians of ratios within a repeat, which a drifting machine
disturbs least. `fastest`: the fastest repeat by the fastest of the cached prompt; whatever disturbs a repeat
makes it slower. With one CPU thread the clock counts that thread's own time, the latency of an idle machine,
which other processes disturb less than the time on the wall. Last, what a choice costs on paper.

Letters: T input tokens, N tokens of a prompt, m prompts, S = m N, h heads, h_kv key heads, d_k their width, L
layers.
"""
import contextlib
import functools
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from evaluate import command_line
from idp_minimal import CACHE, PromptBank, attach_idp, prompt_cache
from methods.lora import LoRA
from methods.prompts import initial_prompt
from support.cli import parse_flags, refuse_given, run
from support.output import claim, json_text
from support.architectures import (
    blocks_of, check_room, device_name, linears_of, pick_device, pick_dtype, versions)
from support.models import load_model
from support.progress import progress
from support.tables import markdown

LLAMA_7B = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                max_position_embeddings=2048)
SHAPES = {  # the published configurations; weights are random, which a latency does not see
    "llama-7b": LLAMA_7B,
    "opt-6.7b": dict(model_type="opt", vocab_size=50272, hidden_size=4096, ffn_dim=16384,
                     num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096,
                     max_position_embeddings=2048),
    "smollm2-135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         max_position_embeddings=8192, tie_word_embeddings=True),
}


def random_model(shape, device, dtype):
    """A model of a published shape with small random weights, made on the device itself."""
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


# --- 1. Variants: each is a context manager around a model and a way to call it -----------------------------

def plain(model, ids, cache):
    """The model as it is. Every call: (model, ids (B, T), cache or None) -> output with its cache."""
    return model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)


def as_embeddings(P):
    """The soft prompt in front of the input, run through every layer each time."""
    def call(model, ids, cache):
        """Prefill with the prompt's embeddings in front; decode as usual."""
        if cache is not None:
            return plain(model, ids, cache)
        E = torch.cat([P.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)   # (B, n+T, d)
        return model(inputs_embeds=E, use_cache=True, logits_to_keep=1)
    return call


def as_cached_prefix(model, P):
    """The soft prompt's keys and values, computed once: the cheapest that one prompt can be."""
    layers = prompt_cache(model, P, len(P))

    def call(model, ids, cache):
        """Prefill behind a cache that holds the prompt; decode as usual."""
        if cache is None:
            wide = lambda x: x.expand(len(ids), -1, -1, -1)                # (B, h_kv, n, d_k)
            cache = DynamicCache([(wide(k), wide(v)) for k, v in layers])
        return plain(model, ids, cache)
    return call


def all_linears(model):
    """Names of every linear layer inside the blocks."""
    return sorted({name.split(".")[-1] for name in linears_of(blocks_of(model)[0])})


@contextlib.contextmanager
def merged(method):
    """LoRA folded into the weights for the duration."""
    for layer in method.layers.values():
        layer.merge()
    try:
        yield
    finally:
        for layer in method.layers.values():
            layer.unmerge()


READINGS = (("every", "logits", 2), ("every", "logits", 4), ("every", "logits", 8), ("first", "logits", 4),
            ("every", "probabilities", 4), ("first", "probabilities", 4))                # layers, scores, m


def variants(model, n):
    """{name: (context manager factory, call)}. n: tokens of every prompt, so that all cost the same."""
    generator, nothing = torch.Generator().manual_seed(0), contextlib.nullcontext
    prompts = [initial_prompt(model, n, generator).to(model.dtype) for _ in range(8)]            # 8 x (n, d)
    lora, lora_all = LoRA(model), LoRA(model, targets=all_linears(model))
    table = {"dense": (nothing, plain), "prompt as embeddings": (nothing, as_embeddings(prompts[0])),
             PREFIX: (nothing, as_cached_prefix(model, prompts[0]))}
    banks = {m: PromptBank.from_prompts(model, prompts[:m]) for _, _, m in READINGS}
    for layers, scores, m in READINGS:
        attached = functools.partial(attach_idp, model, banks[m], layers=layers, scores=scores)
        table[f"IDP {layers}, {scores}, m = {m}"] = (attached, plain)
    table[UNMERGED] = (lora.inference, plain)
    table["LoRA r 8 on all linears, unmerged"] = (lora_all.inference, plain)
    table["LoRA, merged"] = (lambda: merged(lora), plain)
    return table


PREFIX, UNMERGED = "prompt as cached prefix", "LoRA r 8 on q,v, unmerged"


# --- 2. The clock -------------------------------------------------------------------------------------------

def own_time(device):
    """Does the clock count the thread's own time? Only where that thread does all the work."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def now(device):
    """Seconds on the clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.thread_time() if own_time(device) else time.perf_counter()


@torch.no_grad()
def time_once(model, call, ids, decode_tokens):
    """One prefill and `decode_tokens` decode steps. -> (prefill seconds, seconds per decoded token)."""
    start = now(model.device)
    out = call(model, ids, None)
    prefilled = now(model.device)
    for _ in range(decode_tokens):
        out = call(model, ids[:, -1:], out[CACHE])
    return prefilled - start, (now(model.device) - prefilled) / decode_tokens


def measure(model, table, ids, repeats, decode_tokens):
    """{variant: {"prefill": [s], "decode": [s], "peak": bytes}}, interleaved so that drift hits all."""
    times = {name: {"prefill": [], "decode": [], "peak": None} for name in table}
    for repeat in progress(range(repeats + 1), desc=f"T={ids.shape[1]}"):
        for name, (attached, call) in table.items():
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            with attached():
                prefill, decode = time_once(model, call, ids, decode_tokens)
            if model.device.type == "cuda":
                times[name]["peak"] = torch.cuda.max_memory_allocated(model.device)
            if repeat:                                     # the first round is warm-up
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
    return times


def ratio(times, name, reference, phase):
    """Median over repeats of this variant's time by the reference's in the same repeat."""
    return statistics.median(a / b for a, b in zip(times[name][phase], times[reference][phase]))


def fastest(times, name, reference, phase):
    """This variant's fastest repeat by the reference's."""
    return min(times[name][phase]) / min(times[reference][phase])


HEAD = ["T", "variant", "prefill ms", "by cached prompt", "fastest", "by LoRA q,v",
        "decode ms/token", "by cached prompt", "fastest", "by LoRA q,v", "peak MiB"]


def report(times, T):
    """-> rows of cells for one input length."""
    rows = []
    for name, seen in times.items():
        cells = [f"{T}", name]
        for phase in ("prefill", "decode"):
            ratios = (ratio(times, name, PREFIX, phase), fastest(times, name, PREFIX, phase),
                      ratio(times, name, UNMERGED, phase))
            cells += [f"{1e3 * statistics.median(seen[phase]):.1f}", *(f"{value:.3f}" for value in ratios)]
        rows.append(cells + [f"{seen['peak'] / 2**20:.0f}" if seen["peak"] else "-"])
    return rows


# --- 3. On paper --------------------------------------------------------------------------------------------

def choice_flops(config, T, m, S, layers="every", scores="logits"):
    """Operations by which one input of T tokens chooses among m prompts of S tokens in all. [Fig. 4] -> int.

    Of matrix products, a multiplication and an addition each; softmax and means over heads are left out.
    """
    h, L = config.num_attention_heads, config.num_hidden_layers if layers == "every" else 1
    h_kv = getattr(config, "num_key_value_heads", None) or h
    d_k = getattr(config, "head_dim", None) or config.hidden_size // h
    if scores == "logits":
        # mean query: 2 T h d_k; its product with m mean keys: 2 m h_kv d_k
        return L * 2 * d_k * (T * h + m * h_kv)
    # A: each of T queries with S + T keys, 2 h d_k T (S + T); mean over a prompt's tokens: 2 m S
    return L * (2 * h * d_k * T * (S + T) + 2 * m * S)


def pass_flops(model, T, N):
    """Operations of all blocks for T tokens behind a cached prompt of N, matrix products alone. -> int."""
    config, weights = model.config, sum(p.numel() for p in blocks_of(model).parameters() if p.dim() == 2)
    h = config.num_attention_heads
    d_k = getattr(config, "head_dim", None) or config.hidden_size // h
    # each weight once a token: 2 T weights; q . k and A . v: 4 h d_k T (N + T) a layer
    return 2 * T * weights + config.num_hidden_layers * 4 * h * d_k * T * (N + T)


def on_paper(name, model, T, lengths):
    """What a choice costs under each reading, in words. lengths: tokens of each prompt."""
    whole, parts = pass_flops(model, T, max(lengths)), []
    for layers, scores in dict.fromkeys(reading[:2] for reading in READINGS):
        flops = choice_flops(model.config, T, len(lengths), sum(lengths), layers, scores)
        parts.append(f"{layers}, {scores} {flops:.3g} ({100 * flops / whole:.2g} %)")
    return (f"On paper, {name}, {T} tokens, prompts of {' + '.join(map(str, lengths))}: a pass through all "
            f"blocks takes {whole:.3g} floating-point operations, a choice under {'; '.join(parts)}.")


# --- 4. The command -----------------------------------------------------------------------------------------

def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for what cannot work."""
    takes = ["model", "device", "dtype", "seed", "shape", "lengths", "prompt_length", "decode_tokens",
             "repeats", "batch_size", "out"]
    args = parse_flags(__doc__, takes, argv, {"shape": SHAPES}, {"batch_size": 1})
    if args.shape:
        refuse_given(args, {"model"}, "--shape stands in its place; give one of the two")
    return args


def main(argv=None):
    """The whole table."""
    args = parse(argv)
    device, start = pick_device(args.device), time.time()
    torch.manual_seed(args.seed)
    with claim(args.out) as out:
        name = f"{args.shape} (random weights)" if args.shape else args.model
        model = (random_model(args.shape, device, pick_dtype(args.dtype, device, None)) if args.shape
                 else load_model(args.model, device, args.dtype)[0])
        check_room(model, "--lengths", max(args.lengths), args.prompt_length + args.decode_tokens)
        table, times = variants(model, args.prompt_length), {}
        for T in args.lengths:
            generator = torch.Generator().manual_seed(args.seed)
            ids = torch.randint(3, model.config.vocab_size, (args.batch_size, T), generator=generator)
            ids = ids.to(device)
            times[T] = measure(model, table, ids, args.repeats, args.decode_tokens)
        text = "\n\n".join(texts(args, name, model, times))
        print(text)
        if out:
            with out.folder() as folder:
                (folder / "latency.md").write_text(text + "\n", encoding="utf-8")
                (folder / "latency.json").write_text(json_text({
                    "command": command_line(), "settings": vars(args), "versions": versions(),
                    "device": device_name(device), "seconds": round(time.time() - start, 1),
                    "times": times}), encoding="utf-8")


def texts(args, name, model, times):
    """Caption, a table for each length, what a choice costs on paper. -> list of paragraphs."""
    clock = "the thread's own time" if own_time(model.device) else "time on the wall"
    dtype = str(model.dtype).removeprefix("torch.")
    caption = (f"{name}, {dtype}, {device_name(model.device)}, batch {args.batch_size}, prompts of "
               f"{args.prompt_length} tokens, {args.decode_tokens} decoded tokens, medians of "
               f"{args.repeats} interleaved repeats, {clock}")
    large = random_model("llama-7b", "meta", torch.float32)
    return [caption, *(markdown(HEAD, report(seen, T)) for T, seen in times.items()),
            *(on_paper(name, model, T, [args.prompt_length] * 4) for T in times),
            on_paper("LLaMA-7B", large, 512, [50, 100])]   # two prompts of the paper's sizes [§3.3]


if __name__ == "__main__":
    run(main)
