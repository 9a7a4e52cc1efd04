"""Which files of a folder hold its rows, without what its card would make a library do.

`datasets` reads the card (`README.md`) of a data folder: it may name files of any place or server,
and types whose values are opened when they are read. Here a card may choose among the folder's
files, and nothing else. Every file is a regular one of the folder.
"""

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.contained import contained
from mergekit_bayes.documents import DocumentError, parse_yaml, read_text
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.libraries import call
from mergekit_bayes.models.row_bytes import COMPRESSED, check_bytes

LOADERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_IN_FOLDERS = LOADERS | {".ndjson": "json", ".arrow": "arrow", ".tsv": "tsv"}
CARDS = ("README.md", ".huggingface.yaml")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_SPLIT = "train"
_COLUMNS = 10_000  # of a Parquet file; 30,000 take 4 GB


class DataFiles(NamedTuple):
    """Files of one format.

    Attributes:
        loader: Name of the format, as `datasets` has it.
        files: The files, in the order of their rows.
        options: Settings of their reader.
    """

    loader: str
    files: list[str]
    options: Mapping[str, object] = {}


class CardEntry(NamedTuple):
    """What a card says of the data set of its folder.

    Attributes:
        files: Its files, as `datasets` takes them; None for all.
        folder: The folder that they are in, from the card's.
        settings: All that the card says, settings of a reader among it.
    """

    files: object | None = None
    folder: str = ""
    settings: Mapping[str, object] = {}


def _is_sign(value: object) -> bool:
    return isinstance(value, str) and len(value) == 1  # longer ones are regular expressions


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_line(value: object) -> bool:
    return value in (None, "infer") or (type(value) is int and 0 <= value < 1000)


# Settings of a reader that a card may make.
_SETTINGS: dict[str, dict[str, Callable[[object], bool]]] = {
    "csv": {
        "sep": _is_sign,
        "delimiter": _is_sign,
        "quotechar": _is_sign,
        "escapechar": _is_sign,
        "quoting": lambda value: value in (0, 1, 2, 3),
        "doublequote": _is_truth,
        "skipinitialspace": _is_truth,
        "encoding": lambda value: str(value).lower() in ("utf-8", "utf8", "utf-8-sig"),
        "names": _are_names,
        "column_names": _are_names,
        "header": _is_line,
        "skiprows": _is_line,
    },
    "json": {"field": lambda value: isinstance(value, str)},
    "parquet": {"columns": _are_names},
    "text": {"sample_by": lambda value: value in ("line", "paragraph", "document")},
}


def one_file(file: Path, name: str) -> DataFiles:
    """The format of a file, by its ending.

    Args:
        file: The file.
        name: What messages call it.

    Raises:
        CheckpointError: It has another ending, or a name that would be read as an address.
    """
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix not in LOADERS:
        raise CheckpointError(
            f"'{name}': expected one of {', '.join(LOADERS)} (.gz too), or a folder."
        )
    return _checked(LOADERS[suffix], [_local(file, name)])


def files_of(folder: Path, name: str) -> DataFiles:
    """The files of a folder that hold the rows of its `train` split.

    Args:
        folder: The folder.
        name: What messages call it.

    Raises:
        CheckpointError: It holds none, its card cannot be read or names something else, or a file
            is a pipe or a link to another place.
        ConfigError: Its card describes several data sets.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    entry = entry_of_card(folder)
    base = (folder.resolve() / entry.folder).as_posix()

    def find() -> Mapping[str, list[str]]:
        named = entry.files
        patterns = get_data_patterns(base) if named is None else sanitize_patterns(named)
        found: Mapping[str, list[str]] = DataFilesDict.from_patterns(patterns, base_path=base)
        return found

    _local(folder.resolve(), name)
    splits = call(f"'{name}': its files cannot be listed", find)
    if _SPLIT not in splits:
        others = ", ".join(shown(str(split)) for split in splits)
        raise CheckpointError(
            f"'{name}' has no split '{_SPLIT}', only {others}. Name the files that are meant."
        )
    loaders = {file: loader for file in splits[_SPLIT] if (loader := _loader_of(file))}
    if not loaders:
        raise CheckpointError(
            f"'{name}' holds no rows of text: expected files that end in {', '.join(LOADERS)}."
        )
    ((loader, _), *_) = Counter(loaders.values()).most_common(1)
    files = [file for file in loaders if loaders[file] == loader]
    loader, options = ("csv", {"sep": "\t"}) if loader == "tsv" else (loader, {})
    return _checked(
        loader,
        [_inside(Path(file), folder, name) for file in files],
        options | _settings_of(entry, loader, folder),
    )


def _settings_of(entry: CardEntry, loader: str, folder: Path) -> dict[str, object]:
    """The settings of a reader that a card makes, without which its rows would be others.

    Raises:
        CheckpointError: One is not for us to follow, or has an impossible value.
    """
    known = _SETTINGS.get(loader, {})
    module = importlib.import_module(f"datasets.packaged_modules.{loader}.{loader}")
    reader = getattr(module, f"{loader.capitalize()}Config")
    general = ("config_name", "data_files", "data_dir", "description", "version", "name")
    settings = {}
    for key, value in entry.settings.items():
        if key in general or not hasattr(reader, key):
            continue
        if key not in known or not known[key](value):
            raise CheckpointError(
                f"{folder}: its card reads the rows with {shown(key)}: {shown(value)}, which is "
                f"not done here. Name the files that are meant, or write them as JSONL."
            )
        settings[key] = value
    return settings


def _checked(
    loader: str, files: list[str], options: Mapping[str, object] | None = None
) -> DataFiles:
    """The files, after a pass over their bytes where their format is text."""
    options = options or {}
    sign = options.get("delimiter") or options.get("sep") or ","
    if loader in ("json", "csv", "text"):
        for file in files:
            check_bytes(Path(file), loader=loader, separator=str(sign).encode())
    elif loader == "parquet":
        for file in files:
            _check_columns(file)
    return DataFiles(loader, files, options)


def _check_columns(file: str) -> None:
    """Refuse a Parquet file with more columns than `datasets` can take."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    count = call(
        f"'{file}': datasets cannot read it", lambda: parquet.read_metadata(file).num_columns
    )
    if count > _COLUMNS:
        raise CheckpointError(
            f"{file}: it has {count:,} columns, expected at most {_COLUMNS:,}. Keep those that are "
            "needed."
        )


