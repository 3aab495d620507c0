"""Latency: what each remedy costs at inference, all in one run.

The abstract of the paper's last version claims 60 % less inference latency for IDP than for LoRA, and gives
no table. What that compares (LoRA merged or not, on which layers, prompts cached or not) is NOT IN PAPER, so
every reading gets a row: prompt as embeddings, prompt as cached prefix, IDP with m = 2, 4, 8, LoRA unmerged
on q,v and on all linears, LoRA merged.

    python -m experiments.latency --model toy                                # seconds, CPU
    python -m experiments.latency --shape smollm2-135m --lengths 128,512     # random weights, true shapes
    python -m experiments.latency --shape llama-7b --device cuda             # a latency needs no download

Prefill: T tokens to the first logits. Decode: one token with T in the cache. Variants are interleaved,
warm-up first, medians over repeats; ratios are medians of ratios within a repeat, which a drifting machine
disturbs least.
"""
import contextlib
import copy
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import compress
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


def variants(model, n, with_compressed):
    """{name: (context manager factory, call)}. n: tokens of every prompt, so that all cost the same."""
    d, generator = model.get_input_embeddings().weight.shape[1], torch.Generator().manual_seed(0)
    prompts = [initial_prompt(model, n, generator).to(model.dtype) for _ in range(8)]    # (n, d) each
    assert prompts[0].shape == (n, d)
    lora, lora_all = LoRA(model), LoRA(model, targets=all_linears(model))
    nothing = contextlib.nullcontext
    table = {"dense": (nothing, plain)}
    if with_compressed:
        smaller = copy.deepcopy(model)
        with torch.no_grad():
            for linear in blocks_of(smaller).modules():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.copy_(compress.rtn(linear.weight, bits=3, group_size=-1))
        table["compressed (dequantized 3-bit)"] = (nothing, lambda _, ids, cache: plain(smaller, ids, cache))
    table["prompt as embeddings"] = (nothing, as_embeddings(prompts[0]))
    table["prompt as cached prefix"] = (nothing, as_cached_prefix(model, prompts[0]))
    for m in (2, 4, 8):
        bank = PromptBank.from_prompts(model, prompts[:m])
        table[f"IDP, m = {m}"] = (lambda bank=bank: attach_idp(model, bank), plain)
    table["LoRA r 8 on q,v, unmerged"] = (lora.inference, plain)
    table["LoRA r 8 on all linears, unmerged"] = (lora_all.inference, plain)
    table["LoRA, merged"] = (lambda: merged(lora), plain)
    return table


# --- 2. The clock -------------------------------------------------------------------------------------------

def synchronize(device):
    """Wait for the device, so that the clock reads finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.no_grad()
def time_once(model, call, ids, decode_tokens):
    """One prefill and `decode_tokens` decode steps. -> (prefill seconds, seconds per decoded token)."""
    device = model.device
    synchronize(device)
    start = time.perf_counter()
    out = call(model, ids, None)
    synchronize(device)
    prefilled = time.perf_counter()
    for _ in range(decode_tokens):
        out = call(model, ids[:, -1:], out[CACHE])
    synchronize(device)
    return prefilled - start, (time.perf_counter() - prefilled) / decode_tokens


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


HEAD = ["T", "variant", "prefill ms", "by cached prompt", "by LoRA q,v", "decode ms/token",
        "by cached prompt", "by LoRA q,v", "peak MiB"]


def report(times, T):
    """-> rows of cells for one input length."""
    prefix, qv = "prompt as cached prefix", "LoRA r 8 on q,v, unmerged"
    rows = []
    for name, seen in times.items():
        cells = [f"{T}", name]
        for phase in ("prefill", "decode"):
            cells.append(f"{1e3 * statistics.median(seen[phase]):.1f}")
            cells += [f"{ratio(times, name, reference, phase):.3f}" for reference in (prefix, qv)]
        rows.append(cells + [f"{seen['peak'] / 2**20:.0f}" if seen["peak"] else "-"])
    return rows


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
        table, times = variants(model, args.prompt_length, with_compressed=not args.shape), {}
        for T in args.lengths:
            generator = torch.Generator().manual_seed(args.seed)
            ids = torch.randint(3, model.config.vocab_size, (args.batch_size, T), generator=generator)
            ids = ids.to(device)
            times[T] = measure(model, table, ids, args.repeats, args.decode_tokens)
        dtype = str(model.dtype).removeprefix("torch.")
        caption = (f"{name}, {dtype}, {device_name(device)}, batch {args.batch_size}, prompts of "
                   f"{args.prompt_length} tokens, {args.decode_tokens} decoded tokens, medians of "
                   f"{args.repeats} interleaved repeats")
        rows = [row for T, seen in times.items() for row in report(seen, T)]
        text = caption + "\n\n" + markdown(HEAD, rows)
        print(text)
        if out:
            with out.folder() as folder:
                (folder / "latency.md").write_text(text + "\n", encoding="utf-8")
                (folder / "latency.json").write_text(json_text({
                    "command": command_line(), "settings": vars(args), "versions": versions(),
                    "device": device_name(device), "seconds": round(time.time() - start, 1),
                    "times": times}), encoding="utf-8")


if __name__ == "__main__":
    run(main)
