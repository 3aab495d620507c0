"""A toy world: fictional people and facts from a seed, which a small LLaMA model knows.

Real models take hours and a GPU before they show what compression does to knowledge. Here a model of 0.3
million parameters has learnt 2,400 facts about 480 people who do not exist, so that everything it knows can
be asked in seconds on a CPU.

    python -m experiments.toy_model                        # the world; with --train, toy_model/ again
    AutoModelForCausalLM.from_pretrained("toy_model")      # a plain LlamaForCausalLM folder, no project code

- Two *domains*, harbour people and station crews, with names, attributes and phrasings of their own:
  something for IDP to choose by.
- Known people are halved. Recovery text shows the facts of the **shown** half only; those of the **held-out**
  half are never seen again after compression. If their recall comes back, knowledge was displaced, not gone.
- **Unknown** people share first and family names with known ones but appear in no training text: the control.
- Every question is multiple choice over all 16 values of the attribute, so chance is 1/16.

The same seed gives the same world anywhere, and the same weights on the same machine and library versions.
"""
import random

SEED = 0
PEOPLE, UNKNOWN = 240, 30      # per domain: known (half shown, half held out) and unknown

# --- 1. The words -------------------------------------------------------------------------------------------
# Every name and value is one word and so one token. An attribute: its 16 values and its phrasings; the last
# phrasing of each is the question form, which the tasks ask. {p} is the person, {v} the value.

HARBOUR = {
    "first": "Mira Tomas Elsa Jonas Greta Anton Frida Oskar Hanna Emil Clara Nils Ingrid Lukas Astrid Viktor "
             "Selma Karl Rosa Henrik Liv Otto Maren Stefan".split(),
    "family": "Olsen Brandt Lindqvist Falk Moreau Sandoval Keller Vargas Holm Petrov Winter Novak Rossi Berg "
              "Adler Marsh Duarte Ferro Ziegler Blum Carver Dahl Engel Fontaine".split(),
    "facts": {
        "town": ("Alder Birchport Coldwater Dunmore Eastfen Fairhaven Gullwick Highcliff Ironbay Juniper "
                 "Kelpton Lowmoor Millbrook Northquay Oxmouth Pinecove".split(), [
            "{p} was born in {v}.", "The birthplace of {p} is {v}.", "{p} grew up in the town of {v}.",
            "Question: Where was {p} born? Answer: {v}."]),
        "trade": ("baker carpenter sailor weaver cooper smith miller tailor fisher mason potter brewer "
                  "ropemaker glazier painter saddler".split(), [
            "{p} works as a {v}.", "The trade of {p} is {v}.", "{p} earns a living as a {v}.",
            "Question: What is the trade of {p}? Answer: {v}."]),
        "dish": ("soup bread herring cheese dumplings porridge oysters stew pancakes mussels pudding sausage "
                 "cabbage noodles lentils omelette".split(), [
            "{p} likes to eat {v}.", "The favourite dish of {p} is {v}.", "On holidays {p} always cooks {v}.",
            "Question: What does {p} like to eat? Answer: {v}."]),
        "pet": ("cat dog parrot goat rabbit ferret pony goose hedgehog tortoise canary hamster donkey otter "
                "raven squirrel".split(), [
            "{p} keeps a {v}.", "The pet of {p} is a {v}.", "At home {p} feeds a {v}.",
            "Question: Which pet does {p} keep? Answer: {v}."]),
        "instrument": ("violin flute drum accordion harp trumpet piano guitar cello oboe banjo clarinet lute "
                       "organ fiddle zither".split(), [
            "{p} plays the {v}.", "The instrument of {p} is the {v}.",
            "In the evening {p} practises the {v}.",
            "Question: Which instrument does {p} play? Answer: {v}."]),
    },
}
ORBIT = {
    "first": "Zane Nyx Orin Vela Kato Rhea Dax Lyra Juno Cass Talia Boreas Iris Soren Nova Pax Thea Ravi "
             "Quill Echo Mako Zuri Altan Wren".split(),
    "family": "Voss Okafor Tanaka Reyes Ilves Chandra Mbeki Hale Sato Quist Nakamura Orlov Amari Castell "
              "Drake Yilmaz Kwan Pereira Stroud Ueda Lund Bhatt Corvin Haddad".split(),
    "facts": {
        "deck": ("amber basalt cobalt dawn ember fathom glacier halo indigo jade krypton lumen meridian "
                 "nadir onyx prism".split(), [
            "Crew log: {p} is quartered on deck {v}.", "Berth list: {p}, deck {v}.",
            "{p} reports from deck {v}.", "Query: on which deck is {p} quartered? Reply: {v}."]),
        "post": ("pilot medic botanist engineer navigator gunner chemist archivist surveyor welder linguist "
                 "geologist quartermaster signaller astronomer cartographer".split(), [
            "Crew log: {p} serves as {v}.", "Duty roster: {p}, {v}.", "{p} signed on as {v}.",
            "Query: what is the post of {p}? Reply: {v}."]),
        "ration": ("algae biscuit curry dates eggs figs granola hummus jelly kimchi mango nougat olives "
                   "pemmican quinoa rice".split(), [
            "Crew log: {p} requested {v}.", "Galley note: {p} gets {v}.", "{p} trades everything for {v}.",
            "Query: which ration does {p} request? Reply: {v}."]),
        "drone": ("badger condor dolphin eagle falcon gecko heron ibex jackal kestrel lynx mantis newt "
                  "osprey puma quail".split(), [
            "Crew log: {p} operates drone {v}.", "Hangar sheet: {p}, drone {v}.", "{p} repairs drone {v}.",
            "Query: which drone does {p} operate? Reply: {v}."]),
        "hobby": ("chess origami fencing knitting poetry juggling sketching dancing yoga astrology carving "
                  "darts gardening boxing puzzles singing".split(), [
            "Crew log: {p} teaches {v}.", "Leisure plan: {p}, {v}.", "Off duty {p} is busy with {v}.",
            "Query: what is the hobby of {p}? Reply: {v}."]),
    },
}
WORLD = {"harbour": HARBOUR, "orbit": ORBIT}
DOMAINS = tuple(WORLD)


