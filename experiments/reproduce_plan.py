"""Which rows the paper's tables and figures have, and at which sizes: data, no work.

Sizes are the paper's [§3.3] with --recipe paper, or on models as wide as its own (e = 4096). For a narrower
model n tokens become the power of two nearest n sqrt(e / 4096), and LoRA's ranks 1, 2, 3: NOT IN PAPER.
Letters: e width, n tokens of a prompt, r rank.
"""
import collections
import math

from experiments.sweep import describe
from methods.lora import last_name, linears_in_blocks
from methods.registry import COMPRESSORS, METHODS


# --- 1. What §3.3 states, and what it leaves open -----------------------------------------------------------

Sizes = collections.namedtuple("Sizes", "prompts prefixes ranks idp")
WIDTH, PAPER = 4096, Sizes((25, 50, 100), (12, 25, 50), (2, 3, 4), (50, 100))
TRAINING_TOKENS = 40_960_000                               # of every method
# NOT IN PAPER: LoRA's own rate. The registry's is for two linears of a block; on all of them the toy's
# perplexity is lowest at a tenth of it (0.0002, 0.001, 0.003, 0.01 tried, after 60 % pruning and at 2 bits).
LORA_ON_ALL = 0.1
OPEN = ("The paper leaves open, so these are ours: the schedule of the rate (a tenth of the steps up, then "
        "down to 0, both linear), clipping at norm 1, --batch-size, --train-seqlen, the start of prompts "
        "(random rows of the embedding table) and of LoRA (B zero), LoRA's alpha (2 r), seeds, --group-size "
        "and GPTQ's other settings, --nsamples and --seqlen of the calibration, the harness of the tasks. It "
        "reports the better of two texts for every row, here it is --text for all.")


def scaled(n, width):
    """n tokens beside width 4096, for another width: the power of two nearest n sqrt(width / 4096)."""
    return 2 ** max(0, round(math.log2(n * math.sqrt(width / WIDTH))))


def sizes_for(width, paper):
    """The paper's sizes; for a narrower model scaled ones, unless it is to have the paper's."""
    if paper or width >= WIDTH:
        return PAPER
    shrink = lambda lengths: tuple(scaled(n, width) for n in lengths)
    return Sizes(shrink(PAPER.prompts), shrink(PAPER.prefixes), (1, 2, 3), shrink(PAPER.idp))


def paper_recipe(args):
    """{flag: value} that [§3.3] states for the training of every method: AdamW's rate and decay, tokens."""
    steps = TRAINING_TOKENS // (args.batch_size * args.train_seqlen)
    return {"lr": 2e-4, "weight_decay": 1e-5, "steps": steps}


# --- 2. Rows ------------------------------------------------------------------------------------------------
# A Spec is one model: compression (name, settings) or None, method or None with its settings, training seed.
# An Entry is one line of a table: its specs, one a seed, and which part of IDP it shows; None is the whole.

Spec = collections.namedtuple("Spec", "compression method settings seed", defaults=(None, None, None, None))
Entry = collections.namedtuple("Entry", "label specs part", defaults=(None,))


def own_settings(args, name, **given):
    """(compressor, settings): the flags', but for what is given. Unstructured: no --pattern [§3.3]."""
    takes = [key for key in COMPRESSORS[name].settings if key != "pattern"]
    return name, {key: given.get(key, getattr(args, key)) for key in takes}


def part_names(lengths):
    """The rows that come with IDP's [Tab. 3], as SoftPrompts.parts names them; None: IDP itself."""
    alone = [f"prompt {k} alone ({n} tokens)" for k, n in enumerate(lengths, 1)]
    return [*alone, "concatenated", None]


def parts_of(spec):
    """The parts of a spec that have a row each."""
    return part_names(spec.settings["lengths"]) if spec.method == "idp" else [None]


