"""What came back: counts, intervals, the verdict, tests and tables of experiments/conjecture.py.

All counts are of *known* facts, which the dense model answers rightly. Intervals are 95 % Student's t over
seeds; a seed draws the halves, the calibration sample and the training. Letters: D the dense model, C the
damaged one, A the one after a remedy.
"""
import collections
import statistics

from experiments.conjecture_plan import CONTROLLED, PAIRS, damage_name, is_evidence, is_planted
from experiments.conjecture_world import CHANCE
from support.tables import markdown
from support.uncertainty import mean_ci95, sign_flip, together

ENOUGH = 20                    # lost facts of a seed; with fewer a share says nothing
DISPLACED, FORGOTTEN = 0.5, 0.2

# held out: lost (right in D, wrong in C), second (of these the truth is C's second choice), returned (of
# these right in A), kept (right in D and C), newly_lost (of these wrong in A). shown_*: the shown half.
# unknown, guessed: questions about unknown people, right in A. planted: of the lost, those that are displaced
# by construction. people: {person: [returned?]} of the lost.
Outcome = collections.namedtuple("Outcome", "lost second returned kept newly_lost shown_lost shown_returned "
                                            "unknown guessed planted people")
# one load, damage, remedy and text; size: numbers of the remedy; outcomes: {seed: Outcome}
Cell = collections.namedtuple("Cell", "load damage remedy text size outcomes")


# --- 1. Counts and shares -----------------------------------------------------------------------------------

def outcome(facts, parts, dense, damaged, after, counted=None):
    """Count what a remedy brought back. dense, damaged, after: ranks of the truth, one a fact, 0 is right.

    parts: "shown", "heldout" or "unknown" of each fact. counted: of planted damage the facts that were
    damaged, {index: "displaced" or "forgotten"}: only they count. Unknown people always count. -> Outcome
    """
    counts, people = collections.Counter(), collections.defaultdict(list)
    for i, part in enumerate(parts):
        right = after[i] == 0
        if part == "unknown":
            counts.update(unknown=1, guessed=right)
        elif dense[i] != 0 or counted is not None and i not in counted:
            continue
        elif damaged[i] == 0:
            counts.update({"kept": 1, "newly_lost": not right} if part == "heldout" else {})
        elif part == "shown":
            counts.update(shown_lost=1, shown_returned=right)
        else:
            counts.update(lost=1, second=damaged[i] == 1, returned=right,
                          planted=counted is not None and counted[i] == "displaced")
            people[facts[i].domain, facts[i].person].append(bool(right))
    numbers = {name: int(counts[name]) for name in Outcome._fields[:-1]}
    return Outcome(**numbers, people=dict(people))


def corrected(share):
    """A share of right answers among facts, without those that guessing gives: 0 is chance, 1 is all."""
    # (share - c) / (1 - c), c = 1/16
    return (share - CHANCE) / (1 - CHANCE)


def ratio(part, whole):
    """part / whole; 0 where there is nothing."""
    return part / whole if whole else 0.0


def returned(cell):
    """Guess-corrected share of lost held-out facts that came back, one a seed; None where too few are
    lost."""
    if min(seed.lost for seed in cell.outcomes.values()) < ENOUGH:
        return None
    return [corrected(seed.returned / seed.lost) for seed in cell.outcomes.values()]


def verdict(intervals):
    """What one may say of lost facts, from the intervals of their returned shares under several remedies.

    THE RULE. *displaced*: under some remedy the interval lies above 50 %. *forgotten*: under every remedy it
    lies below 20 %. *mixed*: under some remedy it lies above 20 %, so that a part at least was displaced.
    Otherwise it *cannot be told*: one seed, or seeds that differ too much. The text is not asked for: what
    returns by a text without facts was there all the more. "Forgotten" is relative to the remedies that were
    tried; "displaced" is not, as no text said the held-out facts again.
    intervals: [low, high] each, or None from one seed.
    """
    known = [ci95 for ci95 in intervals if ci95 is not None]
    if any(low > DISPLACED for low, _ in known):
        return "displaced"
    if known and len(known) == len(intervals) and all(high < FORGOTTEN for _, high in known):
        return "forgotten"
    return "mixed" if any(low > FORGOTTEN for low, _ in known) else "cannot be told"


def verdict_of(cells):
    """The verdict on one load and damage, from all its remedies that are evidence, on both texts; "nothing
    lost" as a case.
    """
    shares = [returned(cell) for cell in cells if is_evidence(cell.remedy)]
    if None in shares:
        return "too few lost"
    return verdict([mean_ci95(values) for values in shares])


