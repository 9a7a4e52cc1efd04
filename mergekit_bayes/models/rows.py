"""Read rows of text: files, folders and Hub data sets."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_bayes.checkpoint.sources import commit_in, is_hub_id, resolve
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.libraries import call, reason
from mergekit_bayes.models.cells import CONVERSATIONS, check_labels, check_texts
from mergekit_bayes.models.data_files import CARDS, LOADERS, entry_of_card, files_of, one_file
from mergekit_bayes.models.quiet import logged_from

if TYPE_CHECKING:
    from datasets import Dataset, Features

_TEXT = "text"  # the key of the text in an object
_MISSING = object()
# Only an empty cell of a CSV file is null. By default pandas also drops the words NA and null.
_OPTIONS: dict[str, dict[str, object]] = {"csv": {"keep_default_na": False, "na_values": [""]}}


class Wanted(NamedTuple):
    """What is read of a source.

    Attributes:
        columns: Columns that it must have. If any is named here or below, the others are dropped.
        text: A column that must hold text in every row that is kept.
        label: A column that must hold text or whole numbers in every row that is kept.
    """

    columns: tuple[str, ...] = ()
    text: str | None = None
    label: str | None = None


class Table(NamedTuple):
    """Rows of one source.

    Attributes:
        name: The source.
        rows: Its rows.
        numbers: The number of each in its file, from 1.
        empty_is_null: Whether "" is null there.
    """

    name: str
    rows: "Dataset"
    numbers: Sequence[int]
    empty_is_null: bool


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
        columns: As `Wanted` has it for each source, as the next two.
        text: Likewise.
        label: Likewise.

    A column inside objects is named with a dot: `prompt.text`. Where the column of texts holds
    objects, their key `text` is read. `where` looks at the columns as they are in the file.

    Raises:
        CheckpointError: A file cannot be read.
        ConfigError: No data is named.
        MismatchError: A column or every row is missing, or a text or a label is none.
    """
    from datasets import concatenate_datasets

    wanted = Wanted(tuple(columns), text, label)
    tables = load_tables(refs, lambda _, __: wanted, where=where, max_rows=max_rows)
    # A source from which nothing is left may have columns of another type.
    filled = [table.rows for table in tables if len(table.rows)]
    try:
        return concatenate_datasets(filled) if len(filled) > 1 else filled[0]
    except ValueError:
        types = "; ".join(f"{table.name}: {dict(table.rows.features)}" for table in tables)
        raise MismatchError(f"the columns have different types ({types}).") from None


def load_tables(
    refs: str | Sequence[str],
    choose: "Callable[[str, Dataset], Wanted]",
    *,
    where: Mapping[str, object] | None = None,
    max_rows: int | None = None,
) -> list[Table]:
    """Read rows as `load_rows` does, and keep those of each source apart.

    Args:
        refs: As `load_rows` takes them, with `where` and `max_rows`, which counts all sources.
        choose: Says what is read of a source, by its name and its rows as they are in the file.
        where: Which rows.
        max_rows: How many of them at most.

    Raises:
        CheckpointError: A file cannot be read.
        ConfigError: No data is named.
        MismatchError: As `load_rows`.
    """
    names = [refs] if isinstance(refs, str) else list(refs)
    if not names:
        raise ConfigError("no data was named.")
    tables, left = [], max_rows
    for name in names:
        rows = _read(name)
        columns, text, label = wanted = choose(name, rows)
        named = [column for column in (text, label) if column is not None]
        kept = tuple(dict.fromkeys([*columns, *named]))
        table = _choose(rows, name, where or {}, kept, text)
        if left is not None:
            count = min(left, len(table.rows))
            table = table._replace(rows=table.rows.select(range(count)))
            left -= count
        tables.append(_checked(table, wanted))
    if not any(len(table.rows) for table in tables):
        condition = " where " + " and ".join(f"{c}={v}" for c, v in where.items()) if where else ""
        raise MismatchError(f"no row of {', '.join(names)} is left{condition}.")
    return tables


def _checked(table: Table, wanted: Wanted) -> Table:
    """The table, after its text and its label were checked.

    Readers give texts and labels several types (a large string, JSON), which cannot be joined: what
    is checked has one.
    """
    from datasets import Json, Value

    name, rows, numbers, empty_is_null = table
    text, label = wanted.text, wanted.label
    if text is not None:
        values = read_out(rows[text], text, name)
        texts = check_texts(values, text, name, numbers, empty_is_null=empty_is_null)
        if rows.features[text] != Value("string"):
            rows = _with_column(rows, text, texts)
    if label is not None:
        labels = check_labels(read_out(rows[label], label, name), label, name, numbers)
        if isinstance(rows.features[label], Json):
            rows = _with_column(rows, label, labels)
    return table._replace(rows=rows)


