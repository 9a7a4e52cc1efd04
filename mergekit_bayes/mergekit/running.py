"""The merges of a file with several documents, in the order in which one needs another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit.objects import Recipe
from mergekit_bayes.mergekit.planning import plan_recipe
from mergekit_bayes.mergekit.stage_folders import RECORD
from mergekit_bayes.mergekit.stages import in_order
from mergekit_bayes.plan import MergeConfig, MergePlan

_TAKEN = (".partial", ".safetensors", RECORD)  # endings of what is no folder of a stage
STAGES = ".stages"  # ending of the folder of what later documents need, beside the output


@dataclass(frozen=True)
class Stage:
    """One merge of a file of recipes.

    Attributes:
        recipe: What is merged.
        settings: Where its output goes, and the rules of every merge.
        outputs: Where the outputs of other documents are, by name.
        seed: Of a random method.
        is_last: Whether its output is that of the file.
    """

    recipe: Recipe
    settings: MergeConfig
    outputs: Mapping[str, str]
    seed: int | None
    is_last: bool

    @property
    def place(self) -> Path:
        """Where its output goes."""
        return Path(self.settings.out or "merged").expanduser()

    def plan(self) -> MergePlan:
        """The plan of the merge, as `plan_recipe` makes it."""
        return plan_recipe(self.recipe, self.settings, seed=self.seed, outputs=self.outputs)


def stages_of(
    recipes: Sequence[Recipe], settings: MergeConfig, *, seed: int | None = None
) -> tuple[Stage, ...]:
    """The merges of a file, each after those whose outputs it needs.

    The one without a name is the output of the file; the others go to `OUT.stages/NAME`.

    Args:
        recipes: The documents.
        settings: Those of the output.
        seed: Of random methods, in place of the recipes'.

    Raises:
        ConfigError: All documents have names, or some need each other.
    """
    out = settings.out or "merged"
    if len(recipes) == 1:
        return (Stage(recipes[0], settings.model_copy(update={"out": out}), {}, seed, True),)
    if all(recipe.name is not None for recipe in recipes):
        raise ConfigError(
            f"{recipes[-1].label}: name: one document, whose output is that of the file, has no "
            "name. Leave it out there."
        )
    if out.endswith(".safetensors"):
        raise ConfigError(f"-o {out}: a file of several recipes writes folders. Name a folder.")
    folder = Path(f"{out.rstrip('/')}{STAGES}")
    outputs = {r.name: str(folder / _safe(r)) for r in recipes if r.name is not None}
    found = []
    for recipe in in_order(recipes):
        is_last = recipe.name is None
        place = out if is_last or recipe.name is None else outputs[recipe.name]
        update: dict[str, object] = {"out": place} if is_last else {"out": place, "force": True}
        found.append(Stage(recipe, settings.model_copy(update=update), outputs, seed, is_last))
    return tuple(found)


def _safe(recipe: Recipe) -> str:
    """The name of a document as that of a folder.

    Raises:
        ConfigError: It is none.
    """
    name = recipe.name or ""
    if name in (".", "..") or any(mark in name for mark in "/\\\0+@"):
        raise ConfigError(
            f"{recipe.label}: name: expected the name of a folder, found '{name}'. Use letters, "
            "digits, '-', '_' and '.'."
        )
    if ending := next((ending for ending in _TAKEN if name.endswith(ending)), None):
        raise ConfigError(
            f"{recipe.label}: name: '{name}' ends in '{ending}', which is that of files beside a "
            "merge. Choose another."
        )
    return name