class Plan:
    """The entries of every table and figure, for these flags and this model."""

    def __init__(self, args, model):
        self.args, self.width = args, model.get_input_embeddings().weight.shape[1]
        self.sizes = sizes_for(self.width, args.recipe == "paper")
        self.targets = sorted({last_name(name) for name in linears_in_blocks(model)})

    def compression(self, name):
        """A table's own compression, or --compressor's."""
        return own_settings(self.args, self.args.compressor or name)

    def frame(self, compression):
        """The two rows that tables begin with. DEVIATES: the paper prints no dense row."""
        return [Entry("dense", [Spec()]), Entry("compressed", [Spec(compression)])]

    def remedy(self, compression, method, size, part=None):
        """One remedy of one size, under every seed. size: tokens or rank; IDP's: (n_1, n_2)."""
        args, words = self.args, f"{'+'.join(map(str, size)) if method == 'idp' else size} tokens"
        if method == "eora":
            settings, words = {"r": size, "targets": self.targets}, f"rank {size}"
        elif method == "lora":                             # on all linears of a block [§3.3: its parameters]
            alpha = 2 * size if args.alpha is None else args.alpha
            settings, words = {"r": size, "alpha": alpha, "targets": self.targets}, f"rank {size}"
        elif method == "prefix":
            settings = {"n": size}
        elif method == "prompt":
            settings = {"lengths": [size]}
        else:
            settings = {"lengths": list(size), "layers": args.layers, "scores": args.scores}
        trained = METHODS[method].rates is not None
        loss = f", {args.loss}" if trained and args.loss != "text" else ""
        label = f"{method}, {words}{loss}" + (f": {part}" if part else "")
        seeds = range(args.seed, args.seed + args.seeds) if trained else [None]        # nothing is random
        return Entry(label, [Spec(compression, method, settings, seed) for seed in seeds], part)

    def columns(self):
        """Positions that the longest prompt of any table takes: every row of all has equal room."""
        return max(2 * sum(self.sizes.idp), 2 * max(self.sizes.prompts), max(self.sizes.prefixes))


# --- 3. Tables and figures ----------------------------------------------------------------------------------

def remedies(plan, compressor):
    """[Tab. 1] [Tab. 2] Every remedy at its three sizes, and IDP. EoRA is ours, at LoRA's ranks."""
    compression, sizes = plan.compression(compressor), plan.sizes
    kinds = {"lora": sizes.ranks, "eora": sizes.ranks, "prompt": sizes.prompts, "prefix": sizes.prefixes,
             "idp": [sizes.idp]}
    rows = [plan.remedy(compression, method, size) for method, some in kinds.items() for size in some]
    return plan.frame(compression) + rows


def two_prompts(plan):
    """[Tab. 3] IDP's two prompts, each alone, in a row, and chosen from."""
    compression, pair = plan.compression("gptq"), plan.sizes.idp
    rows = [plan.remedy(compression, "idp", pair, part) for part in part_names(pair)]
    return plan.frame(compression) + rows


def compressions(plan):
    """[Fig. 2] How far one can compress."""
    some = [(name, {"bits": bits}) for name in ("rtn", "gptq") for bits in (8, 4, 3, 2)]
    shares = (0.3, 0.4, 0.5, 0.6, 0.7)
    some += [(name, {"sparsity": share}) for name in ("magnitude", "sparsegpt") for share in shares]
    some = [own_settings(plan.args, name, **settings) for name, settings in some]
    return [Entry("dense", [Spec()])] + [Entry(describe(*one), [Spec(one)]) for one in some]


def lengths(plan):
    """[Fig. 3] One prompt, from half the shortest to twice the longest of the tables."""
    compression, sizes = plan.compression("gptq"), plan.sizes.prompts
    some = [n for n in (sizes[0] // 2, *sizes, 2 * sizes[-1]) if n]
    return plan.frame(compression) + [plan.remedy(compression, "prompt", n) for n in some]


def largest(plan):
    """[Fig. 5] [Fig. 6] Each remedy at the largest size of the tables. NOT IN PAPER: at which size."""
    compression, sizes = plan.compression("gptq"), plan.sizes
    some = (("lora", sizes.ranks[-1]), ("prompt", sizes.prompts[-1]), ("prefix", sizes.prefixes[-1]),
            ("idp", sizes.idp))
    return plan.frame(compression) + [plan.remedy(compression, method, size) for method, size in some]


def average_sizes(plan):
    """[Fig. 7] IDP over the average size of its prompts, and the same prompts without a choice."""
    compression, entries = plan.compression("gptq"), []
    for factor in (0.25, 0.5, 1, 2):
        pair = tuple(max(1, int(factor * n)) for n in plan.sizes.idp)
        entries += [plan.remedy(compression, "idp", pair, part) for part in part_names(pair)]
    return plan.frame(compression) + entries


PLANS = {"table1": lambda plan: remedies(plan, "gptq"), "table2": lambda plan: remedies(plan, "sparsegpt"),
         "table3": two_prompts, "fig2": compressions, "fig3": lengths, "fig5": largest, "fig6": largest,
         "fig7": average_sizes}
USED = {"table2": ("sparsegpt",), "fig2": ("rtn", "gptq", "magnitude", "sparsegpt")}           # others: gptq