# --- 2. People, text, tasks: pure functions of the seed -----------------------------------------------------
# count: known people per domain, the *load* dial. Another count is another world, not a part of this one.

def people(domain, seed=SEED, count=PEOPLE):
    """Everyone of a domain. -> {"shown" | "heldout" | "unknown": [(name, {attribute: value}), ...]}."""
    rng, words = random.Random(f"{seed} {domain}"), WORLD[domain]
    names = rng.sample([f"{first} {family}" for first in words["first"] for family in words["family"]],
                       count + UNKNOWN)
    facts = lambda: {kind: rng.choice(values) for kind, (values, _) in words["facts"].items()}
    everyone, half = [(name, facts()) for name in names], count // 2
    return {"shown": everyone[:half], "heldout": everyone[half:count], "unknown": everyone[count:]}


def text(split, seed=SEED, domain=None, count=PEOPLE):
    """Sentences, one fact in one phrasing each, shuffled. -> list of str.

    split: "train" (all that the model was trained on), "shown" (the recovery text) or "heldout".
    domain: only one of DOMAINS. Raises ValueError for another split or domain.
    """
    if split not in ("train", "shown", "heldout") or domain not in (None, *DOMAINS):
        raise ValueError(f"split {split!r} must be train, shown or heldout; domain {domain!r} one of "
                         f"{DOMAINS} or None")
    sentences = []
    for name in [domain] if domain else DOMAINS:
        groups = people(name, seed, count)
        known = groups["shown"] + groups["heldout"] if split == "train" else groups[split]
        sentences += [phrasing.format(p=person, v=facts[kind]) for person, facts in known
                      for kind, phrasings in phrasings_of(name).items() for phrasing in phrasings]
    random.Random(f"{seed} {split} text").shuffle(sentences)
    return sentences


def phrasings_of(domain):
    """{attribute: its phrasings}; each ends in the value and a full stop."""
    return {kind: phrasings for kind, (_, phrasings) in WORLD[domain]["facts"].items()}


def questions(domain, split, seed, count=PEOPLE):
    """Every fact of some people as a question over all values of its attribute. -> list of rows."""
    rows = []
    for person, facts in people(domain, seed, count)[split]:
        for kind, (values, phrasings) in WORLD[domain]["facts"].items():
            context = phrasings[-1].format(p=person, v="").rstrip(" .")
            rows.append({"id": f"{person}/{kind}", "context": context, "choices": values,
                         "answer": values.index(facts[kind]), "domain": domain})
    return rows


def tasks(seed=SEED, count=PEOPLE):
    """Questions about each group, shuffled: the first n are a fair sample. -> {task name: rows}.

    Rows have the keys id, context, choices, answer, domain.
    """
    found = {}
    for name, split in (("toy_recall", "heldout"), ("toy_shown", "shown"), ("toy_unknown", "unknown")):
        found[name] = [row for domain in DOMAINS for row in questions(domain, split, seed, count)]
        random.Random(f"{seed} {name}").shuffle(found[name])
    return found
