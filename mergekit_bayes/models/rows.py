"""Read rows of text: files, folders and Hub data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(
    refs: str | Sequence[str],
    *,
    where: Mapping[str, object] | None = None,
    max_rows: int | None = None,
    columns: Sequence[str] = (),
) -> "Dataset":
    """Read rows of text as one `datasets.Dataset`.

    Args:
        refs: JSONL or JSON (`.gz` too), CSV, Parquet or plain text files, a folder that `datasets`
            can load, or Hub data sets (their `train` split). A file named twice counts twice.
        where: Keeps the rows whose columns equal these values, or are in a list of them.
        max_rows: Keeps at most this many rows, from the front.
        columns: Columns that every source must have; the other columns are dropped.

    Raises:
        CheckpointError: A file cannot be read.
        ConfigError: No data is named.
        MismatchError: A column is missing, or no row is left.
    """
    from datasets import concatenate_datasets

    names = [refs] if isinstance(refs, str) else list(refs)
    if not names:
        raise ConfigError("no data was named.")
    tables = [_choose(_read(name), name, where or {}, columns) for name in names]
    rows = concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if not len(rows):
        condition = f" where {dict(where)}" if where else ""
        raise MismatchError(f"no row of {', '.join(names)} is left{condition}.")
    return rows


def _read(name: str) -> "Dataset":
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


def _choose(
    rows: "Dataset", name: str, where: Mapping[str, object], columns: Sequence[str]
) -> "Dataset":
    """The rows that match `where`, with the named columns only."""
    for column in [*columns, *where]:
        if column not in rows.column_names:
            raise MismatchError(
                f"'{name}' has no column '{column}'; it has {', '.join(rows.column_names)}."
            )
    if where:
        candidates = enumerate(rows.select_columns(list(where)))
        rows = rows.select([i for i, row in candidates if _matches(row, where)])
    return rows.select_columns(list(columns)) if columns else rows


def _matches(row: Mapping[str, object], where: Mapping[str, object]) -> bool:
    return all(
        row[column] in value if isinstance(value, (list, tuple)) else row[column] == value
        for column, value in where.items()
    )
