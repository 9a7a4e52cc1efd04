"""The recipes of a file as stages: which of them make the models of others, and their order.

Source: https://github.com/arcee-ai/mergekit, docs/multimerge.md.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.mergekit.objects import Module, Recipe, Reference


def references(recipe: Recipe) -> Iterator[Reference]:
    """Every model that a recipe refers to, each time that it does."""
    bodies: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    if recipe.base_model is not None:
        yield recipe.base_model
    for body in bodies:
        yield from (source.model for source in body.models)
        for piece in body.slices:
            if piece.base_model is not None:
                yield piece.base_model
            yield from (source.model for source in piece.sources)
    if recipe.tokenizer is not None:
        models = [recipe.tokenizer.model]
        models += [token.model for token in recipe.tokenizer.tokens.values()]
        yield from (model for model in models if model is not None)


def needed_names(recipe: Recipe, names: Container[str | None]) -> list[str]:
    """The stages whose outputs a recipe refers to, each once.

    Args:
        recipe: The recipe.
        names: Those of all stages of its file.
    """
    found = (name for model in references(recipe) for name in _stages(model, names).values())
    return list(dict.fromkeys(found))


def place_of(model: Reference, outputs: Mapping[str, str], label: str) -> str:
    """Where a model is: a path, a Hub id, or where the output of a stage is.

    Args:
        model: The model, as a recipe refers to it.
        outputs: Where the outputs of the stages are, by their names.
        label: The recipe, for messages.

    Raises:
        ConfigError: A path has a mark in it that stands before an adapter or a revision.
    """
    places = {key: outputs[name] for key, name in _stages(model, outputs).items()}
    placed = model.model_copy(update=places)
    if any(mark in text for text in (placed.path, placed.adapter or "") for mark in "+@"):
        raise ConfigError(
            f"{label}: model '{placed}': '+' and '@' in a path cannot be told from those before an "
            "adapter and a revision. Rename the folder."
        )
    return str(placed)


def _stages(model: Reference, names: Container[str | None]) -> dict[str, str]:
    """What of a reference is the name of a stage: `path`, `adapter` or both.

    A name without a revision is that of a stage, also where a folder has it.
    """
    given = {
        "path": (model.path, model.revision),
        "adapter": (model.adapter, model.adapter_revision),
    }
    return {
        key: name
        for key, (name, revision) in given.items()
        if name is not None and revision is None and name in names
    }


def in_order(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """The recipes, each behind those whose outputs it refers to.

    The one without a name, whose output is that of the file, comes last.

    Args:
        recipes: Those of a file, with names of their own.

    Raises:
        ConfigError: Recipes refer to each other in a circle, or one to its own output.
    """
    by_name = {recipe.name: recipe for recipe in recipes}
    sorter: TopologicalSorter[str | None] = TopologicalSorter()
    for recipe in recipes:
        sorter.add(recipe.name, *needed_names(recipe, by_name))
    try:
        names = list(sorter.static_order())
    except CycleError as error:
        circle = " and ".join(map(shown, dict.fromkeys(error.args[1])))
        raise ConfigError(
            f"{by_name[error.args[1][0]].label}: the outputs of the merges {circle} are needed to "
            "make each other. Give a stage a name that no model has which it merges."
        ) from None
    return tuple(by_name[name] for name in sorted(names, key=lambda name: name is None))
