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
    rows = load_rows(config.toxicity, where=config.prompts_where or None, max_rows=config.prompts)
    column, keys = _find_column(rows, config.prompt_column, config.toxicity)
    prompts = []
    for i, value in enumerate(rows[column]):
        path, text = _descend(value, column, keys, f"'{config.toxicity}', row {i + 1}")
        if not isinstance(text, str):
            raise MismatchError(
                f"'{config.toxicity}', row {i + 1}: '{path}' is {_kind(text)}, expected text."
            )
        prompts.append(text)
    return prompts


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


def _descend(value: object, path: str, keys: list[str], where: str) -> tuple[str, object]:
    """What a cell holds under `keys`, and its path; of an object, what its `text` holds."""
    for key in keys:
        if not isinstance(value, Mapping):
            raise MismatchError(f"{where}: '{path}' is {_kind(value)}, which has no key '{key}'.")
        if key not in value:
            raise MismatchError(f"{where}: '{path}' has no key '{key}'; it has {', '.join(value)}.")
        value, path = value[key], f"{path}.{key}"
    if not isinstance(value, Mapping):
        return path, value
    if _TEXT not in value:
        raise MismatchError(
            f"{where}: '{path}' is an object with {', '.join(value)}. Name the key that holds the "
            f"text: --prompt-column {path}.KEY."
        )
    return f"{path}.{_TEXT}", value[_TEXT]


def _kind(value: object) -> str:
    """What a cell of a data set is, in words of the file's format."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
