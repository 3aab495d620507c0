"""Patterns: what recovery does inside. Attention and hidden states of a compressed and a recovered model, against the dense one.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867, compares the attention and activation patterns of prompts
and of LoRA. If knowledge was forgotten, a remedy must change the weights' work back; if it was displaced, redirecting is
enough, and the patterns need not return to the dense ones. NOT IN PAPER (its text was not at hand): every measure below.

    python recover.py --method idp  --out runs/idp                      # the runs bring model, compression and adapter
    python recover.py --method lora --out runs/lora
    python evaluate.py --patterns --adapter runs/idp/adapter --adapter runs/lora/adapter --out runs/patterns

Writes patterns.json, patterns.md and patterns.png. All models read the same chunks of --eval-text; per layer, averaged over
heads, tokens and chunks:

  attention     Jensen-Shannon divergence from the dense model's attention, in bits: 0 the same, 1 disjoint. Attention to
                prompt tokens is taken out and the rest made to sum to one, so that only real tokens are compared.
  content       the same over the real tokens but the first, again made to sum to one.
  direction     1 - cosine of the hidden state after the block and the dense one: 0 the same direction, 1 unrelated.
  norm          length of the hidden state over the dense one's.
  prompt share  attention on prompt tokens, of all attention.
  first share   attention on the first real token, of all attention: where models park the attention they do not need.

The first token is left out as a query and as a hidden state: it sees nothing but itself (and the prompt), and its hidden
state is hundreds of times longer than the others, so it would decide every mean.
Letters: B chunks, T tokens, h heads, N prompt columns, L layers, A attention after its softmax, X hidden states (B, T, d).
"""
import contextlib
import json
import math
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import compress
import loading
import methods
from evaluate import adapter_name, command_line, prompt_columns
from idp_minimal import IDP
from loading import UserError
from uncertainty import bootstrap

MEASURES = {  # name -> (title, what a reader needs to know, does the dense model have it)
    "attention": ("Attention pattern over real tokens", "JS divergence from dense (bits)", False),
    "content": ("Attention pattern without the first token", "JS divergence from dense (bits)", False),
    "direction": ("Hidden state after the block: direction", "1 - cosine to dense", False),
    "norm": ("Hidden state after the block: length", "norm relative to dense", False),
    "prompt share": ("Attention on prompt tokens", "share of all attention", False),
    "first share": ("Attention on the first token", "share of all attention", True),
}


# --- 1. Measures ------------------------------------------------------------------------------------------------------------

def jensen_shannon(P, Q):
    """Divergence of two distributions over the last dimension, in bits. P, Q (..., K) -> (...) in [0, 1]."""
    entropy = lambda p: torch.special.entr(p).sum(-1) / math.log(2)
    # JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2
    return (entropy((P + Q) / 2) - (entropy(P) + entropy(Q)) / 2).clamp(min=0)


def to_one(A):
    """Attention made to sum to one over the last dimension."""
    return A / A.sum(-1, keepdim=True).clamp(min=1e-12)


def split_prompt(A):
    """Attention to prompt and to real tokens apart. A (B, h, T, N+T) -> (B, h, T, T) summing to one, (B, h, T) on prompts."""
    N = A.shape[3] - A.shape[2]
    return to_one(A[..., N:]), A[..., :N].sum(-1)


def layer_measures(A, X, A_dense, X_dense):
    """Every measure of one layer, on at least 3 tokens. -> {name: float}, means over heads and all tokens but the first."""
    real, share = split_prompt(A)
    X, X_dense = X[:, 1:], X_dense[:, 1:]                                                      # (B, T-1, d)
    return {"attention": jensen_shannon(real, A_dense)[..., 1:].mean().item(),
            "content": jensen_shannon(to_one(real[..., 2:, 1:]), to_one(A_dense[..., 2:, 1:])).mean().item(),
            "direction": 1 - F.cosine_similarity(X, X_dense, dim=-1).mean().item(),
            "norm": (X.norm(dim=-1) / X_dense.norm(dim=-1)).mean().item(),
            "prompt share": share[..., 1:].mean().item(),
            "first share": (real[..., 0] * (1 - share))[..., 1:].mean().item()}


# --- 2. Looking inside --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def visible_attention(model, attached=None):
    """Within the block, attention is computed in plain PyTorch, so that A can be returned. attached: the IDP in use, if any."""
    before = model.config._attn_implementation
    if isinstance(attached, IDP):
        attached.attention = "eager"                       # its own attention function is in place: only how it computes changes
    else:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if not isinstance(attached, IDP):
            model.set_attn_implementation(before)


