"""Pictures: figures of the toy for a lecture, each from a run of its own.

    python -m experiments.pictures squares                 # one; printed: the first question, and six answers
    python -m experiments.pictures all --out runs/pictures # all that need no file; minutes
    python -m experiments.pictures table1 --from runs/paper/table1.json    # of experiments.reproduce
    python -m experiments.pictures latency --from runs/latency/latency.json

    squares    which of forty questions do the dense, the compressed and four recovered models answer?
    grids      where may the weights of one group lie, after three ways to fit a 3-bit grid?
    errors     how wrong is each layer's output at 3 bits, rounded and by GPTQ?
    attention  one layer's attention logits of one input to two prompts: score, choose, mask [Fig. 4]
    choices    which of two prompts do the questions of each domain choose, layer by layer?
    training   how do recall and loss come back, step by step?
    dataflow   IDP in one drawing, without data
    table1     a table of experiments.reproduce, as dots with 95 % intervals
    latency    time by that of one cached prompt

The toy is compressed and each remedy trained once, as recover.py does by default; all pictures share them.
"""
import contextlib
import functools

import torch

import compress
import evaluate
import recover
from experiments import pictures_draw as draw
from experiments import pictures_idp as idp
from methods.registry import METHODS
from methods.rounding import rtn
from support.architectures import blocks_of, linears_of, weight_of
from support.cli import UserError, parse_flags, refuse_given, run, say
from support.files import OBJECT, list_of, read_fields
from support.models import load_model
from support.output import claim
from support.progress import progress
from support.tables import markdown

EVERY, SHOWN = 25, 40          # steps between two points of a curve; questions in `squares`
REMEDIES = ("prompt", "prefix", "idp", "lora")
MODELS = ("dense", "compressed", *REMEDIES)


# --- 1. The toy, compressed and recovered once --------------------------------------------------------------

class Snapshots:
    """A Checkpoint in memory, one for every time that recover.train saves: {step: the trainables}."""

    def __init__(self, method):
        self.states = {0: recover.snapshot(method)}

    def save(self, method, optimizer, step, loss):
        """Keep the state after `step` steps."""
        self.states[step] = recover.snapshot(method)


class Toy(recover.Run):
    """The main job's models, each made when a picture first asks for it. Scores are of the first --limit
    questions of each task and chunks of text."""

    def __init__(self, args):
        flags = ["--device", "cpu", "--method", ",".join(REMEDIES), "--tasks", "toy_recall,toy_shown"]
        for name in ("seed", "steps", "limit"):
            flags += [f"--{name}", str(getattr(args, name))]
        super().__init__(recover.parse(flags))
        self.seen, self.trained = {}, {}

    def measure(self, name, weight_bytes, method=None, **extra):
        """What compress() calls before it compresses: the answers of the dense model."""
        self.seen[name] = self.scores()

    def scores(self, method=None):
        """-> {"toy_recall", "toy_shown": of evaluate.multiple_choice, "loss": nats per held-out token}."""
        args = self.args
        with method.inference() if method else contextlib.nullcontext():
            found = {task: evaluate.multiple_choice(self.model, self.tokenizer, rows)
                     for task, rows in self.tasks.items()}
            losses = evaluate.chunk_losses(self.model, self.eval_ids, args.eval_seqlen,
                                           limit=args.eval_chunks, context=args.eval_context)
        return {**found, "loss": losses.mean().item()}

    def ready(self):
        """Compress, once: from here on the model is the compressed one."""
        if "compressed" not in self.seen:
            self.measure("compressed", self.compress()["weight_bytes"])

    def method(self, name):
        """A remedy in its last state; trained when first asked for."""
        if name not in self.trained:
            self.ready()
            args, entry = self.args, METHODS[name]
            method = entry.build(self.model, **entry.settings(args), seed=args.seed)
            kept = Snapshots(method)
            recover.train(method, self.train_ids, args.steps, args.batch_size, args.train_seqlen,
                          entry.rates["toy"], args.seed, saved=kept, save_every=EVERY)
            self.trained[name] = method, kept.states
        method, states = self.trained[name]
        recover.put_back(method, states[self.args.steps])
        return method

    def at(self, name, step=None):
        """Scores of one of MODELS; step: of a remedy after so many steps, all when None."""
        if name in REMEDIES:
            method, (_, states) = self.method(name), self.trained[name]
            step = self.args.steps if step is None else step
            if (name, step) not in self.seen:
                recover.put_back(method, states[step])
                self.seen[name, step] = self.scores(method)
            return self.seen[name, step]
        self.ready()
        return self.seen[name]

    def calibration(self):
        """The chunks that the main job calibrates on. -> (nsamples, seqlen) long."""
        args = self.args
        return compress.calibration_ids(self.train_ids, args.nsamples, args.seqlen, args.seed)