def _with_column(rows: "Dataset", name: str, values: Sequence[object]) -> "Dataset":
    """The rows with these values as a column; where their types differ it is a column of JSON."""
    from datasets import Dataset, Features, Json, Value

    types = {type(value) for value in values if value is not None}
    kinds = {str: "string", bool: "bool", int: "int64", float: "float64"}
    kind = kinds.get(types.pop()) if len(types) == 1 else None
    columns = {column: rows[column][:] for column in rows.column_names} | {name: list(values)}
    features = Features({**rows.features, name: Json() if kind is None else Value(kind)})
    return Dataset.from_dict(columns, features=features)


def _read(name: str) -> "Dataset":
    from datasets import Features, Json

    rows = _load(name, None)
    dated = {column: Json() for column, feature in rows.features.items() if _has_dates(feature)}
    if dated and rows.info.builder_name == "json":
        # JSON has no dates: what pyarrow made one is a string. A column of JSON keeps it.
        rows = _load(name, Features({**rows.features, **dated}))
    return rows


def _has_dates(feature: Any) -> bool:
    """Whether a column, or something inside it, is of dates or times."""
    if isinstance(feature, dict):
        return any(map(_has_dates, feature.values()))
    inner = getattr(feature, "feature", None)  # of a list
    return str(getattr(feature, "dtype", "")).startswith(("date", "time")) or (
        inner is not None and _has_dates(inner)
    )


def _load(name: str, features: "Features | None") -> "Dataset":
    """A source as `datasets` reads it, with the types that it finds where `features` is None."""
    from datasets import load_dataset

    path = Path(os.path.expanduser(name))  # which leaves the home of an unknown user as it is
    chosen = None
    if path.is_dir():
        chosen = files_of(path, name)
    elif path.is_file():
        chosen = one_file(path, name)
    elif path.exists():
        raise CheckpointError(f"'{name}' is not a regular file. Write its rows into one.")
    if chosen is not None:
        options = {**_OPTIONS.get(chosen.loader, {}), **chosen.options, "data_files": chosen.files}
        return _loaded(
            name,
            lambda: load_dataset(chosen.loader, split="train", features=features, **options),
        )
    if is_hub_id(name) and not name.endswith(tuple(LOADERS)):
        repo, _, revision = name.partition("@")
        revision = _check_card(name) or revision
        return _loaded(
            name,
            lambda: load_dataset(repo, split="train", revision=revision or None, features=features),
        )
    raise CheckpointError(f"'{name}': no such file or folder, and not a Hub data set.")


def _loaded(name: str, load: "Callable[[], Dataset]") -> "Dataset":
    """What a reader of `datasets` gives, without the columns whose values are opened when read.

    Raises:
        CheckpointError: It gives nothing.
    """
    try:
        with logged_from(logging.CRITICAL, "datasets"):  # it logs what it raises
            rows = call(f"'{name}': datasets cannot read it", load)
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, StopIteration) or isinstance(
            getattr(cause, "__cause__", None), StopIteration
        ):
            raise CheckpointError(f"'{name}' is empty: it holds no row.") from None
        if cause is not None and cause.__cause__ is not None:  # datasets wraps what readers raise
            raise CheckpointError(
                f"'{name}': datasets cannot read it ({type(cause).__name__}: "
                f"{reason(cause.__cause__)})."
            ) from None
        raise
    # Images and sounds may be addresses, and are no text.
    opened = [column for column, kind in rows.features.items() if _is_opened(kind)]
    return rows.remove_columns(opened) if opened else rows


def _is_opened(feature: Any) -> bool:
    """Whether values of a column, or inside of it, are files or addresses that are opened."""
    from datasets import Json

    if isinstance(feature, dict):
        return any(map(_is_opened, feature.values()))
    inner = getattr(feature, "feature", None)  # of a list
    is_file = hasattr(feature, "decode_example") and not isinstance(feature, Json)
    return is_file or (inner is not None and _is_opened(inner))


def _check_card(name: str) -> str | None:
    """Refuse a Hub data set whose card names files outside of its repository.

    Returns:
        The commit of the card; None if it cannot be had.

    Raises:
        CheckpointError: It does.
    """
    try:
        folder = resolve(name, CARDS, repo_type="dataset")
    except CheckpointError:
        return None  # told by datasets, which may have the rows in its own cache
    entry_of_card(folder)
    return commit_in(name, folder)


