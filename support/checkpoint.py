"""Checkpoints: a training that was cut off goes on, bit for bit.

    saved = Checkpoint(out, "lora", recipe)                # out: as support.output.claim gives it
    saved.save(method, optimizer, step, loss)              # whole or not at all
    step, loss = saved.restore(method, optimizer)          # refused when the recipe is another
"""
import json

import torch

from support.cli import Kept, UserError
from support.files import Tensors, number, or_null, parse_json, whole_number
from support.recipe import difference

MOMENTS = ("exp_avg", "exp_avg_sq")                        # Adam's, under torch's names


@torch.no_grad()
def put_back(method, tensors):
    """Write saved values into the trainables. tensors: {name: tensor}, of the trainables' own shapes."""
    for name, tensor in method.tensors().items():
        tensor.copy_(tensors[name])


class Checkpoint:
    """A training state on disk: trainables, Adam's moments, step, last loss, and the recipe of it all."""

    def __init__(self, out, name, recipe):
        self.out, self.name, self.recipe = out, f"checkpoint-{name}.safetensors", recipe

    def save(self, method, optimizer, step, loss):
        """Write the state after `step` steps, whole or not at all."""
        state = {name: t.detach().contiguous() for name, t in method.tensors().items()}
        for name, tensor in method.tensors().items():
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = optimizer.state[tensor][moment]
        training = {"step": step, "loss": loss, "recipe": self.recipe}
        self.out.tensors(self.name, state, {"training": json.dumps(training)})
        Kept.words = (f"{self.out.path} holds a checkpoint of step {step}; go on with the same command and "
                      "--resume")

    def restore(self, method, optimizer):
        """-> (the step to go on from, the last loss read); (0, None) without one. Raises UserError."""
        path = self.out.path / self.name
        if not path.exists():
            return 0, None
        with Tensors(path, "--resume") as file:
            training = parse_json(file.metadata.get("training", ""), path, "--resume")
            changed = difference(training.within("recipe").obj, self.recipe)
            if changed:
                raise UserError(f"--resume: the run in {self.out.path} is another one: {changed}; use the "
                                "same flags, or a new --out")
            prefixes = ("", *(f"{moment}." for moment in MOMENTS))
            shapes = {f"{x}{name}": t.shape for name, t in method.tensors().items() for x in prefixes}
            state = {name: file.read(name, shape) for name, shape in shapes.items()}
            file.exactly(state)
        step, loss = training("step", whole_number(1, 10**9)), training("loss", or_null(number(0, 1e9)))
        put_back(method, state)
        for name, tensor in method.tensors().items():
            moments = {moment: state[f"{moment}.{name}"].to(tensor.device) for moment in MOMENTS}
            optimizer.state[tensor] = {"step": torch.tensor(float(step)), **moments}
        return step, loss