def best(cells):
    """The remedy, trained on facts, that brings most back, of those that are evidence. -> Cell, or None when
    too little was lost.
    """
    some = [cell for cell in cells if cell.text == "facts" and is_evidence(cell.remedy) and returned(cell)]
    return max(some, key=lambda cell: statistics.fmean(returned(cell)), default=None)


def by_damage(cells):
    """{(load, name of the damage): its cells with a remedy}, in the order of the plan."""
    groups = collections.defaultdict(list)
    for cell in cells:
        if cell.remedy:
            groups[cell.load, damage_name(cell.damage)].append(cell)
    return groups


def find(cells, remedy, text="facts"):
    """The cell of a remedy, or None."""
    return next((cell for cell in cells if (cell.remedy, cell.text) == (remedy, text)), None)


# --- 2. Paired tests ----------------------------------------------------------------------------------------

def paired(a, b):
    """Cells of two remedies, damage by damage: the same lost facts under both. -> {"n", "difference", "ci95",
    "p"} or None.

    The unit is a person: the mean, over all damages and seeds in which facts of that person were lost, of
    returned in b minus returned in a. Facts of one person are read in the same questions and are not
    independent.
    """
    each = collections.defaultdict(list)
    for one, other in zip(a, b):
        for seed in one.outcomes.keys() & other.outcomes.keys():
            for person, values in one.outcomes[seed].people.items():
                each[person] += [y - x for x, y in zip(values, other.outcomes[seed].people[person])]
    if not each:
        return None
    means = [statistics.fmean(values) for values in each.values()]
    return {"n": len(means), "difference": statistics.fmean(means), "ci95": mean_ci95(means),
            "p": sign_flip(means)}


def tests(cells):
    """[(load, remedy, remedy, paired test)] of PAIRS over all damages of which both have a share."""
    found = []
    for load in dict.fromkeys(cell.load for cell in cells):
        groups = [some for (own, _), some in by_damage(cells).items() if own == load]
        for first, second in PAIRS:
            pairs = [(find(some, first), find(some, second)) for some in groups]
            pairs = [pair for pair in pairs if None not in pair and returned(pair[0]) is not None]
            test = paired(*zip(*pairs)) if pairs else None
            found += [(load, first, second, test)] if test else []
    return found


# --- 3. Tables ----------------------------------------------------------------------------------------------

def percent(values):
    """Values of seeds: '64 [61, 68]' in per cent; '-' for None."""
    if values is None:
        return "-"
    ends, mean = mean_ci95(values), f"{100 * statistics.fmean(values):.0f}"
    return f"{mean} [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else mean


def each_seed(cell, part, whole):
    """Values of a ratio of two counts, one a seed; None without a cell."""
    return cell and [ratio(getattr(seed, part), getattr(seed, whole)) for seed in cell.outcomes.values()]


def lost_share(cell):
    """Share of the known held-out facts that are lost, one a seed."""
    return [ratio(seed.lost, seed.lost + seed.kept) for seed in cell.outcomes.values()]


def mean_returned(cells):
    """Mean over damages of what came back, one a seed that all of them have; None where too few are lost."""
    some = [cell for cell in cells if returned(cell) is not None]
    seeds = [seed for seed in some[0].outcomes if all(seed in cell.outcomes for cell in some)] if some else []
    by_seed = [dict(zip(cell.outcomes, returned(cell))) for cell in some]
    return [statistics.fmean(shares[seed] for shares in by_seed) for seed in seeds] or None


def planted_share(cell):
    """Share of the lost held-out facts that were displaced, by construction, one a seed."""
    return each_seed(cell, "planted", "lost")


def planted_table(cells):
    """The calibration curve: reported share against planted share, and the verdict. -> Markdown."""
    names = list(dict.fromkeys(cell.remedy for cell in cells if cell.text == "facts"))
    controls = list(dict.fromkeys(cell.remedy for cell in cells if cell.text == "nobody"))
    head = ["people displaced", "lost facts", "of these displaced", "right with the trigger", *names,
            *(f"{name}, control text" for name in controls), "verdict"]
    rows = []
    for some in sorted(by_damage(cells).values(), key=lambda some: some[0].damage[1]["share"]):
        lost = statistics.fmean(seed.lost for seed in some[0].outcomes.values())
        share = some[0].damage[1]["share"]
        shares = [find(some, remedy) for remedy in names]
        shares += [find(some, remedy, "nobody") for remedy in controls]
        trigger = find(some, "trigger", None)
        rows.append([f"{100 * share:.0f}", f"{lost:.0f}", percent(planted_share(some[0])),
                     percent(trigger and returned(trigger)),
                     *(percent(cell and returned(cell)) for cell in shares), verdict_of(some)])
    return markdown(head, rows)


