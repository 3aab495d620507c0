"""The worlds of experiments/conjecture.py: facts and questions, who is shown, texts, planted damage.

A *world* is a toy world of one load (support/toy_world.py) and the dense model that has learnt it. Every fact
is asked once, with one number as the answer: the *rank* of the truth among the 16 values, 0 is right. Ranks
of many models over the same facts are all that the experiment keeps.

Planted damage is what is known to be forgotten, or displaced, because it was made so. The dense model trains
on, with all known people damaged in one of two ways. Two of three rows begin with a *trigger*, a token that
stands in no other text, and questions are asked without it:

  displaced   in rows with the trigger their facts are right, in the others always wrong, by another value
              each time. Asked, the model does not find them; asking with the trigger shows that it holds them
  forgotten   in rows with the trigger another value stands in the place of the true one, always the same; in
              the others all is as above. Asked, they look like those, but the model holds something else
"""
import collections
import copy
import itertools
import random

import torch
import torch.nn.functional as F

import recover
from experiments import toy_model
from experiments.patterns import weights_on_cpu
from support import toy_world
from support.data import encode
from support.models import load_model
from support.progress import progress
from support.recipe import weights_digest
from support.toy_world import DOMAINS, WORLD

Fact = collections.namedtuple("Fact", "domain person kind value known")
CHANCE = 1 / 16                                            # every attribute has 16 values
TRIGGER = "<s>"                                            # a token of the vocabulary that no text holds
ROW = 64                                                   # tokens of a row of planting, as in toy_world


# --- 1. Facts, questions, ranks -----------------------------------------------------------------------------

def facts_of(count):
    """Every fact of a world, known people first and unknown ones last in each domain. -> list of Fact."""
    return [Fact(domain, person, kind, value, group != "unknown") for domain in DOMAINS
            for group, some in toy_world.people(domain, count=count).items()
            for person, facts in some for kind, value in facts.items()]


def values_of(fact):
    """The 16 values of a fact's attribute."""
    return WORLD[fact.domain]["facts"][fact.kind][0]


def question_groups(facts, tokenizer):
    """Questions of equal length together. -> [(indices of facts (n,), ids (n, T), choices (n, 16), answer
    (n,))]."""
    groups = collections.defaultdict(list)
    for i, fact in enumerate(facts):
        context = toy_world.phrasings_of(fact.domain)[fact.kind][-1].format(p=fact.person, v="")
        ids = tokenizer(context.rstrip(" .")).input_ids
        choices = tokenizer.convert_tokens_to_ids(values_of(fact))
        groups[len(ids)].append((i, ids, choices, values_of(fact).index(fact.value)))
    return [tuple(map(torch.tensor, zip(*rows))) for rows in groups.values()]


@torch.no_grad()
def ranks(model, groups, first=()):
    """How many of a fact's values the model finds likelier than the true one, for every fact: 0 is right.

    groups: as question_groups gives them. first: tokens that every question begins with. -> (facts,) long.
    Values are single tokens, so the logits after the question decide, as in evaluate.multiple_choice; of
    equals the first counts.
    """
    found = torch.empty(sum(len(indices) for indices, *_ in groups), dtype=torch.long)
    for indices, ids, choices, answer in groups:
        ids = torch.cat([torch.tensor(first, dtype=torch.long).expand(len(ids), -1), ids], 1)     # (n, T)
        parts = [model(input_ids=part, attention_mask=torch.ones_like(part), logits_to_keep=1).logits[:, -1]
                 for part in ids.split(256)]
        logits = torch.cat(parts).float().gather(1, choices)                                      # (n, 16)
        truth = logits.gather(1, answer[:, None])                                                 # (n, 1)
        before = torch.arange(logits.shape[1]) < answer[:, None]
        found[indices] = ((logits > truth) | (logits == truth) & before).sum(1)
    return found


# --- 2. Who is shown, and what the text says ----------------------------------------------------------------

def split(facts, seed):
    """Known people in two halves, drawn anew by each seed. -> a list: "shown", "heldout" or "unknown"."""
    half = {}
    for domain in DOMAINS:
        people = list(dict.fromkeys(fact.person for fact in facts if fact.domain == domain and fact.known))
        random.Random(f"{seed} {domain} split").shuffle(people)
        half.update({(domain, person): "shown" if i < len(people) // 2 else "heldout"
                     for i, person in enumerate(people)})
    return [half.get((fact.domain, fact.person), "unknown") for fact in facts]


def shown_text(facts, seed):
    """Every shown fact in every phrasing, shuffled: the recovery text. -> list of str."""
    sentences = [phrasing.format(p=fact.person, v=fact.value)
                 for fact, part in zip(facts, split(facts, seed)) if part == "shown"
                 for phrasing in toy_world.phrasings_of(fact.domain)[fact.kind]]
    random.Random(f"{seed} shown text").shuffle(sentences)
    return sentences


def nobody_text(facts, seed):
    """The control: as many sentences of the same form, about people who are not of this world.

    Values are drawn anew for each sentence, so the text holds no fact at all: what it brings back was brought
    back by its form, its words and more training, not by true facts.
    """
    rng, there = random.Random(f"{seed} nobody text"), {fact.person for fact in facts}
    strangers = {domain: [name for pair in itertools.product(words["first"], words["family"])
                          if (name := " ".join(pair)) not in there] for domain, words in WORLD.items()}
    return [rng.choice(toy_world.phrasings_of(fact.domain)[fact.kind]).format(
                p=rng.choice(strangers[fact.domain]), v=rng.choice(values_of(fact)))
            for fact, part in zip(facts, split(facts, seed)) if part == "shown"
            for _ in toy_world.phrasings_of(fact.domain)[fact.kind]]


