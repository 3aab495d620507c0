"""The paper's tables and figures, out of rows that experiments/reproduce.py measured.

Numbers have 95 % intervals: over questions or chunks from one seed; over seeds (Student's t) from several,
which says how much training varies, not how much hangs on the questions.
  World, Common, Language   plain means of their tasks [§3.3]; their interval from one seed is made of the
                            tasks' Wilson intervals (MOVER: Newcombe 1998b; Zou and Donner 2008)
  Average                   plain mean of all these tasks
  flips                     of all questions together, against the dense model: lost (right to wrong), gained
  against ...               difference of right answers over all questions together, in points, and whether it
                            hangs on the questions: exact McNemar test, Bonett and Price's interval; from
                            several seeds sign-flip test and t interval of each question's mean difference
The LoRA of "against LoRA" has the largest rank, chosen before any number was seen. The toy's unknown people
are a control: they have a column, and count in no flip and in no test.
"""
import collections
import math
import re
import statistics

from experiments.fidelity import COSINES, flips
from experiments.style import HATCHES, pyplot, styles
from experiments.sweep import bar
from support.tables import markdown
from support.uncertainty import (
    FEW, mcnemar, mean_ci95, paired_interval, shown, sign_flip, together, wilson)

# label; the Spec of its first seed; the part of IDP, or None; rows, one a seed
Line = collections.namedtuple("Line", "label spec part rows")

DOMAINS = {"World": ("arc_easy", "arc_challenge", "sciq", "webqs", "triviaqa"), "Common": ("piqa",),
           "Language": ("hellaswag", "lambada", "winogrande")}                                 # [§3.3]
CONTROLS = ("toy_unknown",)


# --- 1. Numbers ---------------------------------------------------------------------------------------------

def domain_of(task):
    """'sciq', or a file's 'sciq_closed' -> 'World'; a task of no domain is its own."""
    belongs = lambda known: task == known or task.startswith(known + "_")
    return next((domain for domain, tasks in DOMAINS.items() if any(map(belongs, tasks))), task)


def columns_of(tasks):
    """{column: its tasks}: domains in the paper's order, Average, then tasks of no domain."""
    found = {domain: [task for task in tasks if domain_of(task) == domain] for domain in DOMAINS}
    found = {domain: some for domain, some in found.items() if some}
    if found:
        found["Average"] = [task for some in found.values() for task in some]
    return {**found, **{task: [task] for task in tasks if domain_of(task) == task}}


def headline(tasks):
    """The column that a figure shows: Average, or the first task where there is none. -> name, or None."""
    columns = columns_of(tasks)
    return "Average" if "Average" in columns else next(iter(columns), None)


def mean_accuracy(row, tasks):
    """Plain mean of the tasks' accuracies. -> mean, [low, high]; of one task Wilson's interval."""
    scores = [row["tasks"][task] for task in tasks]
    ends = [wilson(round(score["acc"] * score["n"]), score["n"]) for score in scores]
    mean, k = statistics.fmean(score["acc"] for score in scores), len(scores)
    # mean - sqrt(sum (p_i - l_i)^2) / k, and the same above
    below = math.sqrt(sum((score["acc"] - low) ** 2 for score, (low, _) in zip(scores, ends))) / k
    above = math.sqrt(sum((high - score["acc"]) ** 2 for score, (_, high) in zip(scores, ends))) / k
    return mean, [mean - below, mean + above]


def over_seeds(values, ci95, low=0, high=math.inf):
    """One seed: its value and interval. Several: their mean and t interval, cut at what values can be."""
    if len(values) == 1:
        return values[0], ci95
    ends = mean_ci95(values)
    return statistics.fmean(values), ends and [max(low, ends[0]), min(high, ends[1])]


def accuracy(line, tasks):
    """-> share of right answers, [low, high]."""
    several = [mean_accuracy(row, tasks) for row in line.rows]
    return over_seeds([mean for mean, _ in several], several[0][1], high=1)


def quantity(line, key):
    """"ppl" or "kl". -> value, [low, high] or None from too few chunks."""
    first = line.rows[0]
    ci95 = first[f"{key}_ci95"] if first[f"{key}_chunks"] >= FEW else None
    return over_seeds([row[key] for row in line.rows], ci95)


def pooled(row):
    """Right or wrong, over all questions together but the controls'. -> list of bool."""
    return [right for task in row["tasks"] if task not in CONTROLS for right in row["items"][task]["values"]]


