"""Tiny conversations and the words that a model is scored on in them."""

import json
from pathlib import Path

import numpy as np

from mergekit_bayes.models.encode import IGNORED
from tests.tiny_models import WORDS


def turns(*contents, system=None):
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(path, rows, seed=0):
    """Conversations of one to three turns, whose answers follow from the question's last word."""
    rng = np.random.default_rng(seed)
    written = []
    for _ in range(rows):
        contents = []
        for _ in range(rng.integers(1, 4)):
            good = bool(rng.integers(2))
            words = [*rng.choice(WORDS[:10], rng.integers(2, 5)), "good" if good else "bad"]
            contents += [" ".join(words), "nice fun" if good else "not dull"]
        written.append({"messages": turns(*contents)})
    return write(path, written)


def words(loaded, example):
    """The words of an example, with those that are scored in capitals."""
    labels = [IGNORED, *example["labels"][1:]]  # nothing predicts the first
    pairs = zip(example["input_ids"], labels, strict=True)
    names = [(loaded.tokenizer.convert_ids_to_tokens(i), label) for i, label in pairs]
    return " ".join(name if label == IGNORED else name.upper() for name, label in names)
