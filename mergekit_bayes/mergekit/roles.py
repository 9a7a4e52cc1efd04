"""Which model of a recipe is the base, and which are the tasks, by its method."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError, nearest
from mergekit_bayes.mergekit.bodies import bodies_of
from mergekit_bayes.mergekit.objects import Recipe, Reference, Setting, Source
from mergekit_bayes.mergekit.values import Kind, check_settings
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.recipe_table import RECIPE_METHODS

WEIGHT = "weight"
SEED = "seed"  # which mergekit takes on its command line, and ignores in a recipe
_UNWEIGHED = ("karcher", "sce")  # whose models have weights here, and none in mergekit
_OF_MODELS = ("density", "epsilon", "gamma", "scale")  # settings that each model may have


class Part(NamedTuple):
    """Models that are merged with each other: all of a recipe, or those of a slice.

    Attributes:
        base: The base with its layers; None where the method takes none.
        tasks: The other models.
        listed: All of them, in the recipe's order.
        levels: What is set for all of them, the nearest first.
        place: Where the recipe says it, for messages.
    """

    base: Source | None
    tasks: tuple[Source, ...]
    listed: tuple[Source, ...]
    levels: tuple[Mapping[str, Setting], ...]
    place: str

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base, if any, and the tasks."""
        return self.tasks if self.base is None else (self.base, *self.tasks)


def method_of(recipe: Recipe) -> Method:
    """The method of a recipe, whose settings are those that it has.

    Raises:
        ConfigError: There is no such method, or it has no such setting.
    """
    name = recipe.merge_method
    if name not in RECIPE_METHODS:
        near = nearest(name, RECIPE_METHODS)
        hint = f"did you mean '{near}'?" if near else f"possible are {', '.join(RECIPE_METHODS)}."
        raise ConfigError(f"{recipe.label}: merge_method: unknown method '{name}'; {hint}")
    method = RECIPE_METHODS[name]
    kinds = {p.name: kind_of(p) for p in method.parameters}
    of_models: dict[str, Kind] = {n: k for n, k in kinds.items() if n in _OF_MODELS}
    if is_weighed(method):
        of_models[WEIGHT] = "number"
    check_settings(recipe, of_models, {n: k for n, k in kinds.items() if n not in of_models})
    return method


def is_of_models(name: str) -> bool:
    """Whether each model may have a setting of its own."""
    return name in _OF_MODELS


def is_weighed(method: Method) -> bool:
    """Whether the models of a method's recipes have weights."""
    return method.takes_scales and method.name not in _UNWEIGHED


def kind_of(parameter: Parameter) -> Kind:
    """What the values of a setting are in a recipe."""
    if isinstance(parameter.default, int) and (parameter.low, parameter.high) == (0, 1):
        return "truth"
    if parameter.choices:
        return "text"
    return "whole" if isinstance(parameter.default, int) else "number"


def parts_of(recipe: Recipe, method: Method) -> tuple[Part, ...]:
    """The parts of a recipe: of each body one of whole models, or one for each slice.

    A model that is the base is no task of a method that adds changes to a base; a method that
    takes none has `base_model` as one more model, as in mergekit.

    Args:
        recipe: The recipe.
        method: Its method.

    Raises:
        ConfigError: The method needs a base, or another number of models; or some parts have a base
            and others none.
    """
    parts = tuple(_checked(recipe, method, part) for part in _parts(recipe, method))
    _refuse_mixed(recipe, parts)
    named = recipe.base_model
    if named is not None and not any(s.model == named for part in parts for s in part.sources):
        raise ConfigError(
            f"{recipe.label}: base_model: nothing is made of '{named}', which is in none of the "
            "slices. List its layers, or leave it out."
        )
    return parts


def _refuse_mixed(recipe: Recipe, parts: Sequence[Part]) -> None:
    """Refuse a base of some parts only: what is merged is then not one thing."""
    based = next((part for part in parts if part.base is not None), None)
    free = next((part for part in parts if part.base is None), None)
    if based is not None and free is not None:
        raise ConfigError(
            f"{recipe.label}: {based.place}.base_model: '{recipe.merge_method}' would have a base "
            f"there, and none in {free.place}. Give the recipe one base_model, each slice its own, "
            "or none to all."
        )


def _parts(recipe: Recipe, method: Method) -> Iterator[Part]:
    for body in bodies_of(recipe):
        if body.models:
            base, tasks = _split(recipe, method, recipe.base_model, body.models)
            listed = body.models if base is None or base in body.models else (*body.models, base)
            listed = listed if base is not None else tasks
            place = f"{body.place}.models".lstrip(".")
            yield Part(base, tasks, listed, body.levels, place)
        for piece in body.slices:
            named = piece.base_model or recipe.base_model
            base, tasks = _split(recipe, method, named, piece.sources, piece.place)
            levels = (piece.parameters, *body.levels)
            yield Part(base, tasks, piece.sources, levels, piece.place)


def _split(
    recipe: Recipe,
    method: Method,
    base: Reference | None,
    sources: Sequence[Source],
    place: str | None = None,
) -> tuple[Source | None, tuple[Source, ...]]:
    """The base and the tasks among some models; `place` is that of a slice."""
    takes = method.needs_base or method.takes_base
    listed = [source for source in sources if source.model == base]
    if len(listed) > 1 and takes:
        raise ConfigError(
            f"{recipe.label}: {place or 'models'}: expected the base_model '{base}' once among "
            f"them, found it {len(listed)} times."
        )
    if base is None:
        if method.needs_base:
            raise ConfigError(
                f"{recipe.label}: base_model: '{method.name}' needs one, and none was given."
            )
        return None, tuple(sources)
    if place is not None and not listed and takes:
        raise ConfigError(
            f"{recipe.label}: {place}.sources: expected the layers of the base_model '{base}' "
            "among them, found none. List it with its layer_range."
        )
    whole = listed[0] if listed else Source(model=base)
    others = tuple(source for source in sources if source is not whole)
    if takes:
        return whole, others
    # One more model, which comes first: the output has its config and tokenizer.
    return None, (whole, *others) if listed or place is None else tuple(sources)


def _checked(recipe: Recipe, method: Method, part: Part) -> Part:
    count = len(part.tasks)
    wanted = method.tasks
    if count < method.fewest or (wanted is not None and count != wanted):
        beside = " beside the base_model" if part.base is not None else ""
        number = f"at least {method.fewest}" if wanted is None else str(wanted)
        expected = f"{number} model{'s' * ((wanted or method.fewest) > 1)}{beside}"
        raise ConfigError(
            f"{recipe.label}: {part.place}: '{method.name}' merges {expected}, found {count}."
        )
    return part