def mean_flips(line, dense):
    """Right to wrong, wrong to right, against the dense row; means over seeds. -> two floats."""
    counts = [flips(pooled(dense.rows[0]), pooled(row)) for row in line.rows]
    return tuple(statistics.fmean(values) for values in zip(*counts))


def paired(line, base):
    """All questions together, line minus base. -> {"n", "difference", "ci95", "p"}.

    Seeds are paired; a base of one row (no training) goes with each.
    """
    rows = line.rows if len(base.rows) == 1 else line.rows[:len(base.rows)]
    pairs = [(pooled(row), pooled(base.rows[k % len(base.rows)])) for k, row in enumerate(rows)]
    n = len(pairs[0][0])
    differences = [sum(new) / n - sum(old) / n for new, old in pairs]
    if len(pairs) == 1:
        new, old = pairs[0]
        ci95, p = list(paired_interval(old, new)), mcnemar(old, new)
    else:
        each = [statistics.fmean(new[i] - old[i] for new, old in pairs) for i in range(n)]
        ci95, p = mean_ci95(each), sign_flip(each)
    return {"n": n, "difference": statistics.fmean(differences), "ci95": ci95, "p": p}


def by_label(lines, *starts):
    """The last line whose label begins so (LoRA's largest rank). -> Line or None."""
    return next((line for line in reversed(lines) if line.label.startswith(starts)), None)


def is_alone(line):
    """Is it one of IDP's prompts without the other? [Tab. 3]"""
    return (line.part or "").startswith("prompt")


def bases(lines):
    """{name: line} of what rows are tested against, if there. small and large: IDP's two prompts [Tab. 3]."""
    found = {"compressed": by_label(lines, "compressed"), "LoRA": by_label(lines, "lora")}
    alone = list(filter(is_alone, lines))
    found.update(zip(("small", "large"), alone) if len(alone) == 2 else ())
    return {name: line for name, line in found.items() if line}


def tests_of(line, lines):
    """{base: paired test}, for remedies only; small and large are not tested against each other."""
    if line.spec.method is None or not pooled(line.rows[0]):
        return {}
    return {name: paired(line, base) for name, base in bases(lines).items()
            if base is not line and not (is_alone(base) and is_alone(line))}


# --- 2. Tables ----------------------------------------------------------------------------------------------

def cell(value, ci95, form="{:.2f}"):
    """'3.06 [3.02, 3.09]'."""
    return f"{form.format(value)} {shown(ci95, form.format)}"


def percent(value, ci95):
    """'64.5 [61.8, 67.2]'."""
    return cell(100 * value, ci95 and [100 * end for end in ci95], "{:.1f}")


def test_cell(test):
    """'2.1 [0.9, 3.4], p 0.003'."""
    if test is None:
        return "-"
    return f"{percent(test['difference'], test['ci95'])}, p {test['p']:.2g}".replace("-0.0 ", "0.0 ")


def line_cells(line, lines, columns):
    """One line of a table as cells."""
    dense, tests = by_label(lines, "dense"), tests_of(line, lines)
    turned = "-" if dense in (None, line) else " / ".join(f"{count:g}" for count in mean_flips(line, dense))
    kl = "-" if dense is line else cell(*quantity(line, "kl"), "{:.4f}")
    return [line.label, f"{line.rows[0]['trainable_params']:,}", cell(*quantity(line, "ppl")),
            *(percent(*accuracy(line, tasks)) for tasks in columns.values()), turned, kl,
            *(test_cell(tests.get(name)) for name in bases(lines))]


def table(lines):
    """[Tab. 1] [Tab. 2] [Tab. 3] -> Markdown."""
    columns = columns_of(lines[0].rows[0]["tasks"])
    head = ["row", "parameters", "ppl", *(f"{name} %" for name in columns), "lost / gained", "KL (nats)",
            *(f"against {name}, points" for name in bases(lines))]
    tests = [test for line in lines for test in tests_of(line, lines).values()]
    many = "; rows of several seeds: over seeds" if any(len(line.rows) > 1 for line in lines) else ""
    words = f"[95 % intervals over questions or chunks{many}]. " + (together(tests) if tests else "")
    return markdown(head, [line_cells(line, lines, columns) for line in lines]) + "\n\n" + words.strip()


def gains(lines):
    """[Fig. 5] {remedy: {task: paired test against the compressed model}}."""
    base, result = by_label(lines, "compressed"), {}
    for line in lines if base else ():
        if line.spec.method:
            tasks = line.rows[0]["tasks"]
            result[line.label] = {task: paired(only(line, task), only(base, task)) for task in tasks}
    return result


