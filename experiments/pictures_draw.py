"""Pictures, the drawing: numbers in, a matplotlib figure out, to be read at 800 pixels and in grey.

experiments/pictures.py says what each shows and where its numbers come from.
"""
import textwrap

from experiments.latency import ratio
from experiments.style import HATCHES, pyplot, style_of, styles

RIGHT, WRONG = "#0072b2", "#f3e6d8"
SMALL, NORMAL, LARGE = 9, 10, 12                           # points; a figure is eight inches wide


def canvas(height, rows=1, columns=1, **settings):
    """A figure of eight inches, and its panels. -> (figure, axes (rows, columns))."""
    plt = pyplot()
    fig, axes = plt.subplots(rows, columns, figsize=(8, height), squeeze=False, **settings)
    plt.close(fig)
    for ax in axes.flat:
        ax.tick_params(labelsize=SMALL)
    return fig, axes


def finish(fig, title, below=0):
    """The title, and room for it. below: share of the height that a legend under the panels takes."""
    fig.suptitle("\n".join(textwrap.wrap(title, 85)), fontsize=LARGE)
    fig.tight_layout(rect=(0, below, 1, 1))
    return fig


def squares(shown, question):
    """A row a model, a column a question: dark is right, light with a cross wrong. shown: {model: [bool]}."""
    from matplotlib.colors import ListedColormap
    fig, axes = canvas(2.9)
    ax, n = axes[0, 0], len(next(iter(shown.values())))
    ax.imshow([list(map(int, values)) for values in shown.values()], cmap=ListedColormap([WRONG, RIGHT]),
              vmin=0, vmax=1, aspect="auto")
    for y, values in enumerate(shown.values()):
        for x, right in enumerate(values):
            if not right:
                ax.plot(x, y, marker="x", color="#8c510a", markersize=5, linestyle="none")
    ax.set_xticks([i - 0.5 for i in range(n)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(len(shown))], minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="minor", length=0)
    ax.set_yticks(range(len(shown)), shown, fontsize=NORMAL)
    ax.set_xticks([0, *range(9, n, 10)], [1, *range(10, n + 1, 10)])
    counts = ax.secondary_yaxis("right")
    counts.set_yticks(range(len(shown)), [f"{sum(values)} of {n}" for values in shown.values()],
                      fontsize=NORMAL)
    ax.set_xlabel(f"questions about people whose facts recovery never shows; the first: “{question}”",
                  fontsize=NORMAL)
    return finish(fig, "Which questions does each model answer? Dark: right; light, with a cross: wrong")


def grids(weights, several, title):
    """A histogram of weights; on it the points of each grid, as high as weights went to it.

    several: {name: (points, counts)}.
    """
    fig, axes = canvas(1.9 * len(several) + 1, rows=len(several), sharex=True, sharey=True)
    for ax, (name, (points, counts)) in zip(axes[:, 0], several.items()):
        ax.hist(weights, bins=32, color="#cccccc", label="weights, before")
        ax.vlines(points, 0, counts, color="#0072b2", linewidth=2)
        ax.plot(points, counts, "o", color="#0072b2", label="weights at each grid point, after")
        ax.plot(points, [0] * len(points), "|", color="black", markersize=12, label="grid points")
        ax.plot([0], [0], "D", color="#d55e00", markersize=8, clip_on=False, zorder=3,
                label="0, on every grid")
        ax.set_title(name, fontsize=NORMAL, loc="left")
        ax.set_ylabel("weights", fontsize=NORMAL)
    axes[-1, 0].set_xlabel("value of a weight", fontsize=NORMAL)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False,
               fontsize=SMALL, handlelength=1)
    return finish(fig, title, below=0.05)


