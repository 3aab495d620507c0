"""Registry: every compressor and every remedy, a row each. A row says all that is particular to it.

EXERCISE: add a compressor. One file with a function W (, H) -> Q, one row in COMPRESSORS, graded by
tests/test_compress.py.
EXERCISE: add a remedy. One file with a class and how its folder is read, one row in METHODS, graded by
tests/test_methods.py, tests/test_adapters.py and tests/test_recover.py.
"""
import collections
import functools

from methods.eora import EoRA
from methods.gptq import gptq, sparsegpt
from methods.lora import LoRA, read_lora
from methods.prompts import Prefix, SoftPrompts, read_idp, read_prefix, read_prompt
from methods.pruning import magnitude
from methods.rounding import rtn
from support.adapters import check_base, find_adapter, read_config
from support.cli import UserError

# function (W, H if takes_H, **settings, details=) -> Q; settings: flags, under the names of its arguments.
Compressor = collections.namedtuple("Compressor", "function takes_H settings")

QUANT, SPARSE = ("bits", "group_size", "sym", "mse"), ("sparsity", "pattern")

COMPRESSORS = {
    "rtn": Compressor(rtn, False, QUANT),
    "gptq": Compressor(gptq, True, QUANT + ("act_order", "static_groups", "percdamp")),
    "magnitude": Compressor(magnitude, False, SPARSE),
    "sparsegpt": Compressor(sparsegpt, True, SPARSE + ("percdamp",)),
    "sparsegpt_gptq": Compressor(functools.partial(sparsegpt, bits=3), True, SPARSE + QUANT + ("percdamp",)),
}


# --- Remedies ---------------------------------------------------------------------------------------------
# build(model, **settings(args), seed=seed) gives an object with this interface:
#     groups()         lists of trainables, each list clipped by its own norm
#     losses(ids, teacher=None)  (B, T) -> (B,), one mean loss a row; teacher: the dense model, or None
#     training(), inference()    context managers under which the model is trained or used
#     tensors()        {name: trainable}, what a checkpoint holds
#     parts()          optional: {row: method} of what it is compared with, measured before it
#     observe(path, W, Q, H)     of a method whose rates are None: called for each layer that is compressed
#     save(folder)     the adapter's folder, by support.adapters.write_peft
# flags: {name in support.cli.FLAGS: the constructor's argument, or None}. rates: its peak learning rate, on
# the toy model and on others; None: nothing is trained, and it is built before the model is compressed, to
# observe that. sizes: (flag, values) by which experiments make it larger, or None. peft_type: what its
# folder's config says. read: (model, that config's Fields, folder) -> an object.
class Method(collections.namedtuple("Method", "build flags rates sizes peft_type read")):
    """A remedy's row."""

    def settings(self, args):
        """The constructor's arguments, as the flags say."""
        return {argument: getattr(args, flag) for flag, argument in self.flags.items() if argument}


# NOT IN PAPER: the peak learning rates. Within 1 % of the lowest perplexity of `experiments.sweep rates`, one
# grid for all: on the toy, and on SmolLM2 at 3 bits (results/; idp as prompt). For a model of another size
# they are a start: sweep yours.
PROMPT_RATES = {"toy": 1e-1, "other": 3e-2}
LORA_RATES = {"toy": 1e-2, "other": 1e-2}


METHODS = {
    "prompt": Method(SoftPrompts, {"prompt_length": "lengths"}, PROMPT_RATES,
                     ("prompt_length", (1, 4, 16, 64)), "PROMPT_TUNING", read_prompt),
    "prefix": Method(Prefix, {"prompt_length": "n"}, PROMPT_RATES,
                     ("prompt_length", (1, 4, 16, 64)), "PREFIX_TUNING", read_prefix),
    "idp": Method(SoftPrompts, {"prompt_lengths": "lengths", "selector": "selector", "layers": "layers",
                                "scores": "scores"}, PROMPT_RATES,
                  ("prompt_lengths", ([1, 2], [4, 8], [16, 32])), "IDP", read_idp),
    "lora": Method(LoRA, {"rank": "r", "alpha": "alpha", "targets": "targets", "merge": None}, LORA_RATES,
                   ("rank", (1, 2, 4, 8, 16)), "LORA", read_lora),
    "eora": Method(EoRA, {"rank": "r", "targets": "targets", "merge": None}, None, None, "LORA", read_lora),
}


def load_adapter(model, folder):
    """An adapter's folder, ours or PEFT's. -> a method, as METHODS builds it. Raises UserError."""
    folder = find_adapter(folder)
    config, kind = read_config(folder)
    readers = {row.peft_type: row.read for row in METHODS.values()}
    if kind not in readers:
        raise UserError(f"{config.where}: peft_type {kind[:40]} is not supported; it must be one of: "
                        + " ".join(readers))
    check_base(model, folder, config)
    return readers[kind](model, config, folder)
