"""Patterns: what recovery does inside. Compressed and recovered models against the dense one, layer by layer.

The paper compares attention and activations of prompts and of LoRA with the dense model's, by their cosine
[§4] [Fig. 6]. If knowledge was forgotten, a remedy must change the weights' work back; if it was displaced,
redirecting is enough, and the patterns need not return. NOT IN PAPER: every measure below but the direction.

    python recover.py --method idp  --out runs/idp         # the runs bring model, compression and adapter
    python recover.py --method lora --out runs/lora
    python -m experiments.patterns --adapter runs/idp/adapter --adapter runs/lora/adapter --out runs/patterns

Writes patterns.json, patterns.md and patterns.png (both shares, and the direction). All models read the same
chunks of --eval-text; per layer, averaged over heads, tokens and chunks:

  attention     Jensen-Shannon divergence from the dense model's attention, in bits: 0 the same, 1 disjoint.
                Attention to prompt tokens is taken out and the rest made to sum to one, so that only real
                tokens are compared.
  content       the same over the real tokens but the first, again made to sum to one.
  direction     1 - cosine of the hidden state after the block and the dense one: 0 the same, 1 unrelated.
  norm          length of the hidden state over the dense one's.
  prompt share  attention on prompt tokens, of all attention.
  first share   attention on the first real token, of all attention: where models park what they do not need.

The first token is left out as a query and as a hidden state: it sees nothing but itself (and the prompt), and
its hidden state is hundreds of times longer than the others, so it would decide every mean.
Letters: B chunks, T tokens, h heads, N prompt columns, L layers, A attention after its softmax, X hidden
states (B, T, d).
"""
import contextlib
import math
import pathlib
import time

import torch
import torch.nn.functional as F

import compress
from evaluate import adapter_name, command_line, prompt_columns
from experiments.style import pyplot, styles
from idp_minimal import IDP
from methods.registry import load_adapter
from support.architectures import blocks_of, check_room, device_name, pick_device, room, versions
from support.cli import DTYPES, UserError, parse_flags, run, say
from support.data import check_text, load_text
from support.files import STRING, one_of, read_fields, whole_number
from support.models import load_model
from support.output import claim, write_json
from support.progress import progress
from support.tables import markdown
from support.uncertainty import mean_ci95, shown

MEASURES = {  # name -> (title, what a reader needs to know, does the dense model have it)
    "attention": ("Attention pattern over real tokens", "JS divergence from dense (bits)", False),
    "content": ("Attention pattern without the first token", "JS divergence from dense (bits)", False),
    "direction": ("Hidden state after the block: direction", "1 - cosine to dense", False),
    "norm": ("Hidden state after the block: length", "norm relative to dense", False),
    "prompt share": ("Attention on prompt tokens", "share of all attention", False),
    "first share": ("Attention on the first token", "share of all attention", True),
}


# --- 1. Measures --------------------------------------------------------------------------------------------

def jensen_shannon(P, Q):
    """Divergence of two distributions over the last dimension, in bits. P, Q (..., K) -> (...) in [0, 1]."""
    entropy = lambda p: torch.special.entr(p).sum(-1) / math.log(2)
    # JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2
    return (entropy((P + Q) / 2) - (entropy(P) + entropy(Q)) / 2).clamp(min=0)


def to_one(A):
    """Attention made to sum to one over the last dimension."""
    return A / A.sum(-1, keepdim=True).clamp(min=1e-12)


def split_prompt(A):
    """A (B, h, T, N+T) -> attention to real tokens, made to sum to one (B, h, T, T); to prompts (B, h, T)."""
    N = A.shape[3] - A.shape[2]
    return to_one(A[..., N:]), A[..., :N].sum(-1)


def layer_measures(A, X, A_dense, X_dense):
    """Every measure of one layer, on at least 3 tokens. -> {name: mean over heads, tokens but the first}."""
    real, share = split_prompt(A)
    X, X_dense = X[:, 1:], X_dense[:, 1:]                                                      # (B, T-1, d)
    return {"attention": jensen_shannon(real, A_dense)[..., 1:].mean().item(),
            "content": jensen_shannon(to_one(real[..., 2:, 1:]), to_one(A_dense[..., 2:, 1:])).mean().item(),
            "direction": 1 - F.cosine_similarity(X, X_dense, dim=-1).mean().item(),
            "norm": (X.norm(dim=-1) / X_dense.norm(dim=-1)).mean().item(),
            "prompt share": share[..., 1:].mean().item(),
            "first share": (real[..., 0] * (1 - share))[..., 1:].mean().item()}