def errors(found):
    """Relative output error over the linear layers, a line a compressor. found: {name: {path: error}}."""
    fig, axes = canvas(3.8)
    ax, paths = axes[0, 0], list(next(iter(found.values())))
    for name, (color, line, marker) in zip(found, styles(found)):
        ax.plot(range(len(paths)), found[name].values(), color=color, linestyle=line, marker=marker,
                label=name)
    blocks = [path.split(".")[-3] for path in paths]
    for i in range(1, len(paths)):
        if blocks[i] != blocks[i - 1]:
            ax.axvline(i - 0.5, color="0.6", linewidth=0.8)
    names = [path.split(".")[-1].removesuffix("_proj") for path in paths]
    ax.set_xticks(range(len(paths)), names, rotation=90)
    for block in dict.fromkeys(blocks):
        ax.text(blocks.index(block), 1.01, f"block {int(block) + 1}", fontsize=SMALL,
                transform=ax.get_xaxis_transform())
    ax.set_ylim(bottom=0)
    ax.set_ylabel("error of the layer's output,\nrelative to the output", fontsize=NORMAL)
    ax.legend(fontsize=NORMAL, frameon=False)
    ax.grid(axis="y", alpha=0.3)
    return finish(fig, "Rounding (rtn) and GPTQ at 3 bits: how wrong is the output of each linear layer?")


def training(steps, curves, levels, panels, words):
    """A panel a measure, a line a remedy. curves: {name: [score a step]}; levels: {model: score}; panels:
    {label: score -> value}."""
    fig, axes = canvas(3.9, columns=len(panels))
    for ax, (label, value) in zip(axes[0], panels.items()):
        for (name, curve), (color, line, marker) in zip(curves.items(), styles(curves)):
            ax.plot(steps, [value(score) for score in curve], color=color, linestyle=line, marker=marker,
                    markersize=4, label=name)
        for (name, score), (color, _, _) in zip(levels.items(), styles(levels)):
            ax.axhline(value(score), color=color, linewidth=1.2, label=name)
        ax.set_title(label, fontsize=NORMAL)
        ax.set_xlabel("training steps", fontsize=NORMAL)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncol=6, frameon=False,
               fontsize=NORMAL, handlelength=3)
    return finish(fig, f"What comes back while each remedy is trained ({words})", below=0.08)


def dots(panels):
    """A panel a column, a dot with its interval a row. panels: {column: {row: (value, [low, high])}}."""
    names = list(next(iter(panels.values())))
    fig, axes = canvas(1.4 + 0.3 * len(names), columns=len(panels), sharey=True)
    for ax, (column, rows) in zip(axes[0], panels.items()):
        for y, name in enumerate(names):
            value, (low, high) = rows[name]
            color, _, marker = style_of(name) or styles([name])[0]
            ax.plot([low, high], [y, y], color=color, linewidth=2)
            ax.plot([value], [y], marker=marker, color=color, markersize=7, linestyle="none")
        ax.set_title(column, fontsize=NORMAL)
        ax.set_xlabel("accuracy, %", fontsize=NORMAL)
        ax.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=SMALL)
    axes[0, 0].invert_yaxis()                              # the table's first row on top
    return finish(fig, "Accuracy of each row of the table, with 95 % intervals")


def latency(times):
    """Each variant's time by that of one cached prompt. times: {T: what latency.measure gives}."""
    names = list(next(iter(times.values())))
    fig, axes = canvas(1.6 + 0.42 * len(names), columns=2, sharey=True)
    height = 0.8 / len(times)
    for ax, (phase, words) in zip(axes[0], (("prefill", "reading the input"), ("decode", "each new token"))):
        for k, (T, seen) in enumerate(times.items()):
            values = [ratio(seen, name, "prompt as cached prefix", phase) for name in names]
            colors = [(style_of(name) or styles([name])[0])[0] for name in names]
            y = [i + (k + 0.5) * height - 0.4 for i in range(len(names))]
            bars = ax.barh(y, values, height, color=colors, edgecolor="black", alpha=0.8,
                           hatch=HATCHES[k % len(HATCHES)])
            ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=SMALL)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(words, fontsize=NORMAL)
        ax.set_xlabel("time; one cached prompt = 1", fontsize=NORMAL)
        ax.margins(x=0.15)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=SMALL)
    axes[0, 0].invert_yaxis()
    return finish(fig, f"Time of each variant; bars from above: inputs of {', '.join(times)} tokens")
