"""Recipes: what a result was made of. Adapters, checkpoints, results and --resume compare them alike.

    recipe = recipe_of(model)                              # base model, compression, a digest of the weights
    difference(then, now)                                  # None, or in words what is not the same
"""
import hashlib
import json

import torch

from support.cli import UserError, say

SAMPLES = 64                                       # numbers read of each weight: compression moves nearly all


def digest(data):
    """16 hexadecimal digits that tell two things apart. data: what JSON can hold, or a tensor on the CPU."""
    if isinstance(data, torch.Tensor):
        raw = data.contiguous().view(torch.uint8).numpy().tobytes()
    else:
        raw = json.dumps(data).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


@torch.no_grad()
def weights_digest(model):
    """A digest of SAMPLES evenly spaced numbers of every parameter. As bfloat16: other dtypes agree."""
    parts = []
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)
        parts.append(flat[::max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.bfloat16))
    return digest(torch.cat(parts).view(torch.int16).cpu())


def compression_of(model):
    """What was done to a model, without what it led to. -> dict, {} for a dense one."""
    report = getattr(model, "compression", {})
    if not report:
        return {}
    calibration = report.get("calibration", {})
    kept = {key: calibration[key] for key in ("nsamples", "seqlen", "text", "seed") if key in calibration}
    return {"compressor": report["compressor"], "settings": report["settings"], "calibration": kept}


def recipe_of(model):
    """-> {"base_model", "compression", "weights"}."""
    base = getattr(model, "compression", {}).get("base_model", model.config.name_or_path)
    return {"base_model": base, "compression": compression_of(model), "weights": weights_digest(model)}


def difference(then, now):
    """The first thing in which two recipes (nested dicts) differ, in words, or None."""
    then, now = json.loads(json.dumps(then)), json.loads(json.dumps(now))  # as on disk: lists, not tuples
    for key in dict.fromkeys([*then, *now]):
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = difference(a, b)
            if inner:
                return f"{key} {inner}" if key == "calibration" else inner
        elif a != b:
            return f"{key} was {json.dumps(a)}, now {json.dumps(b)}"
    return None


def in_words(recipe):
    """'toy, rtn {"bits": 2}' or 'toy, dense'."""
    how = recipe["compression"]
    compressed = how and f"{how['compressor']} {json.dumps(how['settings'])}"
    return f"{recipe['base_model']}, {compressed or 'dense'}"


def check_recipe(then, model, where):
    """Refuse an adapter that was trained on other weights. then: its recipe; where: flag and folder.

    The same recipe need not give the same bits on another machine: that is said, and goes on.
    """
    now = recipe_of(model)
    if then["weights"] == now["weights"]:
        return
    if (then["base_model"], then["compression"]) != (now["base_model"], now["compression"]):
        raise UserError(f"{where}: was trained on {in_words(then)}, and this model is {in_words(now)}; "
                        "use it where it was trained")
    say("note", f"{where}: the model was made by the same recipe, but its weights are not the same bit for "
                "bit (another machine, version or number of threads)")