# --- 2. Pictures: numbers, the figure, and words to print ---------------------------------------------------

def squares(toy):
    """Forty questions about people whose facts recovery never shows, and six models."""
    rows = toy.tasks["toy_recall"]
    scores = {name: toy.at(name)["toy_recall"] for name in MODELS}
    right = {name: score["correct"] for name, score in scores.items()}
    first = first_question(rows, right)
    order = [first, *(i for i in range(len(rows)) if i != first)][:SHOWN]
    said = {name: rows[first]["choices"][best(score["logp"][first])] for name, score in scores.items()}
    person = rows[first]["id"].split("/")[0]
    question = rows[first]["context"].removeprefix("Question: ").removesuffix(" Answer:")
    mark = {name: "" if right[name][first] else "  (wrong)" for name in MODELS}
    lines = [question, *(f"{name:>12}: {answer}{mark[name]}" for name, answer in said.items())]
    shown = {name: [right[name][i] for i in order] for name in MODELS}
    lines += ["", f"Right, of {len(order)} questions (the first is that of {person}): "
              + ", ".join(f"{name} {sum(values)}" for name, values in shown.items())]
    return draw.squares(shown, question), "\n".join(lines)


def best(logp):
    """The choice with the largest log p."""
    return max(range(len(logp)), key=logp.__getitem__)


def first_question(rows, right):
    """The first question for a birthplace that the dense model answers, the compressed one does not, and
    LoRA does again; where there is none, the first question of all."""
    fits = lambda i: (rows[i]["id"].endswith("/town") and right["dense"][i] and not right["compressed"][i]
                      and right["lora"][i])
    return next(filter(fits, range(len(rows))), 0)


LAYER, GROUP = "mlp.down_proj", 3                          # of the first block; the last of its four groups


def grids(toy):
    """One group of weights and three 3-bit grids. The row: where clipping narrows the grid most."""
    model, _ = load_model("toy")
    block = blocks_of(model)[0]
    inputs = compress.first_block_inputs(model, toy.calibration(), model.device)
    H = compress.hessians(block, *inputs)[LAYER]                                               # (in, in)
    W, found = weight_of(linears_of(block)[LAYER]), {}                                         # (out, in)
    for name, function in (("RTN, min to max", rtn),
                           ("RTN, least squared error", functools.partial(rtn, mse=True)),
                           ("GPTQ", functools.partial(compress.gptq, H=H))):
        details = {}
        function(W, bits=3, group_size=64, details=details)
        found[name] = details["grid"]
    scales = [grid.scale[:, GROUP].float() for grid in found.values()]                         # 3 x (out,)
    row = (scales[1] / scales[0]).argmin().item()
    several = {name: points_of(grid, row) for name, grid in found.items()}
    title = f"The 64 weights of one group: block 1, {LAYER}, row {row + 1}, group {GROUP + 1}"
    lines = [f"{name}: " + " ".join(f"{point:.3f}" for point in points)
             for name, (points, _) in several.items()]
    weights = W[row, 64 * GROUP:64 * (GROUP + 1)].tolist()
    return draw.grids(weights, several, title), "\n".join([title, *lines])


def points_of(grid, row):
    """The points of a row's grid in GROUP, and how many weights went to each. -> two lists of 2^bits."""
    scale, zero = grid.scale[row, GROUP].item(), grid.zero[row, GROUP].item()
    codes = grid.code[row, 64 * GROUP:64 * (GROUP + 1)].tolist()
    every = range(2 ** grid.bits)
    return [scale * (code - zero) for code in every], [codes.count(code) for code in every]


def errors(toy):
    """Relative output error of every linear layer at 3 bits, rounded and by GPTQ."""
    found, means = {}, []
    for name in ("rtn", "gptq"):
        model, tokenizer = load_model("toy")
        report = compress.compress_model(model, tokenizer, name, toy.calibration(), bits=3)
        found[name] = {path: row["error"] for path, row in report["layers"].items()}
        means.append(f"{name} {report['mean_error']:.3f}")
    return draw.errors(found), "Relative output error at 3 bits, mean over weights: " + ", ".join(means)


