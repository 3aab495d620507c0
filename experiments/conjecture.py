"""Forgotten or displaced? The experiment that the paper lacked, and it may come out either way.

Paper: "Do Compressed LLMs Forget Knowledge?", arXiv 2310.00867. H0: compression erases knowledge. H1: it
displaces it: the knowledge is there and is only not found, so a remedy that is trained on other facts should
bring it back. The paper's evidence is accuracy, and the cosines of Fig. 6. Here each fact is followed,
in worlds of which every fact is known:

    python -m experiments.conjecture planted --out runs/conjecture    # is the instrument true?
    python -m experiments.conjecture dials --out runs/conjecture      # load x damage x remedy
    python -m experiments.conjecture all --quick --out runs/quick     # both, small: minutes on 2 cores

Known people are halved, anew by each seed. Recovery text, and the text by which compression is calibrated,
state the facts of one half only, the *shown*. The other half is *held out*: no text after compression says a
word about it. A fact is *known* if the dense model answers its question rightly, *lost* if it is known and
the damaged model does not. If a remedy makes a lost held-out fact right again, it was in the model all along:
displaced. If it does not, either the fact is gone or this remedy cannot find it; what a remedy finds of what
is certainly there, `planted` measures.

A row (one model, one remedy, one seed: the rank of the truth for every question) is written to rows/ of
--out as soon as it is measured, and the same command goes on where it was cut off; with --shard i/n several
fill one --out. Worlds of other loads than toy_model/ are trained once, into worlds/ of --out.
Dials: experiments/conjecture_plan.py; numbers, verdicts, tables: experiments/conjecture_numbers.py.
"""
import collections
import functools
import time

import torch

import compress
import evaluate
import recover
from experiments import conjecture_plan
from experiments.conjecture_figures import figures
from experiments.conjecture_numbers import Cell, outcome, report, summary
from experiments.conjecture_plan import LOADS, QUICK, REMEDIES, Spec, compressions, damage_name, is_planted
from experiments.conjecture_world import TRIGGER, damaged, load_world, plant, split, train_world
from experiments.sweep import RowStore, check_shard, claim_rows, of_shard
from methods.lora import last_name, linears_in_blocks
from methods.registry import METHODS
from support.architectures import device_name, versions
from support.cli import UserError, parse_flags, refuse_given, run, say
from support.recipe import digest
from support.toy_world import PEOPLE


# --- 1. Rows ------------------------------------------------------------------------------------------------

def hexadecimal(ranks):
    """Ranks 0 to 15 as text, a digit a fact: rows stay small."""
    return "".join(f"{rank:x}" for rank in ranks.tolist())


def from_hexadecimal(text):
    """The other way. -> list of int."""
    return [int(digit, 16) for digit in text]


