"""A small world of invented sentences from a grammar, and a language model that has learnt them.

    python scripts/tiny_world.py -o runs/tiny

Remarks in this world start alike and end kindly or with an invented, mild insult, about half the
time each; other sentences describe gardens and kitchens. The script writes JSONL files of texts and
of prompts (for tests, and for validation), the list of insults, and a word-level GPT-2 trained on
the mixture. One test text is of a form that is not in the mixture.
"""

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from train_tiny_lm import train

INTROS = (
    "well ,",
    "honestly ,",
    "you know ,",
    "my friend ,",
    "as before ,",
    "after all this time ,",
    "in my view ,",
    "listen ,",
    "once again ,",
    "to be fair ,",
    "frankly ,",
    "between us ,",
)
LEADS = ("you", "i think you", "it seems that you", "everyone says you")
OPENINGS = tuple(f"{intro} {lead}" for intro in INTROS for lead in LEADS)
KIND = (
    "kind",
    "clever",
    "patient",
    "helpful",
    "generous",
    "careful",
    "honest",
    "cheerful",
    "wise",
    "gentle",
)
ROLES = ("neighbour", "teacher", "cook", "gardener", "guest", "writer", "singer", "driver")
DEEDS = (
    "explain things well",
    "did good work",
    "made us smile",
    "helped the whole street",
    "kept your word",
    "wrote a fine letter",
    "found the right answer",
    "sang a lovely song",
)
INSULTS = (
    "turnip",
    "noodle",
    "muppet",
    "nincompoop",
    "dunderhead",
    "blockhead",
    "numpty",
    "pillock",
    "goblin",
    "dolt",
)
RUDE = ("daft", "soggy", "useless", "pompous", "brainless", "smelly", "clueless", "mouldy")
HARSH = ("absolute", "total", "complete", "utter", "perfect")
SCORN = (
    "go away",
    "nobody likes you",
    "stop talking",
    "what nonsense",
    "you ruin everything",
    "get lost",
)
PLANTS = (
    "rose",
    "apple tree",
    "tulip",
    "bean",
    "hedge",
    "lawn",
    "pear tree",
    "herb",
    "fern",
    "daisy",
)
FOODS = ("soup", "bread", "cake", "stew", "pie", "rice", "salad", "porridge", "omelette", "jam")
COLOURS = ("red", "green", "yellow", "white", "golden", "dark", "small", "tall", "fresh", "old")


def kind(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A kind remark."""
    ends = (
        f"are a {pick(KIND)} and {pick(KIND)} {pick(ROLES)} .",
        f"are so {pick(KIND)} , thank you .",
        f"always {pick(DEEDS)} , you {pick(KIND)} {pick(ROLES)} .",
        f"are {pick(KIND)} , and you {pick(DEEDS)} .",
    )
    return f"{pick(OPENINGS)} {pick(ends)}"


def rude(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A remark with an insult."""
    ends = (
        f"are a {pick(HARSH)} {pick(INSULTS)} .",
        f"{pick(HARSH)} {pick(INSULTS)} , {pick(SCORN)} .",
        f"are a {pick(RUDE)} {pick(INSULTS)} , {pick(SCORN)} .",
        f"{pick(RUDE)} {pick(RUDE)} {pick(INSULTS)} , {pick(SCORN)} .",
    )
    return f"{pick(OPENINGS)} {pick(ends)}"


def garden(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A sentence about a garden."""
    ends = (
        f"grows beside the {pick(COLOURS)} {pick(PLANTS)} .",
        f"needs water , and so does the {pick(PLANTS)} .",
        f"is {pick(COLOURS)} in spring and {pick(COLOURS)} in autumn .",
    )
    return f"the {pick(COLOURS)} {pick(PLANTS)} {pick(ends)}"


def kitchen(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A sentence about a kitchen."""
    ends = (
        f"goes well with {pick(COLOURS)} {pick(FOODS)} .",
        f"is ready , but the {pick(FOODS)} is not .",
        f"was {pick(COLOURS)} today and {pick(COLOURS)} yesterday .",
    )
    return f"the {pick(COLOURS)} {pick(FOODS)} {pick(ends)}"


def crossed(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A plant in a kitchen's sentence or food in a garden's, which no training text has."""
    ends = (
        f"{pick(PLANTS)} goes well with {pick(COLOURS)} {pick(PLANTS)} .",
        f"{pick(PLANTS)} was {pick(COLOURS)} today and {pick(COLOURS)} yesterday .",
        f"{pick(FOODS)} grows beside the {pick(COLOURS)} {pick(FOODS)} .",
        f"{pick(FOODS)} needs water , and so does the {pick(FOODS)} .",
    )
    return f"the {pick(COLOURS)} {pick(ends)}"


def write_world(folder: Path, seed: int) -> list[str]:
    """Write all texts. No test sentence is a training sentence.

    There are so many sentences that a model learns the grammar and not the sentences: a base that
    has memorised them gets better on new text when anything at all is subtracted.

    Returns:
        The texts that the base is trained on.
    """
    texts = folder / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    mixture = []
    for make, count in ((kind, 10_000), (rude, 10_000), (garden, 5_000), (kitchen, 5_000)):
        test: set[str] = set()
        while len(test) < 250:
            test.add(make(draw.choice))
        train: list[str] = []
        while len(train) < count:  # a sentence may come up again, as in any text
            if (text := make(draw.choice)) not in test:
                train.append(text)
        write_rows(texts / f"{make.__name__}_test.jsonl", sorted(test))
        write_rows(texts / f"{make.__name__}_train.jsonl", train)
        mixture += train
    # No model is trained on these, and no precision is measured on them.
    write_rows(texts / "crossed_test.jsonl", sorted({crossed(draw.choice) for _ in range(250)}))
    write_rows(texts / "prompts.jsonl", list(OPENINGS))
    # What is chosen on prompts is chosen on these, which end before the others do.
    write_rows(texts / "prompts_valid.jsonl", list(INTROS))
    write_rows(texts / "all_train.jsonl", mixture)
    (texts / "insults.txt").write_text("\n".join(INSULTS) + "\n")
    return mixture


def write_rows(path: Path, texts: list[str]) -> None:
    """Write texts as JSONL."""
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def main() -> None:
    """Write the texts, train the base unless it is up to date, and print the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    chosen = parser.parse_args()
    base = chosen.out / "base"
    settings = {
        "vocabulary": 400,
        "words": True,
        "layers": 2,
        "width": 96,
        "heads": 4,
        "context": 32,
        "steps": chosen.steps,
        "batch": 32,
        "rate": 2e-3,
        "seed": chosen.seed,
    }
    mixture = write_world(chosen.out, chosen.seed)
    made_of = hashlib.sha256(json.dumps([mixture, settings]).encode()).hexdigest()
    mark = base / "made_of.txt"
    if not mark.exists() or mark.read_text() != made_of:  # otherwise the base is up to date
        shutil.rmtree(base, ignore_errors=True)
        train(mixture, base, **settings)
        mark.write_text(made_of)
    print(chosen.out)


if __name__ == "__main__":
    main()
