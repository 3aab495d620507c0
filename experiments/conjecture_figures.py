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


def canvas(width, height, panels=1):
    """A figure with panels one above the other, on the same axes. -> (figure, axes)."""
    plt = pyplot()
    fig, axes = plt.subplots(panels, figsize=(width, height), squeeze=False, sharex=True, sharey=True)
    plt.close(fig)
    return fig, axes[:, 0]


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
    fig, axes = canvas(6, 4.6)
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


def damages_of(groups):
    """[(name, {load: cells})] of the damages that took enough at some load, those that take least first."""
    names = dict.fromkeys(name for (_, name), cells in groups.items() if best(cells))
    by_load = {name: {load: cells for (load, own), cells in groups.items() if own == name} for name in names}
    lost = lambda loads: statistics.fmean(share for cells in loads.values() for share in lost_share(cells[0]))
    return sorted(by_load.items(), key=lambda item: lost(item[1]))


def curves(cells):
    """What comes back against damage: a panel a load, a line a remedy, damages in order of what they take."""
    damages, loads = damages_of(by_damage(cells)), list(dict.fromkeys(cell.load for cell in cells))
    fig, axes = canvas(max(6, 2.4 + 0.6 * len(damages)), 1.8 + 2.9 * len(loads), len(loads))
    axes[0].set_ylim(-15, 122)                             # intervals of few seeds may reach beyond
    axes[0].set_yticks(range(0, 101, 20))
    for ax, load in zip(axes, loads):
        here = [(x, some[load]) for x, (_, some) in enumerate(damages) if load in some]
        for k, remedy in enumerate(LOOKS):
            found = [(x, returned(cell)) for x, some in here if (cell := find(some, remedy))]
            points = [(x, shares) for x, shares in found if shares]
            if points:
                line(ax, *zip(*points), remedy, 0.05 * k - 0.18)
        for x, some in here:
            ax.text(x, 112, f"{100 * statistics.fmean(lost_share(some[0])):.0f}", ha="center", fontsize=8)
        for level in (0, DISPLACED, FORGOTTEN):
            ax.axhline(100 * level, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.set_title(f"{load} people per domain; above: facts lost, %", fontsize=10)
        ax.set_ylabel("comes back, %")
        ax.grid(alpha=0.3)
    axes[-1].set_xticks(range(len(damages)), [name for name, _ in damages], rotation=45, ha="right")
    fig.tight_layout()
    lines = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels())}
    if lines:
        fig.subplots_adjust(top=1 - 0.9 / fig.get_figheight())
        fig.legend(lines.values(), lines, frameon=False, fontsize=8, ncol=4, loc="upper center")
    return fig


def phases(cells):
    """Load x damage, coloured by what the best remedy brings back and marked by which it is."""
    groups, loads = by_damage(cells), list(dict.fromkeys(cell.load for cell in cells))
    names = list(dict.fromkeys(name for (_, name), some in groups.items() if some[0].damage))
    fig, (ax, *_) = canvas(2.8 + 1.6 * len(loads), 1.4 + 0.45 * len(names))
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
                words = "not run" if some is None else "too few lost" if lost else "no trained remedy"
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