# --- 2. Looking inside --------------------------------------------------------------------------------------

def eager_attention(module, query, key, value, mask, scaling, dropout=0.0):
    """The same attention in plain PyTorch, to look inside. -> out (B, T, h, d_k), A (B, h, T, columns)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query @ key.transpose(2, 3)).float() * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    A = F.dropout(logits.softmax(-1).to(query.dtype), dropout, module.training)
    return (A @ value).transpose(1, 2).contiguous(), A


@contextlib.contextmanager
def visible_attention(model, attached=None):
    """Inside, attention is computed in plain PyTorch, so that A is returned. attached: the IDP in use."""
    if isinstance(attached, IDP):
        attached.attend = eager_attention                  # its own function stays: only the kernel changes
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def look(model, ids):
    """One pass. ids (B, T) -> [(A (B, h, T, N+T), X (B, T, d)) of each layer] in float32, loss in nats."""
    states = []
    keep = lambda module, args, out: states.append((out[0] if isinstance(out, tuple) else out).float())
    hooks = [block.register_forward_hook(keep) for block in blocks_of(model)]
    try:
        out = model(ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    loss = F.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
    return [(A.float(), X) for A, X in zip(out.attentions, states)], loss.item()


def measure(model, chunks, reference, attached=None):
    """Compare with the dense model. reference: what `look` gave. -> {measure: (n, L)}, losses (n,)."""
    table, losses = {name: [] for name in MEASURES}, []
    with visible_attention(model, attached):
        for ids, dense in zip(progress(chunks, desc="patterns"), reference):
            layers, loss = look(model, ids[None].to(model.device))
            rows = [layer_measures(A, X, *(t.to(A.device) for t in old))
                    for (A, X), old in zip(layers, dense)]
            losses.append(loss)
            for name in MEASURES:
                table[name].append([row[name] for row in rows])
    return {name: torch.tensor(values) for name, values in table.items()}, losses


def look_at_dense(model, chunks):
    """The reference: one list of layers per chunk, kept on the CPU (4 L h T^2 bytes of attention a chunk)."""
    with visible_attention(model):
        return [[(A.cpu(), X.cpu()) for A, X in look(model, ids[None].to(model.device))[0]] for ids in chunks]


# --- 3. The runs of recover.py ------------------------------------------------------------------------------

def run_settings(folder):
    """What a run of recover.py says of its compressed model, checked. folder: its adapter's -> dict."""
    folder = pathlib.Path(folder)
    beside = [parent / "results.json" for parent in (folder.resolve().parent, folder.resolve().parent.parent)]
    found = [path for path in beside if path.is_file()]
    if not folder.is_dir() or not found:
        raise UserError(f"--adapter {folder}: needs RUN/adapter of recover.py --out RUN, with "
                        "RUN/results.json beside it")
    settings = read_fields(found[0], "--adapter").within("settings")
    return {key: settings(key, rule) for key, rule in SETTINGS.items()}


PAIR = (lambda value: isinstance(value, list) and len(value) == 2 and value[0] in compress.COMPRESSORS
        and isinstance(value[1], dict), "a compressor and its settings: recover from a dense model")
SETTINGS = {  # of recover.py, which decide what the compressed model is
    "model": STRING, "text": STRING, "compression": PAIR, "dtype": one_of("auto", *DTYPES),
    "seed": whole_number(0, 2**31 - 1), "nsamples": whole_number(1, 10**5), "seqlen": whole_number(2, 10**6)}


def read_settings(adapters, model):
    """Settings that all runs share. -> dict. Raises UserError when they differ."""
    runs = [run_settings(folder) for folder in adapters]
    first = runs[0]
    for folder, settings in zip(adapters, runs):
        differing = [f"{key} {value} and {settings[key]}" for key, value in first.items()
                     if settings[key] != value]
        if differing:
            raise UserError(f"--adapter {folder}: not the same compressed model as {adapters[0]} "
                            f"({'; '.join(differing)}); give runs of the same compression")
    if first["model"] != model:
        raise UserError(f"--model {model}: the runs recovered {first['model']}; use --model {first['model']}")
    return first


