"""The merges of a file with several documents, in the order in which one needs another."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import BmergeError, ConfigError
from mergekit_bayes.merge.report import MergeReport
from mergekit_bayes.mergekit.objects import Module, Recipe, Reference
from mergekit_bayes.mergekit.planning import plan_recipe
from mergekit_bayes.plan import MergeConfig, MergePlan, recipe_path, report_path

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
    seed: int
    is_last: bool

    def plan(self) -> MergePlan:
        """The plan of the merge, as `plan_recipe` makes it."""
        return plan_recipe(self.recipe, self.settings, seed=self.seed, outputs=self.outputs)


def stages_of(
    recipes: Sequence[Recipe], settings: MergeConfig, *, seed: int = 0
) -> tuple[Stage, ...]:
    """The merges of a file, each after those whose outputs it needs.

    The one without a name is the output of the file; the others go to `OUT.stages/NAME`.

    Args:
        recipes: The documents.
        settings: Those of the output.
        seed: Of random methods.

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
    for recipe in _ordered(recipes):
        is_last = recipe.name is None
        place = out if is_last or recipe.name is None else outputs[recipe.name]
        update: dict[str, object] = {"out": place} if is_last else {"out": place, "force": True}
        found.append(Stage(recipe, settings.model_copy(update=update), outputs, seed, is_last))
    return tuple(found)


def is_done(plan: MergePlan) -> bool:
    """Whether the output of a plan is there already: the same recipe, of the same models."""
    try:
        report = read_record(MergeReport, report_path(plan.target))
        written = recipe_path(plan.target).read_text(encoding="utf-8")
    except (BmergeError, OSError, ValueError):
        return False
    identities = [model.identity for model in report.models]
    return written == plan.recipe and identities == [m.posterior.identity for m in plan.inputs]


def references_of(recipe: Recipe) -> Iterator[Reference]:
    """All models that a recipe names."""
    bodies: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    if recipe.base_model is not None:
        yield recipe.base_model
    for body in bodies:
        for source in body.models:
            yield source.model
        for piece in body.slices:
            if piece.base_model is not None:
                yield piece.base_model
            for source in piece.sources:
                yield source.model
    if recipe.tokenizer is not None:
        named = [recipe.tokenizer.model, *(t.model for t in recipe.tokenizer.tokens.values())]
        yield from (model for model in named if model is not None)


def _ordered(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, each after those that it names; the one without a name last."""
    names = {recipe.name for recipe in recipes if recipe.name is not None}
    waiting, done, ordered = list(recipes), set[str | None](), list[Recipe]()
    while waiting:
        ready = [r for r in waiting if _needs(r, names) <= done and r.name is not None]
        if not ready:
            ready = [r for r in waiting if _needs(r, names) <= done]
        if not ready:
            raise ConfigError(
                f"{waiting[0].label}: it needs {_listed(_needs(waiting[0], names) - done)}, and "
                "the documents need each other in a circle."
            )
        ordered.append(ready[0])
        done.add(ready[0].name)
        waiting.remove(ready[0])
    return ordered


def _needs(recipe: Recipe, names: set[str]) -> set[str | None]:
    return {ref.path for ref in references_of(recipe) if ref.path in names}


def _listed(names: set[str | None]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(map(str, names)))


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
    return name
