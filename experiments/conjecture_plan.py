"""Which rows experiments/conjecture.py has, and the sizes and rates of its remedies: data, no work.

A dial is a tuple here, or a flag. Add a compression to DAMAGES, a remedy to REMEDIES: rows that are there
stay.
"""
import collections

from experiments.sweep import describe
from support.cli import UserError
from support.toy_world import PEOPLE

LOADS = (120, 240, 480)                                    # known people per domain; toy_model/ has 240
DAMAGES = ([(name, {"sparsity": share}) for share in (0.5, 0.6, 0.7, 0.8)
            for name in ("magnitude", "sparsegpt")]
           + [(name, {"bits": bits, "group_size": 64}) for bits in (4, 3, 2) for name in ("rtn", "gptq")])
SHARES = (1.0, 0.0, 0.5, 0.25, 0.75)                       # of the people, how many are only displaced
PLANTING = {"steps": 600, "batch_size": 16, "lr": 1.5e-3}  # enough to put others in the place of facts

# method: a row of METHODS; settings: what it is built with; rate: peak learning rate, None of what is
# computed while the model is compressed; distilled: trained on the dense model's distributions, not on tokens
Remedy = collections.namedtuple("Remedy", "method settings rate distilled", defaults=(False,))
REMEDIES = {
    "prompt 16": Remedy("prompt", {"lengths": [16]}, 1e-1),
    "lora 8": Remedy("lora", {"r": 8}, 1e-3),
    "prefix 16": Remedy("prefix", {"n": 16}, 1e-1),
    "idp 8+16": Remedy("idp", {"lengths": [8, 16]}, 1e-1),
    "eora 8": Remedy("eora", {"r": 8}, None),
    "lora 1": Remedy("lora", {"r": 1}, 1e-3),
    "prompt 16 distilled": Remedy("prompt", {"lengths": [16]}, 1e-1, True),
    "lora 8 distilled": Remedy("lora", {"r": 8}, 1e-3, True),
}
CONTROLLED = ("lora 8",)                                   # these are also trained on the control text
PLANTED = ("prompt 16", "prefix 16", "lora 8")             # these are tried on planted damage
# which remedies are tested against each other
PAIRS = (("prompt 16", "lora 8"), ("prompt 16", "prefix 16"), ("prompt 16", "idp 8+16"),
         ("lora 1", "lora 8"), ("eora 8", "lora 8"), ("prompt 16", "prompt 16 distilled"),
         ("lora 8", "lora 8 distilled"))
QUICK = {"loads": [PEOPLE], "only": "uncompressed;magnitude 60;gptq 2", "seeds": 2, "steps": 30,
         "remedies": ["prompt 16", "lora 8"]}
QUICK_SHARES = (1.0, 0.0)

# damage: (compressor, settings), ("planted", {"share", ...}), or None; remedy: of REMEDIES, "trigger", None
Spec = collections.namedtuple("Spec", "load damage seed remedy text", defaults=(None, None))


def is_planted(damage):
    """Is it damage whose truth is known?"""
    return damage is not None and damage[0] == "planted"


def is_evidence(remedy):
    """Does what comes back under it show what the damaged model holds? Not of a remedy that is computed from
    the dense weights, which know all facts; nor of the trigger, which no remedy has.
    """
    return remedy in REMEDIES and REMEDIES[remedy].rate is not None


def damage_name(damage):
    """('gptq', {"bits": 3, ...}) -> 'gptq 3 bits'."""
    if damage is None:
        return "uncompressed"
    if is_planted(damage):
        return f"{100 * damage[1]['share']:.0f} % of the people displaced"
    return describe(*damage).split(",")[0]


def remedies_of(args, damage):
    """[(remedy, text)] of a damage, the damaged model itself first."""
    planted = is_planted(damage)
    names = [name for name in args.remedies if not planted or name in PLANTED]
    names = [name for name in names if damage or REMEDIES[name].rate]      # no error, no remedy of it
    control = [(name, "nobody") for name in names if name in CONTROLLED]
    return [(None, None), *[("trigger", None)] * planted, *((name, "facts") for name in names), *control]


def compressions(args):
    """The dial of damage, from none on: what --only names. Raises UserError when that is nothing."""
    wanted = [""] if args.only is None else args.only.split(";")
    chosen = [damage for damage in (None, *DAMAGES) if any(text in damage_name(damage) for text in wanted)]
    if not chosen:
        raise UserError(f"--only {args.only}: names no row; use for example 'gptq 3;60 %'")
    return chosen


def plan(args, name):
    """Specs of one experiment. A run that is cut off leaves whole seeds of the dials, or whole shares of
    planted damage, both ends first.
    """
    seeds = range(args.seed, args.seed + args.seeds)
    if name == "planted":
        loads, shares = [PEOPLE], QUICK_SHARES if args.quick else SHARES
        cells = [(PEOPLE, ("planted", {"share": share, **PLANTING}), seed)
                 for share in shares for seed in seeds]
    else:
        loads, damages = args.loads, compressions(args)
        cells = [(load, damage, seed) for seed in seeds for damage in damages for load in loads]
    return [Spec(load, None, args.seed) for load in loads] + [
        Spec(*cell, *what) for cell in cells for what in remedies_of(args, cell[1])]