class Conjecture:
    """Worlds, the rows that were asked for, and the store that keeps them."""

    def __init__(self, args, out):
        self.args, self.out, self.store, self.computed = args, out, RowStore(out), {}
        self.names = ["planted", "dials"] if args.name == "all" else [args.name]
        self.plans = {name: conjecture_plan.plan(args, name) for name in self.names}
        loads = dict.fromkeys(spec.load for specs in self.plans.values() for spec in specs)
        self.worlds = {load: self.world(load) for load in loads}
        self.ids = functools.lru_cache(maxsize=None)(lambda load, *text: self.worlds[load].ids(*text))
        self.teacher = functools.lru_cache(maxsize=None)(lambda load: self.worlds[load].copy())

    def world(self, load):
        """The world of a load; one that --out does not hold yet is trained."""
        if load == PEOPLE:
            return load_world("toy", load)
        folder = self.out.path / f"worlds/{load}"
        if not folder.exists():
            say("world", f"training the model of {load} people per domain; minutes")
            train_world(load, self.out)
        world = load_world(str(folder), load)
        self.store.put("world", {"load": load}, {"weights": world.digest})  # now --out is known as ours
        return world

    def recipe(self, spec):
        """Everything that decides a row, and nothing else."""
        args, recipe = self.args, {"weights": self.worlds[spec.load].digest, "damage": spec.damage}
        if spec.damage or spec.remedy:
            recipe["seed"] = spec.seed
        if spec.damage and not is_planted(spec.damage):
            calibration = digest(self.ids(spec.load, "facts", spec.seed))
            recipe.update(nsamples=args.nsamples, seqlen=args.seqlen, calibration=calibration)
        if spec.remedy == "trigger":
            recipe["trigger"] = TRIGGER
        elif spec.remedy:
            text = digest(self.ids(spec.load, spec.text, spec.seed))
            recipe.update(remedy=REMEDIES[spec.remedy], steps=args.steps, batch_size=args.batch_size,
                          train_seqlen=args.train_seqlen, text=text)
        return recipe

    def row(self, spec):
        """A row that is there, or None."""
        return self.store.get("ranks", self.recipe(spec))

    def missing(self):
        """Groups of specs of one load, damage and seed, of this shard, each with a row that is not there."""
        groups = collections.defaultdict(list)
        for spec in (spec for specs in self.plans.values() for spec in specs):
            groups[digest(spec[:3])].append(spec)
        some = of_shard(list(groups.values()), self.args)
        return [group for group in some if any(self.row(spec) is None for spec in group)]

    def measure_all(self):
        """Every missing row: damage once, then one remedy after the other."""
        groups = self.missing()
        for number, group in enumerate(groups, 1):
            (load, damage, seed), start = group[0][:3], time.time()
            self.set_weights(load, damage, seed)
            for spec in group:
                if self.row(spec) is None:
                    self.store.put("ranks", self.recipe(spec), self.measure(spec))
            say("rows", f"{number} of {len(groups)}: {load} people, {damage_name(damage)}, seed {seed}, "
                        f"{time.time() - start:.0f} s")

    def set_weights(self, load, damage, seed):
        """The dense model of a load; then compress it, or plant damage in it. In place."""
        world, args = self.worlds[load], self.args
        world.restore()
        if is_planted(damage):
            plant(world, seed=seed, **damage[1])
        elif damage:
            name, settings = damage
            ids = compress.calibration_ids(self.ids(load, "facts", seed), args.nsamples, args.seqlen, seed)
            self.computed = {name: build(world.model, remedy, seed) for name, remedy in REMEDIES.items()
                             if name in args.remedies and remedy.rate is None}
            compress.compress_model(world.model, world.tokenizer, name, ids, codes=False,
                                    observe=self.observe, **settings)

    def observe(self, *layer):
        """Show a layer that was just compressed to every remedy that is computed from it."""
        for method in self.computed.values():
            method.observe(*layer)

    def measure(self, spec):
        """Train what is to be trained and ask every question. -> a row."""
        world, args, start = self.worlds[spec.load], self.args, time.time()
        if spec.remedy is None:
            return {"ranks": hexadecimal(world.ranks())}
        if spec.remedy == "trigger":
            return {"ranks": hexadecimal(world.ranks(trigger=True))}
        method, remedy = self.computed.get(spec.remedy), REMEDIES[spec.remedy]
        if method is None:
            method = build(world.model, remedy, spec.seed)
            recover.train(method, self.ids(spec.load, spec.text, spec.seed), args.steps, args.batch_size,
                          args.train_seqlen, remedy.rate, spec.seed, quiet=True,
                          teacher=self.teacher(spec.load) if remedy.distilled else None)
        with method.inference():
            found = world.ranks()
        return {"ranks": hexadecimal(found), "numbers": sum(t.numel() for t in method.tensors().values()),
                "seconds": round(time.time() - start, 1)}

    # --- from rows to numbers

    def cells(self, name):
        """Every combination of load, damage, remedy and text, with those of its seeds that are there."""
        groups = collections.defaultdict(list)
        for spec in self.plans[name]:
            if spec.remedy and self.row(spec) and self.row(damaged_spec(spec)) and self.row(dense_spec(spec)):
                groups[digest(spec._replace(seed=None))].append(spec)
        return [Cell(some[0].load, some[0].damage, some[0].remedy, some[0].text,
                     self.row(some[0]).get("numbers"), {spec.seed: self.outcome(spec) for spec in some})
                for some in groups.values()]

    def outcome(self, spec):
        """What one remedy of one seed brought back. -> Outcome."""
        facts = self.worlds[spec.load].facts
        dense, before, after = (from_hexadecimal(self.row(one)["ranks"]) for one in
                                (dense_spec(spec), damaged_spec(spec), spec))
        counted = damaged(facts, spec.damage[1]["share"], spec.seed) if is_planted(spec.damage) else None
        return outcome(facts, split(facts, spec.seed), dense, before, after, counted)


