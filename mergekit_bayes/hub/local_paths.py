"""What is not to be published: local paths, shown by their last part, and tokens of the Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.layout import POSTERIOR_ENDING
from mergekit_bayes.documents import DocumentError, read_bytes
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.hub.parents import Parent

_TOKEN = re.compile(r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{34}(?![A-Za-z0-9_])")
_LETTERS = 10  # different ones; an example in a card may be hf_xxxx
_SEARCHED = 4 << 20  # bytes; only vocabularies are larger
_PATH = re.compile(r"[\s\"':\[,](/|~/)[\w.-]+/")


def last_parts(value: object) -> object:
    """A value of a record with each local path in it, also in BASE+ADAPTER, by its last part."""
    if isinstance(value, dict):
        return {last_parts(k): last_parts(v) for k, v in value.items()}
    if isinstance(value, list):
        return [last_parts(v) for v in value]
    return "+".join(map(_last_part, value.split("+"))) if isinstance(value, str) else value


def published_recipe(recipe: Mapping[str, object], made_from: Sequence[Parent]) -> object:
    """A recipe as a card shows it.

    Local models have the names of the card's table, and settings that were left out are left out.
    """
    names = {p.path: p.name for p in made_from if p.path and p.repo is None}
    names |= {f"{p.path}: {p.run}": p.title for p in made_from if p.path and p.run is not None}
    if isinstance(place := recipe.get("side_files"), str):
        mixtures = (p.path for p in made_from if p.path and p.run is not None)
        inside = next((path for path in mixtures if place.startswith(f"{path}/")), None)
        if inside is not None:  # the folder of a run in its mixture
            recipe = {**recipe, "side_files": names[inside] + place.removeprefix(inside)}
    return last_parts(_named(recipe, names))


def _named(value: object, names: Mapping[str, str]) -> object:
    if isinstance(value, dict):
        pairs = ((names.get(k, k), _named(v, names)) for k, v in value.items())
        return {k: v for k, v in pairs if v not in (None, {}, [])}
    if isinstance(value, list):
        return [_named(v, names) for v in value]
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    # MODEL:REGEX=X of --scale, and BASE+ADAPTER, whose parts are two parents.
    model, colon, rest = value.partition(":")
    if colon and model in names:
        return names[model] + colon + rest
    return "+".join(names.get(part, part) for part in value.split("+"))


def without_paths(note: str, made_from: Sequence[Parent]) -> str:
    """A note of a merge, in which the paths of its models are replaced by their names."""
    for parent in made_from:
        if parent.path and parent.run is not None:
            note = note.replace(f"{parent.path}: {parent.run}", parent.title)
    for parent in made_from:
        if parent.path and "/" in parent.path:
            note = note.replace(parent.path, parent.name)
    return note


def names_paths(file: Path) -> bool:
    """Whether a file of text names an absolute path, or one in a home folder.

    Raises:
        CheckpointError: It is too large, or no regular file.
    """
    return bool(_PATH.search(_content(file)))


def holds_token(file: Path) -> bool:
    """Whether a file of text holds what has the form of a token; large files are not searched."""
    if file.suffix in (".safetensors", POSTERIOR_ENDING) or file.stat().st_size > _SEARCHED:
        return False
    return has_token(_content(file))


def has_token(text: str) -> bool:
    """Whether a text holds what has the form of a token, and is no row of the same letters."""
    return any(len(set(match[0])) > _LETTERS for match in _TOKEN.finditer(text))


def _content(file: Path) -> str:
    try:
        return read_bytes(file).decode(errors="replace")
    except DocumentError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None


def _last_part(text: str) -> str:
    is_path = text.startswith(("/", "~", ".")) and len(text) > 2 and " " not in text
    return Path(text).name if is_path else text