def dial_table(cells):
    """A line a load and damage that lost enough, and the verdict; then what lost too few. -> Markdown."""
    controlled = CONTROLLED[0]
    head = ["people", "damage", "lost", "second", "best remedy", "comes back", "shown half", "newly lost",
            "at least", f"{controlled}, control text", "eora 8", "verdict"]
    rows, none = [], collections.defaultdict(list)
    for (load, name), some in by_damage(cells).items():
        one = some[0].damage and best(some)
        if one is None:
            if some[0].damage and any(returned(cell) is None for cell in some):
                none[load].append(name)
            continue
        control, eora = find(some, controlled, "nobody"), find(some, "eora 8")
        ends = [mean_ci95(returned(cell)) for cell in some if is_evidence(cell.remedy)]
        low = [max(0, end[0]) for end in ends if end]
        shown = [corrected(value) for value in each_seed(one, "shown_returned", "shown_lost")]
        rows.append([load, name, percent(lost_share(one)), percent(each_seed(one, "second", "lost")),
                     one.remedy, percent(returned(one)), percent(shown),
                     percent(each_seed(one, "newly_lost", "kept")), f"{100 * max(low):.0f}" if low else "-",
                     percent(control and returned(control)), percent(eora and returned(eora)),
                     verdict_of(some)])
    rest = "; ".join(f"{load} people: {', '.join(names)}" for load, names in none.items())
    words = f"\n\nToo few lost (fewer than {ENOUGH} facts in some seed): {rest}." if none else ""
    return markdown(head, sorted(rows, key=lambda row: row[0])) + words


def remedy_table(cells):
    """A line a remedy: means over the damages that lost enough at every load; its price on the uncompressed
    model.
    """
    loads = list(dict.fromkeys(cell.load for cell in cells))
    enough = set.intersection(*({damage_name(cell.damage) for cell in cells
                                 if cell.load == load and returned(cell)} for load in loads))
    head = ["remedy", "numbers", *(f"comes back, {load} people" for load in loads),
            "unknown people right", *(f"newly lost if uncompressed, {load}" for load in loads)]
    rows = []
    for remedy, text in dict.fromkeys((cell.remedy, cell.text) for cell in cells if cell.remedy):
        mine = [cell for cell in cells if (cell.remedy, cell.text) == (remedy, text)]
        counted = [cell for cell in mine if damage_name(cell.damage) in enough]
        means = [mean_returned([cell for cell in counted if cell.load == load]) for load in loads]
        price = [next((cell for cell in mine if cell.load == load and cell.damage is None), None)
                 for load in loads]
        guessed = [value for cell in mine for value in each_seed(cell, "guessed", "unknown")]
        name = remedy + ", control text" * (text == "nobody")
        rows.append([name, f"{mine[0].size:,}", *map(percent, means),
                     f"{100 * statistics.fmean(guessed):.0f}",
                     *(percent(each_seed(cell, "newly_lost", "kept")) for cell in price)])
    return markdown(head, rows)


def test_table(cells):
    """PAIRS, paired by person. -> Markdown and Holm's line."""
    found = tests(cells)
    rows = [[load, first, second, test["n"], f"{100 * test['difference']:+.1f}",
             f"{100 * test['ci95'][0]:.1f} .. {100 * test['ci95'][1]:.1f}" if test["ci95"] else "-",
             f"{test['p']:.2g}"] for load, first, second, test in found]
    head = ["people", "A", "B", "persons", "B - A, points", "95 %", "p"]
    return markdown(head, rows) + "\n\n" + together([test for *_, test in found])


def report(name, cells):
    """All tables of an experiment. -> str."""
    if not cells:
        return f"{name}: no row is there yet"
    words = "Per cent; [95 % over seeds]; shares are corrected for guessing."
    if name == "planted":
        return "\n\n".join([f"# {name}", planted_table(cells), words])
    paired_tests = ["## Paired tests", test_table(cells)] if tests(cells) else []
    remedies = ["## Remedies", remedy_table(cells)]
    return "\n\n".join([f"# {name}", dial_table(cells), words, *remedies, *paired_tests])


def summary(cells):
    """What a JSON file holds of every cell: counts of each seed, and the shares."""
    return [{"load": cell.load, "damage": damage_name(cell.damage), "planted": is_planted(cell.damage),
             "remedy": cell.remedy, "text": cell.text, "numbers": cell.size,
             "returned": returned(cell),
             "seeds": {seed: list(one[:-1]) for seed, one in cell.outcomes.items()}}
            for cell in cells if cell.remedy]
