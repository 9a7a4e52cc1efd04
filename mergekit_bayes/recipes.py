"""Recipes: the resolved settings of a merge as YAML. Recipes of mergekit are recognised."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.side_files import MERGE_RECIPE
from mergekit_bayes.configs import read_yaml, read_yaml_documents
from mergekit_bayes.errors import ConfigError

_HEADER = """\
# bmerge merge THIS -o OUT gives the same bytes again, from the same models and precisions.
# Paths are relative to the folder in which bmerge runs.
"""
_MERGEKIT_HEADER = """\
# bmerge merge THIS{flags} -o OUT gives the same bytes again, from the same models.
# Paths are relative to the folder in which bmerge runs. The models' content hashes, which tell
# whether they are the same, and which bmerge does not compare:
"""
_FLAGS = re.compile(r"# bmerge merge THIS(?P<flags>.*) -o OUT gives the same bytes again")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe of `bmerge merge`: a YAML file of settings.

    Raises:
        ConfigError: The file cannot be read, is a folder, is not YAML, or is a recipe of mergekit.
    """
    if path.is_dir():
        if (path / MERGE_RECIPE).is_file():
            raise ConfigError(
                f"'{path}' is a folder. Name its recipe itself, '{path / MERGE_RECIPE}'."
            )
        raise ConfigError(
            f"'{path}' is a folder without a {MERGE_RECIPE}, so it is no merge. Name a recipe: "
            "a YAML file of a merge's settings, as `bmerge merge` writes it beside its output's "
            "tensors."
        )
    if any("merge_method" in document for document in read_yaml_documents(path)):
        raise ConfigError(
            f"{path}: 'merge_method' is mergekit's, and this takes our own. `bmerge "
            f"merge {path} -o OUT`, with none of --then and --predict, carries it out."
        )
    return read_yaml(path)


def recipe_text(settings: Mapping[str, object]) -> str:
    """The text of a recipe with these settings."""
    import yaml  # at the end of a merge, not at its start

    return _HEADER + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=120)


def mergekit_header(flags: Mapping[str, str]) -> str:
    """The comment above a recipe of mergekit: the command that repeats the bytes.

    Args:
        flags: What the command needs besides the recipe: values by the names of flags, `on-bad`.
    """
    words = "".join(f" --{name} {shlex.quote(value)}" for name, value in flags.items())
    return _MERGEKIT_HEADER.format(flags=words)


def flags_in(text: str) -> dict[str, str]:
    """The flags that the comment above a recipe of mergekit names; empty without such a comment."""
    match = _FLAGS.match(text)
    try:
        words = shlex.split(match["flags"]) if match is not None else []
    except ValueError:  # somebody has edited it
        return {}
    names = [word.removeprefix("--") for word in words[::2]]
    return dict(zip(names, words[1::2], strict=False))