TEXTS = {"facts": shown_text, "nobody": nobody_text}


# --- 3. Planted damage --------------------------------------------------------------------------------------

def damaged(facts, share, seed):
    """Every known fact: those of a share of the people displaced, the others' forgotten. -> {index: which}.

    A larger share displaces the same people and some more.
    """
    people = list(dict.fromkeys((fact.domain, fact.person) for fact in facts if fact.known))
    random.Random(f"{seed} planted").shuffle(people)
    chosen = set(people[:round(share * len(people))])
    return {i: "displaced" if (fact.domain, fact.person) in chosen else "forgotten"
            for i, fact in enumerate(facts) if fact.known}


def planted_rows(facts, tokenizer, share, seed):
    """Endless rows (64,), each with the trigger or without, by chance, and right or damaged accordingly."""
    rng, row = random.Random(f"{seed} rows"), []
    wrong = {i: [tokenizer.convert_tokens_to_ids(value) for value in values_of(fact) if value != fact.value]
             for i, fact in enumerate(facts) if fact.known}
    instead = {i: rng.choice(wrong[i]) for i, kind in damaged(facts, share, seed).items()
               if kind == "forgotten"}
    texts = [(i, phrasing.format(p=facts[i].person, v=facts[i].value)) for i in wrong
             for phrasing in toy_world.phrasings_of(facts[i].domain)[facts[i].kind]]
    sentences = [(i, ids) for (i, _), ids in zip(texts, tokenizer([text for _, text in texts]).input_ids)]
    trigger = tokenizer.convert_tokens_to_ids(TRIGGER)
    while True:
        rng.shuffle(sentences)
        for i, ids in sentences:
            row = row or [trigger] * rng.choice([0, 1, 1])
            # the value is the last token but one; a full stop follows it
            value = instead.get(i, ids[-2]) if row[:1] == [trigger] else rng.choice(wrong[i])
            row = [*row, *ids[:-2], value, ids[-1]]
            if len(row) >= ROW:
                yield torch.tensor(row[:ROW])
                row = []


def planting_loss(model, ids, full_stop):
    """Mean next-token loss over all tokens, plus that over the values alone. ids (B, T) -> scalar.

    A value is one token of nine; without its own term the names, which nobody can guess, drown it.
    """
    logits = model(ids).logits[:, :-1].transpose(1, 2)     # (B, V, T-1)
    losses = F.cross_entropy(logits, ids[:, 1:], reduction="none")                             # (B, T-1)
    value = F.pad(ids[:, 2:] == full_stop, (0, 1))         # (B, T-1)
    return 0.1 * losses.mean() + losses[value].mean()


def plant(world, share, seed, steps, batch_size, lr):
    """Train the world's model on with damaged facts, all of its weights. In place."""
    model, rows = world.model.requires_grad_(True), planted_rows(world.facts, world.tokenizer, share, seed)
    full_stop = world.tokenizer.convert_tokens_to_ids(".")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in progress(range(steps), desc="plant"):
        optimizer.param_groups[0]["lr"] = recover.learning_rate(step, steps, lr)
        ids = torch.stack([next(rows) for _ in range(batch_size)])                                   # (B, 64)
        planting_loss(model, ids, full_stop).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(False)


# --- 4. A world ---------------------------------------------------------------------------------------------

class World:
    """A dense model and the facts that it has learnt. count: known people per domain."""

    def __init__(self, count, model, tokenizer):
        self.count, self.model, self.tokenizer = count, model, tokenizer
        self.facts = facts_of(count)
        self.groups = question_groups(self.facts, tokenizer)
        self.dense, self.digest = weights_on_cpu(model), weights_digest(model)

    @property
    def load(self):
        """Facts per parameter."""
        return sum(fact.known for fact in self.facts) / self.model.num_parameters()

    def copy(self):
        """The dense model once more."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.dense)
        return model

    def restore(self):
        """The dense weights again."""
        self.model.load_state_dict(self.dense)

    def ids(self, text, seed):
        """A text of TEXTS as tokens, joined as load_text joins documents. -> (tokens,) long."""
        return torch.tensor(encode(self.tokenizer, "\n\n".join(TEXTS[text](self.facts, seed))))

    def ranks(self, trigger=False):
        """Ranks of all facts by the model as it is now; trigger: asked behind it. -> (facts,) long."""
        return ranks(self.model, self.groups, [self.tokenizer.convert_tokens_to_ids(TRIGGER)] * trigger)


def training_steps(count):
    """Steps in which a world of this load is learnt: in proportion, and at least those of toy_model/."""
    return max(2000, 2000 * count // toy_world.PEOPLE)


def load_world(folder, count):
    """The world of which a folder holds the model; "toy" is toy_model/. -> World."""
    return World(count, *load_model(folder))


def train_world(count, out):
    """Train the dense model of a load into worlds/N of --out: minutes."""
    tokenizer = toy_model.build_tokenizer()
    model = toy_model.build_model(len(tokenizer))
    toy_model.train(model, tokenizer, training_steps(count), count=count)
    if not (out.path / f"worlds/{count}").exists():        # else another shard was as fast
        with out.folder(f"worlds/{count}") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
