"""The merges of a file with several documents, in the order in which one needs another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.replacing import real_output
from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge.report import MergeReport
from mergekit_bayes.mergekit.objects import Recipe
from mergekit_bayes.mergekit.planning import checked_parts, plan_recipe
from mergekit_bayes.mergekit.roles import method_of
from mergekit_bayes.mergekit.stage_folders import RECORD, refuse_taken
from mergekit_bayes.mergekit.stages import in_order, needed_names
from mergekit_bayes.mergekit.written import joined
from mergekit_bayes.plan import MergeConfig, MergePlan, report_path
from mergekit_bayes.plan.outputs import refuse_replacing

_TAKEN = (".partial", ".safetensors", RECORD)  # endings of what is no folder of a stage
STAGES = ".stages"  # ending of the folder of what later documents need, beside the output


class Made(NamedTuple):
    """A merge whose output others need.

    Attributes:
        place: Its output.
        recipe: Its resolved recipe.
        models: What its report says of the models that it merged.
    """

    place: str
    recipe: str
    models: tuple[dict[str, object], ...]


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

    def plan(self, earlier: Sequence[Made] = ()) -> MergePlan:
        """The plan of the merge, as `plan_recipe` makes it.

        Args:
            earlier: The merges before, of which recipe and report of the file's output tell.
        """
        plan = plan_recipe(self.recipe, self.settings, seed=self.seed, outputs=self.outputs)
        if not (self.is_last and earlier):
            return plan
        return replace(
            plan,
            recipe=joined([*(made.recipe for made in earlier), plan.recipe or ""]),
            stages={made.place: made.models for made in earlier},
        )


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
        ConfigError: All documents have names, some need each other, or one lacks something.
    """
    out = settings.out or "merged"
    if len(recipes) == 1:
        return (Stage(recipes[0], settings.model_copy(update={"out": out}), {}, seed, True),)
    if all(recipe.name is not None for recipe in recipes):
        last = recipes[-1]
        if any(last.name in needed_names(recipe, {last.name or ""}) for recipe in recipes):
            raise ConfigError(
                f"{last.label}: name: all documents have names, so that the output is that of the "
                "last one, and another one needs it. Leave the name of the output's out."
            )
        recipes = [*recipes[:-1], last.model_copy(update={"name": None})]
    if out.endswith(".safetensors"):
        raise ConfigError(f"-o {out}: a file of several recipes writes folders. Name a folder.")
    if any(mark in out for mark in "+@"):
        raise ConfigError(
            f"-o {out}: recipes name the outputs of others there, in which '+' and '@' stand "
            "before an adapter and a revision. Choose another -o."
        )
    draws = any(method_of(recipe).random for recipe in recipes)
    seeds = {r.name: seed if method_of(r).random or not draws else None for r in recipes}
    for recipe in recipes:  # before the first of them is merged for hours
        checked_parts(recipe, settings, seeds[recipe.name])
    folder = Path(f"{out.rstrip('/')}{STAGES}")
    outputs = {r.name: str(folder / _safe(r)) for r in recipes if r.name is not None}
    found = []
    for recipe in in_order(recipes):
        is_last = recipe.name is None
        place = out if is_last or recipe.name is None else outputs[recipe.name]
        update: dict[str, object] = {"out": place} if is_last else {"out": place, "force": True}
        updated = settings.model_copy(update=update)
        found.append(Stage(recipe, updated, outputs, seeds[recipe.name], is_last))
    return tuple(found)


def refuse_existing(stages: Sequence[Stage]) -> None:
    """Refuse outputs that are there already, before the first merge.

    Raises:
        CheckpointError: The output exists and is not to be replaced, or something that no merge
            wrote is where that of another document goes.
    """
    for stage in stages:
        if stage.is_last:
            place = real_output(stage.place) if stage.place.is_symlink() else stage.place
            refuse_replacing(place, place, force=stage.settings.force)
        else:
            refuse_taken(stage.place)


def made_by(stage: Stage, plan: MergePlan) -> Made:
    """What later merges tell of one that is complete.

    Raises:
        CheckpointError: Its report cannot be read.
    """
    models = read_record(MergeReport, report_path(plan.target)).models
    told = tuple(model.model_dump(mode="json") for model in models)
    return Made(stage.settings.out or "", plan.recipe or "", told)


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