def entry_of_card(folder: Path) -> CardEntry:
    """What the card of a data folder says of its data set; nothing if there is none.

    Raises:
        CheckpointError: The card cannot be read, or names a file outside of the folder.
        ConfigError: It describes several data sets, none of which is the default.
    """
    for name in CARDS:
        card = folder / name
        if not card.exists():
            continue
        configs = _read_card(card).get("configs")
        if not isinstance(configs, list):
            continue
        chosen = [c for c in configs if isinstance(c, Mapping)]
        for config in chosen:
            _check_patterns(config.get("data_files"), card)
            _check_patterns(config.get("data_dir"), card)
        if len(chosen) > 1:
            chosen = [c for c in chosen if c.get("default") is True] or [
                c for c in chosen if c.get("config_name") == "default"
            ]
        if configs and len(chosen) != 1:
            names = ", ".join(
                shown(c.get("config_name")) for c in configs if isinstance(c, Mapping)
            )
            raise ConfigError(
                f"'{folder}' holds several data sets ({names}). Name the files that are meant."
            )
        if chosen:
            files: object = chosen[0].get("data_files")
            return CardEntry(files, str(chosen[0].get("data_dir") or ""), _by_name(chosen[0]))
    return CardEntry()


def _by_name(entry: Mapping[object, object]) -> dict[str, object]:
    return {key: value for key, value in entry.items() if isinstance(key, str)}


def _read_card(card: Path) -> Mapping[str, object]:
    """The front matter of a card; empty where there is none.

    Raises:
        CheckpointError: The card cannot be read.
    """
    try:
        text = read_text(card)
        if card.suffix == ".md":
            front = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
            text = front[1] if front else ""
        content = parse_yaml(text)
        return content if isinstance(content, Mapping) else {}
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    raise CheckpointError(f"{card}: cannot be read ({reason}). Remove it, or name the files.")


def _check_patterns(named: object, card: Path) -> None:
    """Refuse a name, at any depth, that is of no file inside of the card's folder."""
    values = [named]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += [v for key, v in value.items() if key != "split"]
        elif isinstance(value, list):
            values += value
        elif value is not None:
            text = str(value)
            if ":" in text or text.startswith(("/", "~")) or ".." in re.split(r"[/\\]", text):
                raise CheckpointError(
                    f"{card}: its data_files name {shown(text)}, which is not in the folder. "
                    "Nothing is fetched or read from elsewhere because a card says so: name the "
                    "data yourself, or remove the entry."
                )


def _loader_of(file: str) -> str | None:
    """The format of a file in a folder, which may be compressed: `a.jsonl.gz`."""
    path = Path(file)
    return _IN_FOLDERS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix)


def _inside(file: Path, folder: Path, name: str) -> str:
    """A file of a folder, if it is a regular one and no link to another place.

    Raises:
        CheckpointError: It is something else.
    """
    contained(folder, os.path.relpath(file, folder.resolve()))
    return _local(file, name)


def _local(file: Path, name: str) -> str:
    """A path as `datasets` takes it, which reads some names as addresses.

    Raises:
        CheckpointError: It is such a name.
    """
    path = str(file.absolute())
    if "::" in path or "://" in path:
        raise CheckpointError(
            f"'{name}': {shown(path)} would be read as an address. Rename the file or its folder."
        )
    return path
