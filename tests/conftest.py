"""Tiny random models of every supported architecture, built from configs: no network, no GPU, seconds."""
import itertools
import os
import pathlib
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # a test that reaches for the hub must fail at once
# tiny models: threads would wait for each other longer than they work
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# A shell that starts the tests in the background has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from idp_minimal import attach_idp

TINY = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "llama": dict(TINY, model_type="llama", num_key_value_heads=2, intermediate_size=48),
    "mistral": dict(TINY, model_type="mistral", num_key_value_heads=2, intermediate_size=48, head_dim=8),
    "qwen2": dict(TINY, model_type="qwen2", num_key_value_heads=2, intermediate_size=48),
    "qwen3": dict(TINY, model_type="qwen3", num_key_value_heads=2, intermediate_size=48, head_dim=8),
    "opt": dict(TINY, model_type="opt", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    # the 350m style: embeddings narrower than the hidden size, norm after the residual
    "opt-350m": dict(TINY, model_type="opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False,
                     dropout=0.0),
    "gpt2": dict(model_type="gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt_neox": dict(TINY, model_type="gpt_neox", intermediate_size=48),
}


def tiny_model(name, seed=0, **changes):
    """A random model of CONFIGS[name], float32, eval mode, frozen. changes: to the config.

    Weights are scaled up so that attention is not flat.
    """
    torch.manual_seed(seed)
    config = {**CONFIGS[name], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config),
                                             dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(size=97):
    """A tokenizer with as many words as tiny models have rows, w0 to w96: w0 pads, w1 begins, w2 ends."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0", bos_token="w1",
                                   eos_token="w2")


def save_tiny(model, folder, **settings):
    """A model and the tiny tokenizer as a folder for load_model. -> Path. settings: of save_pretrained."""
    model.save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    return pathlib.Path(folder)


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    """One test per architecture."""
    return tiny_model(request.param)


@pytest.fixture
def real_model_dir():
    """A folder with a real model, from the environment variable IDP_REAL_MODEL; skipped when absent."""
    if "IDP_REAL_MODEL" not in os.environ:
        pytest.skip("set IDP_REAL_MODEL=DIR to a folder with a real model")
    return os.environ["IDP_REAL_MODEL"]


def forced(choice, m):
    """A selector that gives every row the prompt it had. choice (L, B): called once a layer; (B,): the same in every layer."""
    each = itertools.cycle(choice if choice.dim() == 2 else [choice])
    return lambda A, real, owner: torch.nn.functional.one_hot(next(each), m).float()


def under(model, bank, choice):
    """attach_idp with the choice of an earlier pass, whatever reading it had."""
    return attach_idp(model, bank, forced(choice, bank.m), layers="every" if choice.dim() == 2 else "first")
