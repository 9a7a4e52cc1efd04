"""Rows of text data: files, folders and Hub data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError


def load_rows(
    refs: str | Sequence[str],
    *,
    where: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    columns: Sequence[str] = (),
) -> Any:
    """Rows of text as one `datasets.Dataset`.

    Args:
        refs: JSONL or JSON (`.gz` too), CSV, Parquet or plain text files, a folder that `datasets`
            can load, or Hub data sets (their `train` split). A file named twice counts twice.
        where: Keeps rows whose columns equal these values (or are in a list of them).
        max_rows: At most so many, from the front.
        columns: Columns that must be there; the others are dropped.

    Raises:
        CheckpointError: A file that cannot be read.
        MismatchError: A column that is not there, or no row left.
    """
    from datasets import concatenate_datasets

    names = [refs] if isinstance(refs, str) else list(refs)
    if not names:
        raise ConfigError("no data was named.")
    parts = []
    for name in names:
        part = _load_one(name)
        wanted = [*columns, *(where or {})]
        for column in wanted:
            if column not in part.column_names:
                raise MismatchError(
                    f"'{name}' has no column '{column}'; it has {', '.join(part.column_names)}."
                )
        if where:
            keep = [
                i for i, row in enumerate(part.select_columns(list(where))) if _matches(row, where)
            ]
            part = part.select(keep)
        parts.append(part.select_columns(list(columns)) if columns else part)
    rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if not len(rows):
        raise MismatchError(
            f"no row of {', '.join(names)} is left{f' where {dict(where)}' if where else ''}."
        )
    return rows


def _matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        row[k] in v if isinstance(v, (list, tuple)) else row[k] == v for k, v in where.items()
    )


_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def _load_one(name: str) -> Any:
    from datasets import load_dataset

    path = Path(name).expanduser()
    try:
        if path.is_file():
            suffix = Path(path.name.removesuffix(".gz")).suffix
            if suffix not in _LOADERS:
                raise CheckpointError(
                    f"'{name}': expected one of {', '.join(_LOADERS)} (.gz too), or a folder."
                )
            return load_dataset(_LOADERS[suffix], data_files=str(path), split="train")
        if path.is_dir():
            return load_dataset(str(path), split="train")
        if is_hub_id(name) and not name.endswith(tuple(_LOADERS)):
            repo, _, revision = name.partition("@")
            return load_dataset(repo, split="train", revision=revision or None)
    except CheckpointError:
        raise
    except Exception as error:  # datasets wraps whatever its readers raise
        reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"'{name}': datasets cannot read it ({type(error).__name__}: {reason})."
        ) from None
    raise CheckpointError(f"'{name}': no such file or folder, and not a Hub data set.")