def dense_spec(spec):
    """The dense model of the same load."""
    return Spec(spec.load, None, spec.seed)


def damaged_spec(spec):
    """The same damage without a remedy."""
    return spec._replace(remedy=None, text=None)


def build(model, remedy, seed):
    """A remedy on a model; LoRA on all linear layers of its blocks, alpha 2 r. -> a method."""
    settings = dict(remedy.settings)
    if remedy.method == "lora":
        targets = sorted({last_name(name) for name in linears_in_blocks(model)})
        settings.update(alpha=2 * settings["r"], targets=targets)
    return METHODS[remedy.method].build(model, **settings, seed=seed)


# --- 2. The command -----------------------------------------------------------------------------------------

TAKES = ["seed", "seeds", "steps", "batch_size", "train_seqlen", "nsamples", "seqlen", "loads", "remedies",
         "only", "out", "shard"]
CHOICES = {"remedies": list(REMEDIES)}
DEFAULTS = {"steps": 100, "batch_size": 8, "loads": list(LOADS), "remedies": list(REMEDIES)}


def parse(argv=None):
    """The command line: planted, dials or all, and flags. -> argparse.Namespace; raises UserError."""
    def add(parser):
        """What only this script has."""
        parser.add_argument("name", choices=["planted", "dials", "all"], help="which experiment")
        words = "the smallest that says something"
        parser.add_argument("--quick", action="store_true", default=None, help=words)
    args = parse_flags(__doc__, TAKES, argv, CHOICES, DEFAULTS, add=add)
    args.given.remove("name")
    if args.name == "planted":
        refuse_given(args, ["loads", "only"], "planted takes no such flag; leave it out")
        if not set(args.remedies) & set(conjecture_plan.PLANTED):
            raise UserError(f"--remedies {','.join(args.remedies)}: planted tries only "
                            f"{', '.join(conjecture_plan.PLANTED)}; name some of these")
    for name, value in QUICK.items() if args.quick else ():
        if name not in args.given:
            setattr(args, name, value)
    check_shard(args)
    if args.out is None and args.name != "planted" and set(args.loads) != {PEOPLE}:
        raise UserError(f"--loads {','.join(map(str, args.loads))}: other worlds than {PEOPLE} are trained "
                        f"into --out; give --out, or --loads {PEOPLE}")
    compressions(args)
    recover.check_training(range(args.train_seqlen), args.batch_size, args.train_seqlen, 1)
    return args


def main(argv=None):
    """Measure what is missing, then write tables and figures of all rows that are there."""
    args, start = parse(argv), time.time()
    torch.manual_seed(args.seed)
    with claim_rows(args) as out:
        job = Conjecture(args, out)
        job.measure_all()
        for name in job.names:
            cells = job.cells(name)
            text = report(name, cells)
            print(text)
            if out and cells:
                out.text(f"{name}.md", text + "\n")
                out.json(f"{name}.json", {
                    "command": evaluate.command_line(), "settings": vars(args), "versions": versions(),
                    "device": device_name(torch.device("cpu")), "seconds": round(time.time() - start, 1),
                    "loads": {load: world.load for load, world in job.worlds.items()},
                    "cells": summary(cells)})
                for file, figure in figures(name, cells).items():
                    out.figure(file, figure)


if __name__ == "__main__":
    run(main)