def row_names(adapters):
    """A short name for every adapter. Raises UserError for twins."""
    names = [adapter_name(folder) for folder in adapters]
    if len(set(names)) < len(names):
        raise UserError(f"--adapter {' '.join(adapters)}: two are named {max(names, key=names.count)}; "
                        "rename one run's folder")
    return names


def compress_as(model, tokenizer, settings):
    """Compress in place exactly as the runs did."""
    name, options = settings["compression"]
    ids = load_text(settings["text"], tokenizer, "train")
    ids = compress.calibration_ids(ids, settings["nsamples"], settings["seqlen"], settings["seed"])
    report = compress.compress_model(model, tokenizer, name, ids, **options)
    report["calibration"].update(text=settings["text"], seed=settings["seed"])
    say("compression", compress.summary(report))


def weights_on_cpu(model):
    """A copy of every tensor of a model, off the device."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


# --- 4. Table and figure ------------------------------------------------------------------------------------

def summarise(name, table, losses):
    """One row of patterns.json: per layer, and the mean over layers with its 95 % interval over chunks."""
    means = {key: {"mean": values.mean().item(), "ci95": mean_ci95(values.mean(1).tolist())}
             for key, values in table.items()}
    return {"row": name, "loss": sum(losses) / len(losses), "chunks": len(losses), "means": means,
            "layers": {key: values.mean(0).tolist() for key, values in table.items()}}


def has(row, key):
    """Whether a measure says anything about a row."""
    known = row["row"] != "dense" or MEASURES[key][2]
    return known and (key != "prompt share" or max(row["layers"][key]) > 0)


def cell(row, key):
    """One mean with its interval, as '0.049 [0.048, 0.051]'; '-' where the measure says nothing."""
    if not has(row, key):
        return "-"
    value = row["means"][key]
    return f"{value['mean']:.3f} {shown(value['ci95'], '{:.3f}'.format, row['chunks'])}"


def text_of(rows, caption):
    """The means of every model, then one table per measure with a line per layer. -> Markdown."""
    means = [[row["row"], f"{row['loss']:.3f}", *(cell(row, key) for key in MEASURES)] for row in rows]
    parts = ["# Patterns: distance from the dense model", caption, "Means over layers [95 % over chunks]:",
             markdown(["model", "loss (nats)", *MEASURES], means)]
    for key, (title, unit, _) in MEASURES.items():
        models = [row for row in rows if has(row, key)]
        if models:
            layers = zip(*(row["layers"][key] for row in models))
            lines = [[i, *(f"{value:.4f}" for value in values)] for i, values in enumerate(layers, 1)]
            parts += [f"{title}: {unit}", markdown(["layer", *(row["row"] for row in models)], lines)]
    return "\n\n".join(parts) + "\n"


PANELS = [  # of the figure: title, what its axis shows, {measure: are its markers filled}
    ("Attention to the first token (filled) and to the prompt (open)", "share of all attention",
     {"first share": True, "prompt share": False}),
    ("Hidden state after the block: distance from dense", "1 - cosine to dense", {"direction": True})]


def figure(rows, caption):
    """Two panels over the layers: where attention is parked, how far the states are. -> matplotlib Figure."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10.4, 4.6))
    looks, lines = styles(row["row"] for row in rows), {}  # lines: {index of a row: one of its lines}
    for ax, (title, unit, measures) in zip(axes, PANELS):
        for key, filled in measures.items():
            for i, row in enumerate(rows):
                if has(row, key):
                    line = panel_line(ax, row["layers"][key], *looks[i], filled)
                    lines.setdefault(i, line)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="layer", ylabel=unit, xlim=(0.5, None), ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    labels = [f"{rows[i]['row']}, loss {rows[i]['loss']:.2f} nats" for i in sorted(lines)]
    fig.legend([lines[i] for i in sorted(lines)], labels, loc="upper center", ncol=3, frameon=False,
               handlelength=4, fontsize=9)
    fig.text(0.5, 0.015, caption, ha="center", fontsize=8, wrap=True)
    fig.tight_layout(rect=(0, 0.04, 1, 0.89))
    plt.close(fig)
    return fig


