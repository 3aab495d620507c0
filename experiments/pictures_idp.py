"""Pictures of IDP: one layer's attention logits with the choice made on them; who chooses what; the data flow."""
import torch

from experiments.pictures_draw import NORMAL, SMALL, canvas, finish
from idp_minimal import PromptBank, attach_idp, mean_attention, prompt_logits
from methods.prompts import SoftPrompts            # noqa: F401
from support.scoring import pad
from support.data import encode
from support.tables import markdown
from support.toy_world import DOMAINS


# --- 1. One layer's attention ---------------------------------------------------------------------------------

def attention(toy):
    ...


def choices(toy):
    ...


def dataflow(args):
    ...
