"""Recompute: gradient checkpointing of a model's blocks, for every method, also behind a cache.

    with checkpointed_blocks(model, True): loss.backward()  # less memory, a forward pass more

transformers has a switch of its own, which drops the cache that holds a prompt, and turns dropout on.
"""
import contextlib

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from methods.losses import NoCache
from support.architectures import blocks_of


@contextlib.contextmanager
def as_it_was(cache, i, held):
    """Layer i of the cache as before its block ran, or running again would append twice; and afterwards.

    Otherwise the cache would keep alive what was recomputed.
    """
    layer = cache.layers[i]
    layer.keys, layer.values = held
    try:
        yield
    finally:
        layer.keys, layer.values = held


def recomputed(forward, i):
    """The forward of block i, to be run again in the backward pass."""
    def run(*args, **kwargs):
        """The block's own arguments and result."""
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if cache is None or isinstance(cache, NoCache):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        empty = (torch.tensor([], dtype=args[0].dtype, device=args[0].device),) * 2
        held = (cache.layers[i].keys, cache.layers[i].values) if i < len(cache.layers) else empty
        contexts = lambda: (contextlib.nullcontext(), as_it_was(cache, i, held))   # of the two runs
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return run


@contextlib.contextmanager
def checkpointed_blocks(model, enabled):
    """Recompute each block in the backward pass instead of storing its activations."""
    blocks = blocks_of(model) if enabled else []
    for i, block in enumerate(blocks):
        block.forward = recomputed(block.forward, i)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward                              # the class's own forward shows again
