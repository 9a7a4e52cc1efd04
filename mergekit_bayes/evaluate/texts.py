"""Read and check the data sets of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.models.encode import label_ids
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import load_rows


def is_by_name(where: Mapping[str, Any]) -> bool:
    return bool(where) and all(isinstance(v, Mapping) for v in where.values())


class DataSets(NamedTuple):
    """What predictions are measured on, by name."""

    texts: Mapping[str, list[str]]
    labelled: Mapping[str, tuple[list[str], list[int]]]


def _where(config: EvaluateConfig, name: str) -> dict[str, Any] | None:
    return (config.where.get(name) if is_by_name(config.where) else config.where) or None


def read_texts(config: EvaluateConfig, name: str) -> list[str]:
    column = config.text_column
    rows = load_rows(
        config.perplexity[name],
        where=_where(config, name),
        max_rows=config.max_rows,
        columns=(column,),
    )
    return _strings(rows[column], config.perplexity[name], column)


def read_labelled(config: EvaluateConfig, name: str) -> tuple[list[str], list[Any]]:
    """Texts and their labels as the file has them."""
    columns, file = (config.text_column, config.label_column), config.classify[name]
    rows = load_rows(
        file,
        where=_where(config, name),
        max_rows=config.max_rows,
        columns=tuple(dict.fromkeys(columns)),
    )
    return _strings(rows[config.text_column], file, config.text_column), list(
        rows[config.label_column]
    )


def with_classes(
    config: EvaluateConfig, loaded: Loaded, name: str, rows: tuple[list[str], list[Any]]
) -> tuple[list[str], list[int]]:
    try:
        return rows[0], label_ids(rows[1], loaded.model, config.label_column)
    except MismatchError as error:
        raise MismatchError(f"'{config.classify[name]}': {error}") from None


def read_prompts(config: EvaluateConfig) -> list[str]:
    if config.toxicity is None:
        return []
    column = config.prompt_column
    rows = load_rows(
        config.toxicity,
        where=config.prompts_where or None,
        max_rows=config.prompts,
        columns=(column,),
    )
    return _strings(rows[column], config.toxicity, column)


def _strings(values: Sequence[Any], source: str, column: str) -> list[str]:
    result = list(values)
    for i, value in enumerate(result):
        if not isinstance(value, str):
            raise MismatchError(
                f"'{source}', row {i + 1}: '{column}' is {type(value).__name__}, expected text."
            )
    return result
