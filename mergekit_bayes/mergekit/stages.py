"""The recipes of a file as stages: which of them make the models of others, and their order.

Source: https://github.com/arcee-ai/mergekit, docs/multimerge.md.
"""

from collections.abc import Iterator, Mapping, Sequence
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


def needed_stages(recipe: Recipe, stages: Mapping[str | None, Recipe]) -> list[Recipe]:
    """The recipes whose outputs a recipe refers to by their names.

    A name without a revision is that of a stage, also where a folder has it.

    Args:
        recipe: The recipe.
        stages: All recipes of its file, by name.
    """
    names: dict[str, None] = {}
    for model in references(recipe):
        pairs = ((model.path, model.revision), (model.adapter, model.adapter_revision))
        names |= dict.fromkeys(path for path, revision in pairs if path and revision is None)
    return [stages[name] for name in names if name in stages]


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
        sorter.add(recipe.name, *[stage.name for stage in needed_stages(recipe, by_name)])
    try:
        names = list(sorter.static_order())
    except CycleError as error:
        circle = " and ".join(map(shown, dict.fromkeys(error.args[1])))
        raise ConfigError(
            f"{by_name[error.args[1][0]].label}: the outputs of the merges {circle} are needed to "
            "make each other. Give a stage a name that no model has which it merges."
        ) from None
    return tuple(by_name[name] for name in sorted(names, key=lambda name: name is None))
