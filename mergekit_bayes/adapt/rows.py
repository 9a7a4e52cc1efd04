"""Read rows of text and encode them as the examples of an adaptation."""

from typing import Any, NamedTuple

from mergekit_bayes.adapt.settings import AdaptConfig, Rows
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import load_rows


class Encoded(NamedTuple):
    """The examples of some rows.

    Attributes:
        rows: Rows that were read, after `where` and `max_rows`.
        examples: As `encode_rows` makes them: one a row, or blocks of packed rows.
    """

    rows: int
    examples: list[dict[str, Any]]


def read_examples(
    config: AdaptConfig, loaded: Loaded, rows: Rows, *, labelled: bool = True
) -> Encoded:
    """The examples of rows.

    Args:
        config: The settings, which say how they are read.
        loaded: The model that they are for.
        rows: Where they are.
        labelled: Whether a classifier's rows have labels.

    Raises:
        CheckpointError: They cannot be read.
        MismatchError: Rows without the named columns or with unknown labels.
    """
    label = config.label_column if labelled and loaded.task == "classification" else None
    table = load_rows(
        rows.data, where=rows.where, max_rows=config.max_rows, text=config.text_column, label=label
    )
    examples = encode_rows(
        table,
        loaded,
        text=config.text_column,
        label=label,
        max_length=config.max_length,
        pack=config.pack,
        source=rows.data,
    )
    return Encoded(len(table), examples)
