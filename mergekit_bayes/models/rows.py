"""Read rows of text: files, folders and Hub data sets."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models.encode import FORMS, check_labels, check_texts, not_read

if TYPE_CHECKING:
    from datasets import Dataset

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_TEXT = "text"  # the key of the text in an object
# Only an empty cell of a CSV file is null. By default pandas also drops the words NA and null.
_OPTIONS: dict[str, dict[str, object]] = {"csv": {"keep_default_na": False, "na_values": [""]}}


class _Table(NamedTuple):
    """Rows of one source, and the number that each has in its file, from 1."""

    name: str
    rows: "Dataset"
    numbers: Sequence[int]


def load_rows(
    refs: str | Sequence[str],
    *,
    where: Mapping[str, object] | None = None,
    max_rows: int | None = None,
    columns: Sequence[str] = (),
    text: str | None = None,
    label: str | None = None,
) -> "Dataset":
    """Read rows of text as one `datasets.Dataset`.

    Args:
        refs: JSONL or JSON (`.gz` too), CSV, Parquet or plain text files, a folder that `datasets`
            can load, or Hub data sets (their `train` split). A file named twice counts twice.
        where: Keeps the rows whose columns equal these values, or are in a list of them.
        max_rows: Keeps at most this many rows, from the front.
        columns: Columns that every source must have. If any column is named here or below, the
            others are dropped.
        text: A column that must hold text in every row that is kept.
        label: A column that must hold text or whole numbers in every row that is kept.

    A column inside objects is named with a dot: `prompt.text`. Where the column of texts holds
    objects, their key `text` is read.

    Raises:
        CheckpointError: A file cannot be read.
        ConfigError: No data is named.
        MismatchError: A column is missing, a text is not text, a label is no label, or no row is
            left.
    """
    from datasets import concatenate_datasets

    names = [refs] if isinstance(refs, str) else list(refs)
    if not names:
        raise ConfigError("no data was named.")
    named = [column for column in (text, label) if column is not None]
    kept = tuple(dict.fromkeys([*columns, *named]))
    tables, left = [], max_rows
    for name in names:
        table = _choose(_read(name), name, where or {}, kept, text)
        if left is not None:
            count = min(left, len(table.rows))
            table = table._replace(rows=table.rows.select(range(count)))
            left -= count
        tables.append(_checked(table, text, label))
    # A source from which nothing is left may have columns of another type.
    filled = [rows for rows in tables if len(rows)]
    if not filled:
        condition = f" where {dict(where)}" if where else ""
        raise MismatchError(f"no row of {', '.join(names)} is left{condition}.")
    try:
        return concatenate_datasets(filled) if len(filled) > 1 else filled[0]
    except ValueError:
        types = "; ".join(f"{n}: {dict(t.features)}" for n, t in zip(names, tables, strict=True))
        raise MismatchError(f"the columns have different types ({types}).") from None


def _checked(table: _Table, text: str | None, label: str | None) -> "Dataset":
    """The rows, after their text and their label were checked.

    Readers give texts several types (a large string, JSON), which cannot be joined: the checked
    text has one.
    """
    from datasets import Dataset, Features, Value

    rows = table.rows
    if text is not None:
        texts = check_texts(rows[text], text, table.name, table.numbers)
        if rows.features[text] != Value("string"):
            values = {name: rows[name][:] for name in rows.column_names} | {text: texts}
            features = Features({**rows.features, text: Value("string")})
            rows = Dataset.from_dict(values, features=features)
    if label is not None:
        check_labels(rows[label], label, table.name, table.numbers)
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
            loader = _LOADERS[suffix]
            options = _OPTIONS.get(loader, {})
            return load_dataset(loader, data_files=str(path), split="train", **options)
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
    rows: "Dataset",
    name: str,
    where: Mapping[str, object],
    columns: Sequence[str],
    text: str | None,
) -> _Table:
    """The rows that match `where`, with the named columns only."""
    rows = _open_objects(rows, [*columns, *where], text)
    for column in [*columns, *where]:
        if column not in rows.column_names:
            advice = _columns_of_text(rows) if column == text else ""
            raise MismatchError(
                f"'{name}' has no column '{column}'; it has {', '.join(rows.column_names)}.{advice}"
            )
    numbers: Sequence[int] = range(1, len(rows) + 1)
    if where:
        candidates = enumerate(rows.select_columns(list(where)))
        matching = [i for i, row in candidates if _matches(row, where)]
        rows, numbers = rows.select(matching), [i + 1 for i in matching]
    return _Table(name, rows.select_columns(list(columns)) if columns else rows, numbers)


def _open_objects(rows: "Dataset", columns: Sequence[str], text: str | None) -> "Dataset":
    """Make columns of what is inside objects, where a column is named that is inside one.

    `prompt.text` is a column of its own then. Objects in the column of texts stand for the text
    that they hold, as in RealToxicityPrompts, whose prompts are objects of a text and its scores.
    """
    is_object = text in rows.column_names and _TEXT in (_keys(rows, text) if text else ())
    if is_object or any("." in c and c not in rows.column_names for c in columns):
        rows = rows.flatten()
    inner = f"{text}.{_TEXT}"
    if text is not None and text not in rows.column_names and inner in rows.column_names:
        rows = rows.rename_column(inner, text)
    return rows


def _keys(rows: "Dataset", column: str) -> Collection[str]:
    """The keys of the objects in a column; empty if it holds none."""
    feature = rows.features[column]
    return feature.keys() if isinstance(feature, dict) else ()


def _matches(row: Mapping[str, object], where: Mapping[str, object]) -> bool:
    return all(
        row[column] in value if isinstance(value, (list, tuple)) else row[column] == value
        for column, value in where.items()
    )


def _columns_of_text(rows: "Dataset") -> str:
    """Which columns would do as the text, and which known forms of rows are not read."""
    forms = [not_read(c) for c in rows.column_names if c in FORMS]
    kinds = {name: str(getattr(f, "dtype", "")) for name, f in rows.features.items()}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if texts:
        forms.append(f"Columns of text: {', '.join(texts)}; name one as the text column.")
    else:
        forms.append("Write each row as one string in a column 'text'.")
    return f" {' '.join(dict.fromkeys(forms))}"