def only(line, task):
    """A line as if this were its only task, and no control."""
    alone = lambda row: {"tasks": {"": row["tasks"][task]}, "items": {"": row["items"][task]}}
    return line._replace(rows=[{**row, **alone(row)} for row in line.rows])


def gain_table(lines):
    """[Fig. 5] Gain of each remedy over the compressed model, a line a task. -> Markdown."""
    found = gains(lines)
    tasks = list(lines[0].rows[0]["tasks"])
    rows = [[f"{task} ({domain_of(task)})" if domain_of(task) != task else task,
             *(test_cell(found[label][task]) for label in found)] for task in tasks]
    return markdown(["gain, points", *found], rows) + "\n\n" + table(lines)


def cosine(line, name):
    """[Fig. 6] Means over seeds and chunks. -> list, a number a layer."""
    return [statistics.fmean(values) for values in zip(*(row["cosine"][name]["layers"] for row in line.rows))]


def mean_cosine(line, name):
    """Over layers. -> value, [low, high] over chunks or seeds, or None from too few chunks."""
    found = [row["cosine"][name] for row in line.rows]
    few = line.rows[0]["cosine"]["chunks"] < FEW
    return over_seeds([one["mean"] for one in found], None if few else found[0]["ci95"], -1, 1)


def cosine_table(lines):
    """[Fig. 6] A line a layer, for attention and for activations, and their mean. -> Markdown."""
    parts = []
    for name in COSINES:
        columns = [cosine(line, name) for line in lines]
        rows = [[i + 1, *(f"{value:.4f}" for value in values)] for i, values in enumerate(zip(*columns))]
        means = ["mean", *(cell(*mean_cosine(line, name), "{:.4f}") for line in lines)]
        parts += [f"Cosine similarity of {name} to the dense model's:",
                  markdown(["layer", *(line.label for line in lines)], [*rows, means])]
    return "\n\n".join(parts)


def summary(lines):
    """What a JSON file holds of every line: its numbers, and its rows without what each question gave."""
    dense, result = by_label(lines, "dense"), []
    for line in lines:
        columns = columns_of(line.rows[0]["tasks"])
        result.append({
            "row": line.label, "parameters": line.rows[0]["trainable_params"],
            "columns": {name: dict(zip(("mean", "ci95"), accuracy(line, tasks)))
                        for name, tasks in columns.items()},
            "flips": dense and dict(zip(("lost", "gained"), mean_flips(line, dense))),
            "tests": tests_of(line, lines),
            "seeds": [{key: value for key, value in row.items() if key != "items"} for row in line.rows]})
    return result


# --- 3. Figures ---------------------------------------------------------------------------------------------

def canvas(panels, title):
    """A figure with panels side by side. -> (figure, axes)."""
    plt = pyplot()
    fig, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.6), squeeze=False)
    fig.suptitle(title, fontsize=9, wrap=True)
    plt.close(fig)
    return fig, axes[0]


def points(ax, style, x, values, label):
    """A line with error bars. style: of styles(); values: [(value, [low, high] or None)]."""
    color, line, marker = style
    bars = list(zip(*(bar(value, ci95) for value, ci95 in values)))                            # (2, points)
    ax.errorbar(x, [value for value, _ in values], yerr=bars, color=color, linestyle=line, marker=marker,
                capsize=3, label=label)


def levels(ax, lines, value):
    """The dense and the compressed model as horizontal lines."""
    for name, style in (("dense", (0, (1, 1))), ("compressed", (0, (5, 1)))):
        line = by_label(lines, name)
        if line:
            ax.axhline(value(line)[0], color="0.4", linestyle=style, linewidth=1)
            ax.text(1, value(line)[0], name, fontsize=8, color="0.3", va="bottom", ha="right",
                    transform=ax.get_yaxis_transform())


def finish(fig, axes):
    """Grids, a legend where a panel has its own lines, room for the title."""
    for ax in axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    return fig


def y_panels(lines):
    """[(label of the y axis, line -> (value, interval))]: perplexity, and accuracy if there are tasks."""
    name = headline(lines[0].rows[0]["tasks"])
    panels = [("perplexity", lambda line: quantity(line, "ppl"))]
    if name:
        tasks = columns_of(lines[0].rows[0]["tasks"])[name]
        hundred = lambda pair: (100 * pair[0], pair[1] and [100 * end for end in pair[1]])
        panels.append((f"accuracy, {name}, %", lambda line: hundred(accuracy(line, tasks))))
    return panels


