"""Recipes: what tells two results apart, and what does not."""
import pytest
import torch

from conftest import tiny_model
from support import recipe
from support.cli import UserError


def test_digests():
    assert recipe.digest([{"context": "a"}]) == recipe.digest([{"context": "a"}]) != recipe.digest([{"context": "b"}])
    assert recipe.digest([]) == "4f53cda18c2baa0c", "the start of sha256 of '[]'"
    assert recipe.digest(torch.arange(4)) != recipe.digest(torch.arange(5))


def test_the_weights_digest_sees_weights_and_not_their_dtype():
    model = tiny_model("llama")
    before = recipe.weights_digest(model)
    assert recipe.weights_digest(tiny_model("llama")) == before != recipe.weights_digest(tiny_model("llama", seed=1))
    assert recipe.weights_digest(model.to(torch.bfloat16)) == before
    model.model.layers[1].mlp.up_proj.weight.data.neg_()
    assert recipe.weights_digest(model) != before


def test_differences_are_named():
    then = {"lr": 0.1, "settings": {"r": 8}, "list": (1, 2), "compression": {"calibration": {"seed": 0}}}
    assert recipe.difference(then, {**then, "list": [1, 2]}) is None
    assert recipe.difference(then, {**then, "lr": 0.2}) == "lr was 0.1, now 0.2"
    assert recipe.difference(then, {**then, "settings": {"r": 4}}) == "r was 8, now 4"
    assert recipe.difference(then, {**then, "more": 1}) == "more was null, now 1"
    assert "calibration seed" in recipe.difference(then, {**then, "compression": {"calibration": {"seed": 1}}})


def test_an_adapter_is_used_where_it_was_trained(capsys):
    model = tiny_model("llama")
    report = {"compressor": "rtn", "settings": {"bits": 3}, "base_model": "toy", "calibration": {"seed": 0}}
    model.compression = report
    then = recipe.recipe_of(model)
    recipe.check_recipe(then, model, "--adapter a")
    model.model.norm.weight.data.mul_(2)                   # another machine rounds another way: said, and goes on
    recipe.check_recipe(then, model, "--adapter a")
    assert "not the same bit for bit" in capsys.readouterr().err
    for change in ({"settings": {"bits": 4}}, {"base_model": "other"}, {"compressor": "gptq"}, {"calibration": {"seed": 1}}):
        model.compression = {**report, **change}
        with pytest.raises(UserError, match="--adapter a: was trained on toy, rtn"):
            recipe.check_recipe(then, model, "--adapter a")
    model.compression = {}
    with pytest.raises(UserError, match="dense"):
        recipe.check_recipe(then, model, "--adapter a")