def _choose(
    rows: "Dataset",
    name: str,
    where: Mapping[str, object],
    columns: Sequence[str],
    text: str | None,
) -> Table:
    """The rows that match `where`, with the named columns only."""
    found = {column: _values(rows, column, name) for column in [*columns, *where]}
    for column, values in found.items():
        if values is None:
            advice = _columns_of_text(rows) if column == text else ""
            inner = [inside for inside, _ in _leaves(rows.features)]
            there = ", ".join(inner if "." in column else rows.column_names)
            raise MismatchError(f"'{name}' has no column '{column}'; it has {there}.{advice}")
    empty_is_null = rows.info.builder_name == "csv"
    numbers: Sequence[int] = range(1, len(rows) + 1)
    if where:
        candidates = zip(
            *(read_out(found[column] or (), column, name) for column in where), strict=True
        )
        matching = [
            i
            for i, values in enumerate(candidates)
            if _matches(dict(zip(where, values, strict=True)), where)
        ]
        rows, numbers = rows.select(matching), [i + 1 for i in matching]
    rows = _open_objects(rows, columns, text, name)
    kept = rows.select_columns(list(columns)) if columns else rows
    return Table(name, kept, numbers, empty_is_null)


def _values(rows: "Dataset", column: str, name: str) -> Sequence[object] | None:
    """The values of a column, or of what is inside objects; None where no row has it.

    Objects may differ from row to row, so that their values are looked at and not their type.
    """
    if column in rows.column_names:
        values: Sequence[object] = rows[column]  # read where it is iterated
        return values
    outer = [name for name in rows.column_names if column.startswith(f"{name}.")]
    objects = read_out(rows.select_columns(outer), column, name) if outer else []
    found = [_inside(row, column) for row in objects] or [_MISSING]
    if all(value is _MISSING for value in found):
        return None
    return [None if value is _MISSING else value for value in found]


def read_out(values: Iterable[object], column: str, name: str) -> list[object]:
    """The values of a column, some of which a file may hold in no form of Python's.

    Raises:
        CheckpointError: They cannot be read.
    """
    return call(f"'{name}': column '{column}' cannot be read", lambda: list(values))


def _inside(value: object, path: str) -> object:
    """What an object has under a path of keys, which may contain dots themselves."""
    if not isinstance(value, Mapping):
        return _MISSING
    if path in value:
        return value[path]
    parts = path.split(".")
    heads = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    found = (_inside(value[head], path[len(head) + 1 :]) for head in heads if head in value)
    return next((inner for inner in found if inner is not _MISSING), _MISSING)


def _open_objects(
    rows: "Dataset", columns: Sequence[str], text: str | None, name: str
) -> "Dataset":
    """Make columns of what is inside objects, where a column is named that is inside one.

    `prompt.text` is a column of its own then. Objects in the column of texts stand for the text
    that they hold, as in RealToxicityPrompts, whose prompts are objects of a text and its scores.
    """
    from datasets import Value

    for column in columns:
        if column not in rows.column_names:
            rows = _with_column(rows, column, _values(rows, column, name) or [None] * len(rows))
    if text is not None and not isinstance(rows.features[text], Value):
        rows = _with_column(rows, text, [_text_of(v) for v in read_out(rows[text], text, name)])
    return rows


def _text_of(value: object) -> object:
    """The text that an object holds; anything else as it is."""
    if not isinstance(value, Mapping) or isinstance(value.get(_TEXT, value), Mapping):
        return value
    return value[_TEXT]


def _matches(row: Mapping[str, object], where: Mapping[str, object]) -> bool:
    return all(
        row[column] in value if isinstance(value, (list, tuple)) else row[column] == value
        for column, value in where.items()
    )


def _columns_of_text(rows: "Dataset") -> str:
    """Which columns would do as the text, and that a column of conversations does not."""
    texts = [n for n, kind in _leaves(rows.features) if kind in ("string", "large_string")]
    inside = {name.partition(".")[0] for name in texts if "." in name}
    chats = ("messages", "conversations")
    advice = [CONVERSATIONS for c in rows.column_names if c in chats and c not in inside][:1]
    if texts:
        pairs = ""
        if len(texts) > 1:
            pairs = " (in bmerge finetune and precision, or two: prompt_column, completion_column)"
        advice.append(f"Columns of text: {', '.join(texts)}; name one as the text column{pairs}.")
    else:
        advice.append("Write each row as one string in a column 'text'.")
    return f" {' '.join(advice)}"


def _leaves(features: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The columns, and those inside objects that are alike in all rows, with their types."""
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            yield from _leaves(feature, f"{before}{name}.")
        else:
            yield f"{before}{name}", str(getattr(feature, "dtype", ""))