def compression_figure(lines, title):
    """[Fig. 2] Accuracy against bits, and against sparsity."""
    fig, axes = canvas(2, title)
    label, value = y_panels(lines)[-1]
    kinds = (("bits", ("rtn", "gptq"), "bits per weight"),
             ("sparsity", ("magnitude", "sparsegpt"), "zeros, %"))
    for ax, (key, names, words) in zip(axes, kinds):
        for style, name in zip(styles(names), names):
            some = [line for line in lines if line.spec.compression and line.spec.compression[0] == name]
            x = [line.spec.compression[1][key] * (1 if key == "bits" else 100) for line in some]
            points(ax, style, x, [value(line) for line in some], name)
        levels(ax, lines, value)
        ax.set(xlabel=words, ylabel=label)
    axes[0].invert_xaxis()                                 # both panels compress more to the right
    return finish(fig, axes)


def over_tokens(lines, series, words, title):
    """Perplexity and accuracy over tokens. series: {name: [(tokens, line)]} -> matplotlib Figure."""
    panels = y_panels(lines)
    fig, axes = canvas(len(panels), title)
    ticks = sorted({tokens for some in series.values() for tokens, _ in some})
    for ax, (label, value) in zip(axes, panels):
        looks = enumerate(zip(styles(series), series.items()))
        for k, (style, (name, some)) in looks:             # a little apart: no bar hides another
            x = [tokens * 1.04 ** k for tokens, _ in some]
            points(ax, style, x, [value(line) for _, line in some], name)
        levels(ax, lines, value)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{tokens:g}" for tokens in ticks])
        ax.set(xlabel=words, ylabel=label)
    return finish(fig, axes)


def length_figure(lines, title):
    """[Fig. 3] Does accuracy follow perplexity, as prompts grow?"""
    some = [(line.spec.settings["lengths"][0], line) for line in lines if line.spec.method]
    return over_tokens(lines, {"one prompt": some}, "tokens of the prompt (log scale)", title)


def average_figure(lines, title):
    """[Fig. 7] IDP over the average size of its prompts; beside it the same prompts without a choice."""
    series = collections.defaultdict(list)
    for line in lines:
        if line.spec.method:
            part = re.sub(r" \(.*", "", line.part or "idp")
            series[part].append((statistics.fmean(line.spec.settings["lengths"]), line))
    return over_tokens(lines, series, "average tokens of the two prompts (log scale)", title)


def gain_figure(lines, title):
    """[Fig. 5] Bars in groups, a group a task."""
    found, (fig, axes) = gains(lines), canvas(1, title)
    tasks, ax = list(lines[0].rows[0]["tasks"]), axes[0]
    width = 0.8 / max(1, len(found))
    for k, ((color, _, _), (label, tests)) in enumerate(zip(styles(found), found.items())):
        several = [tests[task] for task in tasks]
        x = [i + (k + 0.5) * width - 0.4 for i in range(len(tasks))]
        ends = zip(*(bar(test["difference"], test["ci95"]) for test in several))               # (2, tasks)
        bars = [[100 * end for end in side] for side in ends]
        ax.bar(x, [100 * test["difference"] for test in several], width, yerr=bars, capsize=2, label=label,
               color=color, edgecolor="black", hatch=HATCHES[k % len(HATCHES)], alpha=0.8)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(tasks)), tasks, rotation=30 if len(tasks) > 4 else 0)
    ax.set_ylabel("gain over the compressed model, points")
    return finish(fig, axes)


def cosine_figure(lines, title):
    """[Fig. 6] Cosine to the dense model over the layers: attention, activations."""
    fig, axes = canvas(2, title)
    for ax, name in zip(axes, COSINES):
        drawn = [line for line in lines if line.label != "dense"]
        for (color, style, marker), line in zip(styles(line.label for line in drawn), drawn):
            values = cosine(line, name)
            x = range(1, len(values) + 1)
            ax.plot(x, values, color=color, linestyle=style, marker=marker, markersize=4, label=line.label)
        ax.set(xlabel="layer", ylabel=f"cosine of {name} to the dense model's")
        ax.xaxis.get_major_locator().set_params(integer=True)
    return finish(fig, axes)


# name -> its text, its figure or None
REPORTS = {"table1": (table, None), "table2": (table, None), "table3": (table, None),
           "fig2": (table, compression_figure), "fig3": (table, length_figure),
           "fig5": (gain_table, gain_figure), "fig6": (cosine_table, cosine_figure),
           "fig7": (table, average_figure)}
