"""Figures of experiments/conjecture.py: the calibration curve, what comes back, the phase diagram.

A method has one colour and one marker in all of them; line styles differ too, for print in grey.
"""
import statistics

from experiments.conjecture_numbers import (
    DISPLACED, FORGOTTEN, best, by_damage, find, lost_share, planted_share, returned, verdict_of)
from experiments.style import STYLES, pyplot
from support.uncertainty import mean_ci95

LOOKS = {  # remedy -> (colour, line style, marker): a method keeps its colour at every size
    "prompt 16": STYLES["prompt"], "prefix 16": STYLES["prefix"], "idp 8+16": STYLES["idp"],
    "lora 8": STYLES["lora"], "eora 8": STYLES["eora"], "lora 1": (STYLES["lora"][0], "-", "<"),
    "prompt 16 distilled": (STYLES["prompt"][0], (0, (1, 1)), "X"),
    "lora 8 distilled": (STYLES["lora"][0], (0, (3, 1, 1, 1)), "P"),
}


def canvas(panels, width, height):
    """A figure with panels side by side. -> (figure, axes)."""
    plt = pyplot()
    fig, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False, sharey=True)
    plt.close(fig)
    return fig, axes[0]


def mean_and_ends(values):
    """Values of seeds in per cent: their mean and the ends of its interval (the mean itself, from one)."""
    mean, ends = statistics.fmean(values), mean_ci95(values)
    return [100 * value for value in (mean, *(ends or (mean, mean)))]


def line(ax, x, shares, remedy, shift=0, **look):
    """Means of seeds, with error bars. shares: a list of values a point."""
    color, style, marker = LOOKS[remedy]
    mean, low, high = zip(*map(mean_and_ends, shares))
    bars = [[m - l for m, l in zip(mean, low)], [h - m for m, h in zip(mean, high)]]
    ax.errorbar([value + shift for value in x], mean, yerr=bars, capsize=2, markersize=5, linewidth=1.2,
                **{"color": color, "linestyle": style, "marker": marker, "label": remedy, **look})


def calibration(cells):
    """Planted damage: the share that is reported against the share that is there."""
    fig, axes = canvas(1, 6, 4.6)
    ax, groups = axes[0], sorted(by_damage(cells).values(), key=lambda some: some[0].damage[1]["share"])
    ax.plot([0, 100], [0, 100], color="0.6", linewidth=0.8)
    ax.text(24, 30, "reported = planted", color="0.4", fontsize=8, rotation=35)
    for k, remedy in enumerate(LOOKS):
        for text, look in (("facts", {}), ("nobody", {"linestyle": "none", "markerfacecolor": "white",
                                                      "label": f"{remedy}, control text"})):
            some = [cell for group in groups if (cell := find(group, remedy, text)) and returned(cell)]
            if some:
                x = [100 * statistics.fmean(planted_share(cell)) for cell in some]
                line(ax, x, list(map(returned, some)), remedy, 0.6 * k - 1, **look)
    for level in (DISPLACED, FORGOTTEN):
        ax.axhline(100 * level, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.set(xlabel="planted: lost held-out facts that are displaced, %",
           ylabel="reported: lost held-out facts that come back, %")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    return fig


def damages_of(groups, load):
    """[(name, cells)] of the damages of a load that lost enough, the mildest first."""
    some = [(name, cells) for (own, name), cells in groups.items() if own == load and best(cells)]
    return sorted(some, key=lambda item: statistics.fmean(lost_share(item[1][0])))


def curves(cells):
    """What comes back against damage: a panel a load, a line a remedy, damages in order of what they take."""
    groups, loads = by_damage(cells), list(dict.fromkeys(cell.load for cell in cells))
    most = max(len(damages_of(groups, load)) for load in loads)
    fig, axes = canvas(len(loads), max(4.8, 0.65 * most), 5)
    axes[0].set_ylim(-15, 110)                             # intervals of few seeds may reach beyond
    for ax, load in zip(axes, loads):
        damages = damages_of(groups, load)
        for k, remedy in enumerate(LOOKS):
            points = [(x, returned(cell)) for x, (_, some) in enumerate(damages)
                      if (cell := find(some, remedy))]
            if points:
                line(ax, *zip(*points), remedy, 0.05 * k - 0.1)
        names = [f"{name} ({100 * statistics.fmean(lost_share(some[0])):.0f})" for name, some in damages]
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        for level in (0, DISPLACED, FORGOTTEN):
            ax.axhline(100 * level, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.set_title(f"{load} people per domain", fontsize=10)
        ax.set_xlabel("damage (facts lost, %)")
        ax.grid(alpha=0.3)
    if axes[-1].get_legend_handles_labels()[0]:
        axes[-1].legend(frameon=False, fontsize=8, loc="upper right")
    axes[0].set_ylabel("lost held-out facts that come back, %")
    fig.tight_layout()
    return fig


def phases(cells):
    """Load x damage, coloured by what the best remedy brings back and marked by which it is."""
    groups, loads = by_damage(cells), list(dict.fromkeys(cell.load for cell in cells))
    names = list(dict.fromkeys(name for (_, name), some in groups.items() if some[0].damage))
    fig, (ax, *_) = canvas(1, 2.8 + 1.6 * len(loads), 1.4 + 0.45 * len(names))
    winners = {key: one for key, some in groups.items() if (one := best(some))}
    mean = lambda one: 100 * statistics.fmean(returned(one)) if one else float("nan")
    shares = [[mean(winners.get((load, name))) for load in loads] for name in names]
    image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for y, name in enumerate(names):
        for x, load in enumerate(loads):
            one = winners.get((load, name))
            if one is None:
                some = groups.get((load, name))
                lost = some and any(returned(cell) is None for cell in some)
                words = "not run" if some is None else "nothing lost" if lost else "no trained remedy"
                ax.text(x, y, words, ha="center", va="center", fontsize=8, color="0.5")
                continue
            color = "white" if shares[y][x] < 55 else "black"
            ax.plot(x - 0.38, y, color=color, marker=LOOKS[one.remedy][2], markersize=6)
            ax.text(x - 0.3, y, f"{shares[y][x]:.0f} %\n{verdict_of(groups[load, name])}", va="center",
                    fontsize=7, color=color)
    for remedy in dict.fromkeys(one.remedy for one in winners.values()):
        ax.plot([], [], color="0.3", linestyle="none", marker=LOOKS[remedy][2], label=remedy)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xticks(range(len(loads)), [f"{load} people" for load in loads], fontsize=9)
    if winners:
        ax.legend(title="best remedy", frameon=False, fontsize=8, ncol=3, loc="lower center",
                  bbox_to_anchor=(0.5, 1))
    fig.colorbar(image, ax=ax, label="comes back, %")
    fig.tight_layout()
    return fig


def figures(name, cells):
    """{file: matplotlib figure} of an experiment."""
    if name == "planted":
        return {"planted.png": calibration(cells)}
    drawn = {"dials.png": curves(cells)}
    if any(cell.damage for cell in cells):
        drawn["phases.png"] = phases(cells)
    return drawn
