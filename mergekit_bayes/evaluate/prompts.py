"""Read the prompts to continue, also from a column of objects.

RealToxicityPrompts, as it is published, has objects in its column `prompt`: the text, and scores of
which some are null.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.models.rows import load_rows

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT = "text"  # the key of an object that is read if none is named


def read_prompts(config: EvaluateConfig) -> list[str]:
    """The prompts to continue; none if toxicity is not measured.

    Raises:
        CheckpointError: The file cannot be read.
        MismatchError: A column or key is missing, or a prompt is not text.
    """
    if config.toxicity is None:
        return []
    rows = load_rows(
        config.toxicity, where=config.prompts_where or None, max_rows=config.prompts
    )
    column, keys = _find_column(rows, config.prompt_column, config.toxicity)
    return [
        _text(value, keys, f"'{config.toxicity}', row {i + 1}: '{column}'")
        for i, value in enumerate(rows[column])
    ]


def _find_column(rows: "Dataset", path: str, source: str) -> tuple[str, list[str]]:
    """The column that a path begins with, and the keys of objects that it goes on with."""
    if path in rows.column_names:  # a column's own name may contain a full stop
        return path, []
    column, *keys = path.split(".")
    if column not in rows.column_names:
        raise MismatchError(
            f"'{source}' has no column '{column}'; it has {', '.join(rows.column_names)}."
        )
    return column, keys


def _text(value: object, keys: list[str], where: str) -> str:
    """The text under `keys` of a cell, or the cell itself; of an object, what its `text` holds."""
    for key in keys:
        if not isinstance(value, Mapping):
            raise MismatchError(f"{where} is {_kind(value)}, which has no key '{key}'.")
        if key not in value:
            raise MismatchError(f"{where} has no key '{key}'; it has {', '.join(value)}.")
        value, where = value[key], f"{where[:-1]}.{key}'"
    if isinstance(value, Mapping):
        if _TEXT not in value:
            raise MismatchError(
                f"{where} is an object with {', '.join(value)}, expected text. Name the key that "
                "holds it: --prompt-column COLUMN.KEY."
            )
        value, where = value[_TEXT], f"{where[:-1]}.{_TEXT}'"
    if not isinstance(value, str):
        raise MismatchError(f"{where} is {_kind(value)}, expected text.")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
