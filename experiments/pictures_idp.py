"""Pictures of IDP: one layer's attention and the choice made by it; who chooses what; the data flow."""
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from experiments.pictures_draw import LARGE, NORMAL, SMALL, canvas, finish
from idp_minimal import PromptBank, attach_idp, mean_attention, prompt_logits
from support.data import encode
from support.scoring import pad
from support.tables import markdown
from support.toy_world import DOMAINS


# --- 1. One layer's attention [Fig. 4] ----------------------------------------------------------------------

@torch.no_grad()
def look(model, prompts, ids):
    """One forward pass with IDP. ids (1, T) -> each layer's logits to the prompts (T, S) and to the input
    itself (T, T), means over heads; the IDP, with scores (L, 1, m) and choice (L, 1)."""
    bank, to_prompts, to_input = PromptBank.from_prompts(model, prompts), [], []

    def rule(A, real, owner):
        """The paper's rule; A (1, h, T, S) is kept."""
        to_prompts.append(A[0].mean(0))
        return mean_attention(A, real, owner)

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0):
        """The usual kernel; the logits to the input's own keys are kept."""
        to_input.append(prompt_logits(query, key[:, :, bank.N:], scaling)[0].mean(0))
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout)

    with attach_idp(model, bank, rule, attend=attend) as idp:
        model(ids)
    return to_prompts, to_input, idp


def attention(toy):
    """One question under IDP's two trained prompts, in the layer where their scores differ most."""
    prompts, context = [P.detach() for P in toy.method("idp").prompts], toy.tasks["toy_recall"][0]["context"]
    ids = torch.tensor([encode(toy.tokenizer, context)])                                       # (1, T)
    to_prompts, to_input, idp = look(toy.model, prompts, ids)
    scores = idp.scores[:, 0]                                                                  # (L, m)
    layer = (scores.amax(1) - scores.amin(1)).argmax().item()
    future = torch.ones_like(to_input[layer]).triu(1).bool()
    A = torch.cat([to_prompts[layer], to_input[layer].masked_fill(future, torch.nan)], dim=1)  # (T, S+T)
    words, chosen = toy.tokenizer.convert_ids_to_tokens(ids[0].tolist()), idp.choice[layer, 0].item()
    lines = [f"Trained prompts, layer {layer + 1} (where scores differ most), mean over heads; {context}"]
    lines += [f"prompt {k + 1} ({len(P)} tokens): score {score:.3f}{'  <- chosen' * (k == chosen)}"
              for k, (P, score) in enumerate(zip(prompts, scores[layer].tolist()))]
    fig = draw_attention(A, list(map(len, prompts)), scores[layer].tolist(), chosen, words, layer)
    return fig, "\n".join(lines)