@torch.no_grad()
def look(model, ids):
    """One pass. ids (B, T) -> ([(A (B, h, T, N+T), X (B, T, d)) of each layer] in float32, mean next-token loss in nats)."""
    states = []
    keep = lambda module, args, out: states.append((out[0] if isinstance(out, tuple) else out).float())
    hooks = [block.register_forward_hook(keep) for block in loading.blocks_of(model)]
    try:
        out = model(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    loss = F.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
    return [(A.float(), X) for A, X in zip(out.attentions, states)], loss.item()


def measure(model, chunks, reference, attached=None):
    """Compare with the dense model. chunks (n, T); reference: what `look` gave for each. -> {measure: (n, L)}, losses (n,)."""
    table, losses = {name: [] for name in MEASURES}, []
    with visible_attention(model, attached):
        for ids, dense in zip(tqdm(chunks, desc="patterns", disable=None, leave=False), reference):
            layers, loss = look(model, ids[None].to(model.device))
            rows = [layer_measures(A, X, *(t.to(A.device) for t in old)) for (A, X), old in zip(layers, dense)]
            losses.append(loss)
            for name in MEASURES:
                table[name].append([row[name] for row in rows])
    return {name: torch.tensor(values) for name, values in table.items()}, losses


def look_at_dense(model, chunks):
    """The reference: one list of layers per chunk, kept on the CPU (4 L h T^2 bytes of attention a chunk)."""
    with visible_attention(model):
        return [[(A.cpu(), X.cpu()) for A, X in look(model, ids[None].to(model.device))[0]] for ids in chunks]


# --- 3. The runs of recover.py ------------------------------------------------------------------------------------------------

SAME = ("model", "dtype", "seed", "text", "nsamples", "seqlen", "compression")             # what decides the compressed model


def read_settings(adapters, model):
    """Settings that all runs share, from the results.json beside each adapter. -> dict. Raises UserError when they differ."""
    runs = []
    for folder in map(pathlib.Path, adapters):
        beside = [parent / "results.json" for parent in (folder.parent, folder.parent.parent)]
        found = [path for path in beside if path.is_file()]
        if not folder.is_dir() or not found:
            raise UserError(f"--adapter {folder}: needs RUN/adapter of recover.py --out RUN, with RUN/results.json beside it")
        runs.append({key: json.loads(found[0].read_text())["settings"][key] for key in SAME})
    for folder, run in zip(adapters, runs):
        differing = [f"{key} {runs[0][key]} and {run[key]}" for key in SAME if run[key] != runs[0][key]]
        if differing:
            raise UserError(f"--adapter {folder}: not the same compressed model as {adapters[0]} ({'; '.join(differing)}); "
                            "give runs of the same compression")
    if pathlib.Path(model, "compression.json").exists():
        raise UserError(f"--model {model}: is compressed already, so that there is no dense model to compare with; recover from the "
                        "dense model, as in recover.py --model toy")
    if runs[0]["model"] != model:
        raise UserError(f"--model {model}: the runs recovered {runs[0]['model']}; use --model {runs[0]['model']}")
    return runs[0]


def row_names(adapters):
    """A short name for every adapter. Raises UserError for twins."""
    names = [adapter_name(folder) for folder in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"--adapter {' '.join(adapters)}: two are named {max(names, key=names.count)}; rename one run's folder")
    return names


def compress_as(model, tokenizer, settings):
    """Compress in place exactly as the runs did."""
    name, options = settings["compression"]
    ids = loading.load_text(settings["text"], tokenizer, "train")
    ids = compress.calibration_ids(ids, settings["nsamples"], settings["seqlen"], settings["seed"])
    print(compress.summary(compress.compress_model(model, tokenizer, name, ids, **options)), file=sys.stderr)


# --- 4. Table and figure ------------------------------------------------------------------------------------------------------

def summarise(name, table, losses):
    """One row of patterns.json: per layer, and the mean over layers with its 95 % interval over chunks."""
    means = {key: {"mean": values.mean().item(), "ci95": list(bootstrap(values.mean(1)))} for key, values in table.items()}
    return {"row": name, "loss": sum(losses) / len(losses), "means": means,
            "layers": {key: values.mean(0).tolist() for key, values in table.items()}}


def has(row, key):
    """Whether a measure says anything about a row."""
    return (row["row"] != "dense" or MEASURES[key][2]) and (key != "prompt share" or max(row["layers"][key]) > 0)


def markdown(rows, caption):
    """The means of every model, then one table per measure with a line per layer. -> str."""
    cell = lambda row, key: "{mean:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]".format(**row["means"][key]) if has(row, key) else "-"
    lines = ["# Patterns: distance from the dense model", "", caption, "", "Means over layers [95 % over chunks]:", "",
             "| model | loss (nats) | " + " | ".join(MEASURES) + " |", "|" + "---|" * (len(MEASURES) + 2)]
    lines += [f"| {row['row']} | {row['loss']:.3f} | " + " | ".join(cell(row, key) for key in MEASURES) + " |" for row in rows]
    for key, (title, unit, _) in MEASURES.items():
        shown = [row for row in rows if has(row, key)]
        if shown:
            lines += ["", f"{title}: {unit}", "", "| layer | " + " | ".join(row["row"] for row in shown) + " |",
                      "|" + "---|" * (len(shown) + 1)]
            lines += [f"| {i + 1} | " + " | ".join(f"{row['layers'][key][i]:.4f}" for row in shown) + " |"
                      for i in range(len(shown[0]["layers"][key]))]
    return "\n".join(lines) + "\n"


STYLES = [("#999999", "-", "x"), ("black", "-", "o"), ("#d55e00", "--", "s"), ("#0072b2", "-.", "^"), ("#009e73", ":", "D"),
          ("#cc79a7", (0, (5, 1)), "v"), ("#56b4e9", (0, (1, 1)), "P")]                    # models differ in grey print as well


def figure(rows, caption, path):
    """One panel per measure over the layers, written whole or not at all."""
    import matplotlib                                      # only figures need it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(12.6, 7))
    handles = {}
    for ax, key in zip(axes.flat, MEASURES):
        for i, row in enumerate(rows):
            if has(row, key):
                label = f"{row['row']}, loss {row['loss']:.2f} nats"
                handles[label] = panel_line(ax, row["layers"][key], *STYLES[i % len(STYLES)])
        ax.set_title(MEASURES[key][0], fontsize=10)
        ax.set(xlabel="layer", ylabel=MEASURES[key][1], xlim=(0.5, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        if key == "norm":
            ax.axhline(1, color="#999999", linewidth=0.8)
        else:
            ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    labels = sorted(handles, key=[f"{row['row']}, loss {row['loss']:.2f} nats" for row in rows].index)
    fig.legend([handles[label] for label in labels], labels, loc="upper center", ncol=4, frameon=False, handlelength=4, fontsize=9)
    fig.text(0.5, 0.015, caption, ha="center", fontsize=8, wrap=True)
    fig.tight_layout(rect=(0, 0.04, 1, 0.92))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path.with_suffix(".tmp"), dpi=150, format="png")
    path.with_suffix(".tmp").replace(path)
    plt.close(fig)


def panel_line(ax, values, color, line, marker):
    """One model in one panel. -> the line, for the legend."""
    return ax.plot(range(1, len(values) + 1), values, color=color, linestyle=line, marker=marker, markersize=4, linewidth=1.4,
                   markevery=max(1, len(values) // 10))[0]


def chunks_of(ids, n, T, model, adapters):
    """The first n chunks of T tokens. ids (tokens,) -> (n, T). Raises UserError when text or model has too little room."""
    if T < 3 or len(ids) < n * T:
        raise UserError(f"--limit {n}: {n} chunks of --eval-seqlen {T}, at least 3, need {n * max(T, 3)} tokens, and the text has "
                        f"{len(ids)}; change one of the three")
    room = model.config.max_position_embeddings
    for method in adapters:
        with method.inference() as attached:
            room = min(room, model.config.max_position_embeddings - prompt_columns(attached))
    if T > room:
        raise UserError(f"--eval-seqlen {T}: beside the prompts the model has room for {room} tokens; use a smaller number")
    return ids[:n * T].view(n, T)


def main(args):
    """Dense, compressed, each adapter: numbers, table, figure. args: evaluate.py's command line."""
    if not args.adapter or not args.out:
        raise UserError("--patterns: needs --adapter RUN/adapter (once or several times) and --out DIR")
    settings, names = read_settings(args.adapter, args.model), row_names(args.adapter)
    loading.check_out(args.out, "patterns.json")
    device, start = loading.pick_device(args.device), time.time()
    model, tokenizer = loading.load_model(settings["model"], device, settings["dtype"])
    adapters = [methods.load_adapter(model, folder) for folder in args.adapter]
    chunks = chunks_of(loading.load_text(args.eval_text, tokenizer, "test"), args.limit or 8, args.eval_seqlen, model, adapters)
    reference = look_at_dense(model, chunks)
    rows = [summarise("dense", *measure(model, chunks, reference))]
    compress_as(model, tokenizer, settings)
    rows.append(summarise("compressed", *measure(model, chunks, reference)))
    for name, method in zip(names, adapters):
        with method.inference() as attached:
            rows.append(summarise(name, *measure(model, chunks, reference, attached)))
    compressor, options = settings["compression"]
    options = ", ".join(f"{key} {value}" for key, value in options.items() if value not in (None, False))
    caption = (f"{args.model}, {compressor} {options}; n = {len(chunks)} chunks of {chunks.shape[1]} tokens of "
               f"{pathlib.Path(args.eval_text).name}; mean over heads and tokens but the first")
    out, text = pathlib.Path(args.out), markdown(rows, caption)
    figure(rows, caption, out / "patterns.png")
    loading.write_text(out / "patterns.md", text)
    loading.write_json(out / "patterns.json", {
        "command": command_line(), "settings": {**vars(args), "runs": settings}, "versions": loading.versions(),
        "device": loading.device_name(device), "seconds": round(time.time() - start, 1), "rows": rows})
    print(text.split("\n\nAttention pattern")[0])
