"""Recipes: the resolved settings of a merge as YAML. Recipes of mergekit are recognised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_bayes.checkpoint.side_files import MERGE_RECIPE
from mergekit_bayes.configs import read_yaml
from mergekit_bayes.errors import ConfigError

_HEADER = """\
# bmerge merge THIS -o OUT gives the same bytes again, from the same models and precisions.
# Paths are relative to the folder in which bmerge runs.
"""


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
    recipe = read_yaml(path)
    if "merge_method" in recipe:
        raise ConfigError(
            f"{path}: 'merge_method' is mergekit's, and this takes our own. `bmerge "
            f"merge {path} -o OUT`, with none of --then and --predict, carries it out."
        )
    return recipe


def recipe_text(settings: Mapping[str, object]) -> str:
    """The text of a recipe with these settings."""
    return _HEADER + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=120)