def training(toy):
    """Recall of held-out and shown facts, and loss, while the remedies are trained."""
    steps = [*range(0, toy.args.steps, EVERY), toy.args.steps]
    curves = {name: [toy.at(name, step) for step in progress(steps, desc=f"{name}, curve")]
              for name in REMEDIES}
    levels = {name: toy.at(name) for name in ("dense", "compressed")}
    panels = {"recall of held-out facts, %": lambda score: 100 * score["toy_recall"]["acc"],
              "recall of shown facts, %": lambda score: 100 * score["toy_shown"]["acc"],
              "loss on held-out facts, nats": lambda score: score["loss"]}
    rows = [[name, *(f"{value(score):.2f}" for value in panels.values())] for name, score in
            (*levels.items(), *((name, curve[-1]) for name, curve in curves.items()))]
    n = f"n = {len(toy.tasks['toy_recall'])} questions each"
    return (draw.training(steps, curves, levels, panels, n),
            f"After {steps[-1]} steps ({n}):\n\n" + markdown(["model", *panels], rows))


def table1(args):
    """A table of experiments.reproduce as dots."""
    rows = read_fields(args.source, "--from")("rows", list_of(OBJECT))
    try:
        panels = {column: {row["row"]: in_percent(row["columns"][column]) for row in rows}
                  for column in rows[0]["columns"]}
        if not panels:
            raise LookupError("no column")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"--from {args.source}: is no table of experiments.reproduce; give its "
                        "OUT/table1.json") from None
    return draw.dots(panels), f"{len(rows)} rows, {len(panels)} columns"


def in_percent(cell):
    """{"mean", "ci95"} of a share -> value, [low, high] in percent."""
    low, high = cell["ci95"]
    return 100 * cell["mean"], [100 * low, 100 * high]


def latency(args):
    """Bars of experiments.latency."""
    times = read_fields(args.source, "--from")("times", OBJECT)
    known = [isinstance(seen, dict) and "prompt as cached prefix" in seen and all(
        isinstance(one, dict) and one.get("prefill") and one.get("decode") for one in seen.values())
        for seen in times.values()]
    if not known or not all(known):
        raise UserError(f"--from {args.source}: holds no times of experiments.latency; give its "
                        "OUT/latency.json")
    return draw.latency(times), "Times by that of one cached prompt: " + ", ".join(f"T = {T}" for T in times)


# name -> what it draws from: the toy, a file or nothing; the function; its file
PICTURES = {
    "squares": ("toy", squares), "grids": ("toy", grids), "errors": ("toy", errors),
    "attention": ("toy", idp.attention), "choices": ("toy", idp.choices), "training": ("toy", training),
    "dataflow": (None, idp.dataflow), "table1": ("file", table1), "latency": ("file", latency)}


# --- 3. The command -----------------------------------------------------------------------------------------

def add_own(parser):
    """The name of a picture, and the one flag that only this script has."""
    parser.add_argument("name", choices=[*PICTURES, "all"], help="which picture; all that need no file")
    parser.add_argument("--from", dest="source", metavar="FILE", help="table1.json or latency.json")


def parse(argv=None):
    """The command line. -> argparse.Namespace; raises UserError for what cannot work."""
    args = parse_flags(__doc__, ["seed", "steps", "limit", "out"], argv, defaults={"limit": 200}, add=add_own)
    whole = [name for name, (needs, _) in PICTURES.items() if needs != "file"]
    args.names = whole if args.name == "all" else [args.name]
    needs = {PICTURES[name][0] for name in args.names}
    if "toy" not in needs:
        refuse_given(args, ("seed", "steps", "limit"), f"{args.name} measures nothing; leave it out")
    if args.source is not None and "file" not in needs:
        raise UserError(f"--from {args.source}: {args.name} is drawn from no file; leave it out")
    if args.source is None and "file" in needs:
        raise UserError(f"--from: missing; {args.name} is drawn from a file, for example "
                        f"runs/x/{args.name}.json")
    args.out = args.out or f"runs/picture{'s' if args.name == 'all' else '-' + args.name}"
    return args


def main(argv=None):
    """Each picture: its words on stdout, its file into --out."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    with claim(args.out) as out:
        toy = Toy(args) if any(PICTURES[name][0] == "toy" for name in args.names) else None
        for name in args.names:
            needs, function = PICTURES[name]
            fig, words = function(toy if needs == "toy" else args)
            file = "idp.png" if name == "dataflow" else f"picture-{name}.png"
            out.figure(file, fig)
            print(f"{words}\n", flush=True)
            say(name, f"wrote {args.out}/{file}")


if __name__ == "__main__":
    run(main)
