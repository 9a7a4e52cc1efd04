"""Mappings and records in files; what is wrong with one is an error with the file's name."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_bayes.documents.files import (
    CONFIG,
    SETTINGS,
    SIDE_FILE,
    DocumentError,
    read_bytes,
    read_text,
)
from mergekit_bayes.documents.json_text import parse_json
from mergekit_bayes.documents.yaml_text import parse_yaml
from mergekit_bayes.errors import CheckpointError, shown

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound="BaseModel")
_WORDS = {  # of pydantic, in ours
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "string": "text",
    "integer": "whole number",
    "dictionary": "mapping",
    "tuple": "list",
    "boolean": "truth value",
}


def read_mapping(
    file: Path, what_to_do: str = "Write it again, or remove it.", limit: int = SIDE_FILE
) -> dict[str, Any]:
    """The mapping in a JSON file, or in a YAML file by its ending.

    Args:
        file: The file.
        what_to_do: The last sentence of the message if it cannot be read.
        limit: The most bytes of JSON that are read.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    try:
        if file.suffix in (".yaml", ".yml"):
            content = parse_yaml(read_text(file, SETTINGS))
        else:
            content = parse_json(read_bytes(file, limit))
        if not isinstance(content, dict):
            raise DocumentError("it is not a mapping")
        if not all(isinstance(key, str) for key in content):
            raise DocumentError("its keys are not all text")
        return content
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    raise CheckpointError(f"{file}: cannot be read ({reason}). {what_to_do}")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `CONFIG` bytes; empty if it cannot be read.

    For what a merge can do without.
    """
    try:
        return read_mapping(file, limit=CONFIG)
    except CheckpointError:
        return {}


def as_record(model: type[M], content: object) -> M:
    """The record that parsed JSON or YAML holds.

    Raises:
        DocumentError: It is not such a record; the reason says what is wrong first.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise DocumentError(_in_words(error.errors(include_url=False)[0])) from None


def _in_words(error: "ErrorDetails") -> str:
    """What is wrong with a record, without pydantic's words for it."""
    keys, kind = error["loc"], error["type"]
    # Of a union pydantic adds the member that it tried, and of a key that it is one.
    name = shown(".".join(map(str, keys))[:200]) if keys else "it"
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return f"{name} is no key of it"
    reason = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    expected = reason.removeprefix("Input should be ").removeprefix("a valid ")
    for word, ours in _WORDS.items():
        expected = expected.replace(word, ours)
    found = shown(error["input"])
    return f"{name} is {found}, " + (
        f"expected {expected}" if reason.startswith("Input should be ") else reason
    )


def read_record(model: type[M], file: Path, what_to_do: str = "Write it again, or remove it.") -> M:
    """The record in a JSON or YAML file.

    Args:
        model: The record's class.
        file: The file.
        what_to_do: The last sentence of the message if it cannot be read.

    Raises:
        CheckpointError: The file cannot be read, or holds something else.
    """
    content = read_mapping(file, what_to_do)
    try:
        return as_record(model, content)
    except DocumentError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). {what_to_do}") from None
