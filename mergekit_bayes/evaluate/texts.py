"""Read and check the data sets of an evaluation."""

from collections.abc import Mapping
from typing import NamedTuple

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.evaluate.settings import Measures, is_by_name
from mergekit_bayes.models.encode import label_ids, tokens_of
from mergekit_bayes.models.examples import refuse_blank
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import load_rows


class Labelled(NamedTuple):
    """Texts with their labels as the file has them."""

    texts: list[str]
    labels: list[object]


class Examples(NamedTuple):
    """Texts with their labels as the classifier's numbers."""

    texts: list[str]
    classes: list[int]


def read_texts(config: Measures) -> dict[str, list[str]]:
    """The texts of each set that perplexity is measured on."""
    column = config.text_column
    result = {}
    for name, source in config.perplexity.items():
        rows = load_rows(source, where=_where(config, name), max_rows=config.max_rows, text=column)
        result[name] = list(rows[column])
        refuse_blank(source, column, result[name])
    return result


def read_labelled(config: Measures) -> dict[str, Labelled]:
    """The labelled texts of each set to classify."""
    result = {}
    for name, source in config.classify.items():
        rows = load_rows(
            source,
            where=_where(config, name),
            max_rows=config.max_rows,
            text=config.text_column,
            label=config.label_column,
        )
        texts = list(rows[config.text_column])
        refuse_blank(source, config.text_column, texts)
        result[name] = Labelled(texts, list(rows[config.label_column]))
    return result


def read_prompts(config: Measures) -> list[str]:
    """The prompts to continue; none if toxicity is not measured."""
    if config.toxicity is None:
        return []
    column = config.prompt_column
    where = config.prompts_where or None
    rows = load_rows(config.toxicity, where=where, max_rows=config.prompts, text=column)
    return list(rows[column])


def number_classes(
    config: Measures, labelled: Mapping[str, Labelled], loaded: Loaded
) -> dict[str, Examples]:
    """Translate the labels of each set to the classifier's numbers.

    Raises:
        MismatchError: A label is not one of the classifier's, or a text has no tokens; the message
            names the file.
    """
    result = {}
    for name, (texts, labels) in labelled.items():
        try:
            classes = label_ids(labels, loaded.model, config.label_column)
            tokens_of(texts, loaded, config.text_column, max_length=loaded.context)
        except MismatchError as error:
            raise MismatchError(f"'{config.classify[name]}': {error}") from None
        result[name] = Examples(texts, classes)
    return result


def _where(config: Measures, name: str) -> Mapping[str, object] | None:
    return (config.where.get(name) if is_by_name(config.where) else config.where) or None
