"""The memory of a K-prior."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.estimate import random_examples
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import load_rows

Example = Mapping[str, Any]


class Memory(NamedTuple):
    """The memory."""

    examples: Sequence[Example]
    held_out: Sequence[Example]


def build_memory(config: AdaptConfig, loaded: Loaded) -> Memory | None:
    """Build it."""
    if config.memory is None:
        return None
    rows = config.memory
    table = load_rows(
        rows.data, where=rows.where, max_rows=config.max_rows, text=config.text_column
    )
    examples = encode_rows(
        table, loaded, text=config.text_column, max_length=config.max_length, pack=config.pack
    )
    examples = random_examples(examples, len(examples), config.seed)
    count = round(config.memory_held_out * len(examples))
    train = examples[: len(examples) - count]
    if config.memory_rows is not None:
        train = train[: config.memory_rows]
    return Memory(train, examples[len(examples) - count :])