def draw_attention(A, lengths, scores, chosen, words, layer):
    """A with a frame around each block; scores; A without what was not chosen. A (T, S+T), nan: masked."""
    fig, axes = canvas(7.2, rows=3, gridspec_kw={"height_ratios": [3, 1.1, 3]})
    starts, kept = [sum(lengths[:k]) for k in range(len(lengths))], A.clone()
    for k, (start, n) in enumerate(zip(starts, lengths)):
        if k != chosen:
            kept[:, start:start + n] = torch.nan
    seen = A[~A.isnan()]
    for ax, values, title in ((axes[0, 0], A, "1. A, attention before its softmax (mean over heads)"),
                              (axes[2, 0], kept, "3. After the mask: the prompt not chosen is not there")):
        image = ax.imshow(values.numpy(), cmap="cividis", aspect="auto", vmin=seen.min().item(),
                          vmax=seen.max().item())
        frames(ax, starts, lengths, len(words), chosen)
        ax.set_yticks(range(len(words)), words)
        ax.set_title(title, fontsize=NORMAL, loc="left")
        fig.colorbar(image, ax=ax, pad=0.01)
    ax, names = axes[1, 0], [f"prompt {k + 1}" for k in range(len(lengths))]
    colors = ["#0072b2" if k == chosen else "#cccccc" for k in range(len(lengths))]
    bars = ax.barh(names, scores, color=colors)
    ax.bar_label(bars, [f"{score:.3f}{', chosen' * (k == chosen)}" for k, score in enumerate(scores)],
                 fontsize=SMALL, padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title("2. Score: the mean over each prompt's block; the largest is chosen", fontsize=NORMAL,
                 loc="left")
    return finish(fig, f"IDP in layer {layer + 1} of the toy, on one question, with two trained prompts")


def frames(ax, starts, lengths, T, chosen):
    """A frame around each block of columns, and its name under it."""
    from matplotlib.patches import Rectangle
    S = sum(lengths)
    for k, (start, n) in enumerate(zip(starts, lengths)):
        ax.add_patch(Rectangle((start - 0.5, -0.5), n, T, fill=False, linewidth=3 if k == chosen else 1.5,
                               edgecolor="#d55e00" if k == chosen else "black", clip_on=False,
                               zorder=4 if k == chosen else 3))
    centres = [start + (n - 1) / 2 for start, n in zip(starts, lengths)] + [S + (T - 1) / 2]
    names = [f"prompt {k + 1}, {n} tokens" for k, n in enumerate(lengths)]
    ax.set_xticks(centres, [*names, "the input itself"])
    ax.set_facecolor("#eeeeee")                            # masked: nan


# --- 2. Who chooses what ------------------------------------------------------------------------------------

@torch.no_grad()
def shares(toy):
    """Share of questions that take prompt 1. -> {domain: (L values, n questions)}."""
    rows, found = toy.tasks["toy_recall"], {}
    with toy.method("idp").inference() as idp:
        for domain in DOMAINS:
            contexts = [encode(toy.tokenizer, row["context"]) for row in rows if row["domain"] == domain]
            if contexts:
                ids, mask = pad(contexts, 0, left=True, device=toy.model.device)               # (B, T)
                toy.model(ids, attention_mask=mask)
                found[domain] = (idp.choice == 0).float().mean(1).tolist(), len(contexts)
    return found


def choices(toy):
    """Layer by domain: the share of questions that take the first of two prompts."""
    found = shares(toy)
    names = [f"{domain} (n = {n})" for domain, (_, n) in found.items()]
    values = [[100 * value for value in layers] for layers, _ in found.values()]
    rows = [[f"layer {i + 1}", *(f"{value:.1f}" for value in row)] for i, row in enumerate(zip(*values))]
    table = markdown(["takes prompt 1, %", *names], rows)
    return draw_choices(names, values, toy.method("idp").lengths), table


def draw_choices(names, values, lengths):
    """A heat map with its numbers. values: a list of percentages, one a layer, for each of names."""
    fig, axes = canvas(2.6)
    ax = axes[0, 0]
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            ax.text(x, y, f"{value:.0f} %", ha="center", va="center", fontsize=LARGE,
                    color="white" if value > 60 else "black")
    ax.set_yticks(range(len(names)), names, fontsize=NORMAL)
    ax.set_xticks(range(len(values[0])), [f"layer {i + 1}" for i in range(len(values[0]))], fontsize=NORMAL)
    fig.colorbar(image, ax=ax, pad=0.02, label="%")
    return finish(fig, f"Share of questions that choose prompt 1 ({lengths[0]} tokens) and not prompt 2 "
                       f"({lengths[1]} tokens)")


# --- 3. The data flow ---------------------------------------------------------------------------------------

BOXES = {  # name -> centre x, centre y, width, height, colour, words
    "prompts": (2.0, 5.3, 3.4, 0.9, "#f6d9c6", "prompts P_1 .. P_m\neach (n_k, d), trained"),
    "input": (6.0, 5.3, 3.4, 0.9, "#dddddd", "input\nB sequences of T tokens"),
    "bank": (2.0, 3.55, 3.4, 0.9, "#f6d9c6",
             "bank of every layer: keys, values\n(m, h_kv, N, d_k), and mean keys"),
    "queries": (6.0, 3.55, 3.4, 0.9, "#dddddd", "queries of every layer\n(B, h, T, d_k)"),
    "score": (1.45, 1.35, 2.3, 1.1, "#cfe3f2",
              "score  s (B, m)\nmean of q . k / sqrt(d_k)\nover each prompt"),
    "choose": (4.0, 1.35, 2.0, 1.1, "#cfe3f2", "choose  k (B,)\nthe largest score\nof each sequence"),
    "attend": (6.55, 1.35, 2.3, 1.1, "#cfe3f2", "attend\nto [prompt k | input]:\nall others are not there"),
}
ARROWS = [  # from, to, words beside it
    ("prompts", "bank", "each runs alone, once"), ("input", "queries", "the usual pass"),
    ("bank", "score", ""), ("queries", "score", ""), ("score", "choose", ""), ("choose", "attend", ""),
    ("queries", "attend", ""), ("bank", "attend", "")]


def dataflow(args):
    """IDP in one drawing, without data."""
    from matplotlib.patches import FancyBboxPatch
    fig, axes = canvas(5.4)
    ax = axes[0, 0]
    ax.set(xlim=(0, 8), ylim=(0, 6))
    ax.axis("off")
    ax.add_patch(FancyBboxPatch((0.15, 0.3), 7.7, 2.0, "round,pad=0.05", facecolor="white", edgecolor="0.4",
                                linestyle="--"))
    ax.text(4, 0.42, "inside each layer's attention, in the one forward pass; then on to the next layer",
            ha="center", fontsize=SMALL)
    for start, end, words in ARROWS:
        arrow(ax, BOXES[start], BOXES[end], words)
    for x, y, width, height, color, words in BOXES.values():
        ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, "round,pad=0.05",
                                    zorder=3, facecolor=color, edgecolor="black"))
        ax.text(x, y, words, ha="center", va="center", fontsize=SMALL + 0.5, zorder=4)
    return finish(fig, "IDP: each input chooses one of m prompts, in each layer"), "IDP in one drawing"


def arrow(ax, start, end, words):
    """From one box to another: sideways within a row, else from the lower edge to the upper."""
    (x0, y0, w0, h0, *_), (x1, y1, w1, h1, *_) = start, end
    level = y0 == y1
    tail = (x0 + w0 / 2 + 0.05, y0) if level else (x0, y0 - h0 / 2 - 0.05)
    head = (x1 - w1 / 2 - 0.05, y1) if level else (x1 + 0.15 * (x0 - x1), y1 + h1 / 2 + 0.05)
    ax.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "linewidth": 1.5, "color": "black"})
    ax.text(tail[0] + 0.1, (tail[1] + head[1]) / 2, words, fontsize=SMALL, va="center")
