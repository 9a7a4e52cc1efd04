"""Readers of what is typed at a flag: numbers, `MODEL=VALUE`, `COLUMN=VALUE`, `NAME=TEXTS`.

Each takes what was typed and the name of the flag, and raises a `ConfigError` that names both.
"""

import os
from collections.abc import Sequence

from mergekit_bayes.documents import DocumentError, parse_yaml
from mergekit_bayes.errors import ConfigError

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "fp32": "F32",
    "fp16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def number(text: str, flag: str) -> float:
    """One number."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag}: '{text}' is not a number.") from None


def assignments(items: Sequence[str], flag: str, what: str = "MODEL") -> dict[str, str]:
    """`MODEL=VALUE` as a mapping. The last '=' separates, since a path may contain one."""
    values = {}
    for item in items:
        name, separator, value = item.rpartition("=")
        if not separator or not name or not value:
            raise ConfigError(f"{flag}: expected {what}=VALUE, found '{item}'.")
        values[name] = value
    return values


def parameters(items: Sequence[str], flag: str) -> dict[str, str]:
    """`NAME=VALUE` as a mapping."""
    return assignments(items, flag, "NAME")


def numbers(items: Sequence[str], flag: str) -> dict[str, float]:
    """`MODEL=X` as a mapping to numbers."""
    return {model: number(text, flag) for model, text in assignments(items, flag).items()}


def scales(items: Sequence[str], flag: str) -> tuple[float | str, ...]:
    """Numbers, and rules `MODEL:REGEX=X` as they are."""
    return tuple(item if "=" in item else number(item, flag) for item in items)


def vector(text: object, flag: str) -> tuple[float, ...]:
    """Numbers with commas between them; a repeated flag goes on with the vector."""
    texts = text if isinstance(text, list) else [text]
    return tuple(number(word, flag) for item in texts for word in str(item).split(","))


def vectors(items: Sequence[str], flag: str) -> tuple[tuple[float, ...], ...]:
    """A vector for each time that the flag is given."""
    return tuple(vector(item, flag) for item in items)


def dtype(text: str, flag: str) -> str | None:
    """A dtype by the name that safetensors gives it; torch's names are understood, too."""
    return _DTYPES.get(text.lower(), text.upper()) or None


def models(items: Sequence[str], flag: str) -> tuple[str, ...]:
    """Paths and Hub ids. A number among them belongs to a flag that was not repeated."""
    for item in items:
        try:
            float(item)
        except ValueError:
            continue
        raise ConfigError(
            f"'{item}' is a number, not a model. Repeat the flag for each model: --scale 1 --scale "
            f"{item}."
        )
    return tuple(items)


def selection(items: Sequence[str], flag: str) -> dict[str, object]:
    """`COLUMN=VALUE` as a filter of rows. Values are YAML, so that `label=1` is a number."""
    values: dict[str, object] = {}
    for item in items:
        column, separator, value = item.partition("=")
        if not separator or not column or not value:
            raise ConfigError(f"{flag}: expected COLUMN=VALUE, found '{item}'.")
        try:
            values[column] = parse_yaml(value)
        except DocumentError:
            values[column] = value
    return values


def named_texts(items: Sequence[str], flag: str) -> dict[str, str]:
    """`NAME=TEXTS`, or texts that are called by their own path."""
    sets: dict[str, str] = {}
    for item in items:
        name, separator, texts = item.partition("=")
        if not separator or os.path.exists(item):
            name, texts = item, item
        if not name or not texts:
            raise ConfigError(f"{flag}: expected TEXTS or NAME=TEXTS, found '{item}'.")
        if name in sets:
            raise ConfigError(f"{flag}: '{name}' is named twice.")
        sets[name] = texts
    return sets