def panel_line(ax, values, color, line, marker, filled):
    """One model in one panel. -> the line, for the legend."""
    layers = range(1, len(values) + 1)
    return ax.plot(layers, values, color=color, linestyle=line, marker=marker, markersize=6, linewidth=1.4,
                   markerfacecolor=color if filled else "white", markevery=max(1, len(values) // 10))[0]


# --- 5. The command -----------------------------------------------------------------------------------------

def chunks_of(ids, n, T, model, adapters):
    """The first n chunks of T tokens. ids (tokens,) -> (n, T). Raises UserError: too little text or room."""
    if T < 3 or len(ids) < n * T:
        raise UserError(f"--limit {n}: {n} chunks of --eval-seqlen {T}, at least 3, need {n * max(T, 3)} "
                        f"tokens, and the text has {len(ids)}; change one of the three")
    space = room(model)
    for method in adapters:
        with method.inference() as attached:
            space = min(space, room(model, prompt_columns(attached)))
    if T > space:
        raise UserError(f"--eval-seqlen {T}: beside the prompts the model has room for {space} tokens; "
                        "use a smaller number")
    return ids[:n * T].view(n, T)


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for what cannot work."""
    takes = ["model", "device", "text", "adapter", "eval_text", "eval_seqlen", "limit", "out"]
    args = parse_flags(__doc__, takes, argv, defaults={"limit": 8}, several=("adapter",))
    if not args.adapter or args.out is None:
        raise UserError("--adapter: needs RUN/adapter of recover.py (once or several times), and --out DIR")
    args.eval_text = args.text if args.eval_text is None else args.eval_text
    args.eval_seqlen = (64 if args.toy else 128) if args.eval_seqlen is None else args.eval_seqlen
    check_text(args.eval_text, "--eval-text")
    return args


def measure_all(model, tokenizer, settings, args):
    """Dense, compressed, every adapter. -> rows of patterns.json, the chunks (n, T) that were read."""
    dense = weights_on_cpu(model)
    compress_as(model, tokenizer, settings)
    adapters = [load_adapter(model, folder) for folder in args.adapter]
    ids = load_text(args.eval_text, tokenizer, "test", "--eval-text")
    chunks = chunks_of(ids, args.limit, args.eval_seqlen, model, adapters)
    compressed = weights_on_cpu(model)
    model.load_state_dict(dense)
    reference = look_at_dense(model, chunks)
    rows = [summarise("dense", *measure(model, chunks, reference))]
    model.load_state_dict(compressed)
    rows.append(summarise("compressed", *measure(model, chunks, reference)))
    for name, method in zip(row_names(args.adapter), adapters):
        with method.inference() as attached:
            rows.append(summarise(name, *measure(model, chunks, reference, attached)))
    return rows, chunks


def main(argv=None):
    """Dense, compressed, each adapter: numbers, table, figure."""
    args = parse(argv)
    device, start = pick_device(args.device), time.time()
    settings = read_settings(args.adapter, args.model)
    row_names(args.adapter)
    with claim(args.out) as out:
        model, tokenizer = load_model(settings["model"], device, settings["dtype"])
        check_room(model, "--eval-seqlen", args.eval_seqlen)
        rows, chunks = measure_all(model, tokenizer, settings, args)
        name, options = settings["compression"]
        options = ", ".join(f"{key} {value}" for key, value in options.items() if value not in (None, False))
        caption = (f"{args.model}, {name} {options}; n = {len(chunks)} chunks of {chunks.shape[1]} tokens of "
                   f"{pathlib.Path(args.eval_text).name}; mean over heads and tokens but the first")
        text = text_of(rows, caption)
        seconds = round(time.time() - start, 1)
        obj = {"command": command_line(), "settings": {**vars(args), "runs": settings},
               "versions": versions(), "device": device_name(device), "seconds": seconds, "rows": rows}
        with out.folder() as folder:
            figure(rows, caption).savefig(folder / "patterns.png", dpi=150)
            (folder / "patterns.md").write_text(text, encoding="utf-8")
            write_json(folder / "patterns.json", obj)
        print(text.split("\n\nAttention pattern over")[0])


if __name__ == "__main__":
    run(main)
