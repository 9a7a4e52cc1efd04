"""The recipes of the comparison with mergekit, which lie in `mergekit_recipes/` as files.

A recipe is a file as mergekit reads it. Its first lines are comments that say of which models it
is (`# models:`, a folder of `mergekit_models`) and what else holds of the comparison.
"""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).with_name("mergekit_recipes")


class Recipe(NamedTuple):
    """One recipe.

    Attributes:
        name: Its file's.
        file: The file.
        models: The folder in which it runs.
        refused: Why bmerge refuses it, where that is intended.
        experts: "apart" where bmerge merges the experts of a mixture one by one, as they are
            stored, and mergekit as one tensor, which matters to rules of whole tensors.
    """

    name: str
    file: Path
    models: str
    refused: str = ""
    experts: str = ""


def recipes() -> list[Recipe]:
    """All recipes, in the order of their names."""
    return [_read(file) for file in sorted(FOLDER.glob("*.yml"))]


def _read(file: Path) -> Recipe:
    about = {}
    for line in file.read_text().splitlines():
        if not line.startswith("# "):
            break
        key, _, value = line.removeprefix("# ").partition(": ")
        about[key] = value
    return Recipe(file.stem, file, **about)
