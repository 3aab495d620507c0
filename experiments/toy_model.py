"""The toy model: look at the toy world, or train the small LLaMA model that knows it (toy_model/).

    python -m experiments.toy_model  # the world: people, phrasings, questions
    python -m experiments.toy_model --train --out runs/toy  # toy_model/ from the seed: 5 minutes on 2 cores
    python -m experiments.toy_model --train --people 480 --steps 4000 --out runs/480  # twice the facts
"""
import random
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support import toy_world
from support.cli import UserError, parse_flags, refuse_given, run
from support.output import claim
from support.progress import progress
from support.toy_world import PEOPLE, SEED


# --- 1. Tokenizer and model ---------------------------------------------------------------------------------

def build_tokenizer():
    """One token a word and a punctuation mark; white space and line breaks only separate. No BOS is added."""
    split, texts = pre_tokenizers.Whitespace(), []
    for words in toy_world.WORLD.values():
        texts += words["first"] + words["family"]
        for values, phrasings in words["facts"].values():
            texts += values + [phrasing.format(p="", v="") for phrasing in phrasings]
    words = sorted({word for line in texts for word, _ in split.pre_tokenize_str(line)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>"] + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=512, clean_up_tokenization_spaces=False)


def build_model(vocabulary, width=64, layers=4, seed=SEED):
    """A fresh LlamaForCausalLM with heads of 16. Facts per parameter: --people."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=3))


def training_rows(tokenizer, seed=SEED, count=PEOPLE):
    """Endless rows of 64 tokens that begin at a sentence; every pass sees each one once, in a new order."""
    sentences = tokenizer(toy_world.text("train", seed, count=count))["input_ids"]
    rng = random.Random(seed)
    while True:
        rng.shuffle(sentences)
        row = []
        for sentence in sentences:
            row += sentence
            if len(row) >= 64:
                yield torch.tensor(row[:64])
                row = []


def train(model, tokenizer, steps=2000, batch_size=48, lr=3e-3, seed=SEED, count=PEOPLE):
    """AdamW, one-cycle learning rate, next-token loss on whole sentences. -> last loss (nats per token)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    rows, bar = training_rows(tokenizer, seed, count), progress(range(steps), desc="train the toy model")
    model.train()
    for _ in bar:
        ids = torch.stack([next(rows) for _ in range(batch_size)])                             # (48, 64)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return loss.item()


# --- 2. The command -----------------------------------------------------------------------------------------

def show(seed):
    """Print a sample of the world."""
    for domain in toy_world.DOMAINS:
        person, facts = toy_world.people(domain, seed)["shown"][0]
        print(f"\n{domain}: {person}, " + ", ".join(f"{kind} {value}" for kind, value in facts.items()))
        for phrasing in next(iter(toy_world.WORLD[domain]["facts"].values()))[1]:
            print("   ", phrasing.format(p=person, v=next(iter(facts.values()))))
    for name, rows in toy_world.tasks(seed).items():
        row = rows[0]
        print(f"\n{name}, {len(rows)} questions, chance 1/{len(row['choices'])}; the first:")
        print(f"    {row['context']} [{row['choices'][row['answer']]}]")
        print(f"    choices: {' '.join(row['choices'])}")


def parse(argv=None):
    """The command line. -> argparse.Namespace. Raises UserError."""
    words = "train the model and write --out (default: show the world)"
    add = lambda parser: parser.add_argument("--train", action="store_true", default=None, help=words)
    args = parse_flags(__doc__, ["seed", "steps", "people", "out"], argv, defaults={"steps": 2000}, add=add)
    if not args.train:
        refuse_given(args, ["steps", "people", "out"], "counts only with --train; add --train")
    elif args.out is None:
        raise UserError("--out: missing; name the folder to write, for example --out runs/toy_model")
    return args


def main(argv=None):
    """Show the world, or train its model."""
    args = parse(argv)
    if not args.train:
        return show(args.seed)
    with claim(args.out) as out:
        tokenizer = build_tokenizer()
        model = build_model(len(tokenizer), seed=args.seed)
        print(f"{model.num_parameters():,} parameters, {2 * args.people * 5:,} facts", file=sys.stderr)
        loss = train(model, tokenizer, args.steps, seed=args.seed, count=args.people)
        print(f"loss of the last step: {loss:.3f} nats per token")
        with out.folder() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
