"""The grader of norms_only."""
import torch

import recover
from assignments.grading import check_close, check_tensor, compressed_toy, must, recall, toy_ids
from methods.pruning import magnitude
from support.models import load_model

ASKED, FENCED = ["NormsOnly"], ["methods.norms"]
REACH, STEPS = 69.0, 100                                   # % recall of the pruned toy


def pruned():
    """-> the toy without 60 % of its weights, its tokenizer."""
    model, tokenizer, _ = compressed_toy(lambda W: magnitude(W, 0.6), False)
    return model, tokenizer


def outputs(model):
    """Logits of one fixed row. -> (1, 8, V)."""
    with torch.no_grad():
        return model(torch.arange(20, 28)[None]).logits


def test_which_parameters(submission):
    model, _ = load_model("toy")
    method, wanted = submission.NormsOnly(model), {n: p for n, p in model.named_parameters() if "norm" in n}
    tensors = method.tensors()
    must(sorted(tensors) == sorted(wanted), f"the scales are {sorted(wanted)}; tensors() has {sorted(tensors)}")
    for name, tensor in tensors.items():
        check_tensor(tensor.detach(), wanted[name].shape, name)
        must(torch.equal(tensor, wanted[name]), f"{name} must start as the model's own")
        must(tensor.requires_grad and tensor.is_leaf, f"{name} must be a leaf that requires a gradient")
    flat = [id(t) for group in method.groups() for t in group]
    must(sorted(flat) == sorted(map(id, tensors.values())), "groups() must hold just the tensors of tensors()")


def test_the_model_is_as_before_outside(submission):
    model, _ = load_model("toy")
    method, before = submission.NormsOnly(model), outputs(model)
    with torch.no_grad():
        for tensor in method.tensors().values():
            tensor.mul_(1.5)
    check_close(outputs(model), before, "the model's logits outside inference()", 0)
    with method.inference():
        must(not torch.allclose(outputs(model), before), "within inference() the trained scales are not in place")
    check_close(outputs(model), before, "the model's logits after inference()", 0)
    try:
        with method.training():
            raise KeyError("on purpose")
    except KeyError:
        check_close(outputs(model), before, "the model's logits after an exception in training()", 0)


def test_losses_equal_the_slow_version(submission):
    model, _ = load_model("toy")
    method, ids = submission.NormsOnly(model), torch.arange(20, 44).view(3, 8)
    with torch.no_grad():
        next(iter(method.tensors().values())).mul_(2)
    with method.training():
        losses = method.losses(ids)
        logits = model(ids).logits.log_softmax(-1)         # (3, 8, V)
        right = [-sum(logits[b, t, ids[b, t + 1]] for t in range(7)) / 7 for b in range(3)]
    check_close(losses.detach(), torch.stack(right).detach(), "losses")


def test_training_changes_the_scales_alone(submission):
    model, tokenizer = load_model("toy")
    before = {name: p.clone() for name, p in model.named_parameters()}
    method = submission.NormsOnly(model)
    recover.train(method, toy_ids(tokenizer), 2, 4, 32, 1e-2, quiet=True)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    must(not changed, f"the model itself was changed: {changed[:3]}")
    still = [name for name, t in method.tensors().items() if torch.equal(t, before[name])]
    must(not still, f"after two steps these scales have not moved: {still[:3]}")


def test_the_number(submission, seed, record_property):
    """100 steps on shown people's facts. Control: the same words in random order."""
    model, tokenizer = pruned()
    ids, recalls = toy_ids(tokenizer), []
    for text in (ids, ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]):
        method = submission.NormsOnly(model)
        recover.train(method, text, STEPS, 16, 64, 3e-2, seed, quiet=True)
        with method.inference():
            recalls.append(recall(model, tokenizer))
    record_property("toy_recall %", recalls[0])
    record_property("toy_recall %, shuffled words", recalls[1])
    must(recalls[0] >= REACH, f"toy_recall is {recalls[0]:.1f} %; it must reach {REACH} %")
    must(recalls[1] < REACH, f"trained on shuffled words, recall is {recalls[1]:.1f} %: then the text is not used")
