"""Read rows of text and encode them as the examples of an adaptation."""

from mergekit_bayes.adapt.settings import AdaptConfig, Rows
from mergekit_bayes.models import examples
from mergekit_bayes.models.columns import Columns
from mergekit_bayes.models.load import Loaded


def read_examples(
    config: AdaptConfig, loaded: Loaded, rows: Rows, *, labelled: bool = True
) -> examples.Encoded:
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
    return examples.read_examples(
        rows.data,
        loaded,
        columns=Columns(text=config.text_column),
        label=label,
        where=rows.where,
        max_rows=config.max_rows,
        max_length=config.max_length,
        pack=config.pack == "joined",
    )
