"""The bodies of a recipe: all of a model, or parts of it by the names of modules.

mergekit names the modules of each architecture (`text_decoder`, `vision_tower`,
`multi_modal_projector`). Here a module is the tensors whose names say the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.mergekit.objects import Recipe, Setting, Slice, Source

# In the order in which a name is judged: the projector of a vision tower is a projector.
_GROUPS = {
    "projector": re.compile(r"project(or|ion)|connector|merger|(^|\.)mm_"),
    "vision": re.compile(r"vis(ion|ual)|image|img"),
    "audio": re.compile(r"audio|speech"),
}
_TEXT = "text"
_TEXT_NAMES = re.compile(r"text|language|decoder|llm")


class Body(NamedTuple):
    """What all or some tensors of the output are made of.

    Attributes:
        models: Whole models; empty where there are slices.
        slices: Slices, from below.
        levels: What is set for all of it, the nearest first.
        group: Which tensors it makes; None for all.
        place: Where the recipe says it, for messages; empty for the recipe itself.
    """

    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    levels: tuple[Mapping[str, Setting], ...]
    group: str | None
    place: str

    def makes(self, name: str) -> bool:
        """Whether a tensor belongs to it."""
        return self.group is None or group_of(name) == self.group


def bodies_of(recipe: Recipe) -> tuple[Body, ...]:
    """The bodies of a recipe.

    Raises:
        ConfigError: A module is not known by its name, or two make the same tensors.
    """
    if not recipe.modules:
        return (Body(recipe.models, recipe.slices, (recipe.parameters,), None, ""),)
    bodies: list[Body] = []
    for name, module in recipe.modules.items():
        group = _module_group(recipe, name)
        if any(body.group == group for body in bodies):
            raise ConfigError(
                f"{recipe.label}: modules.{name}: another module makes the same tensors. Name the "
                "parts of the model, such as text_decoder, vision_tower and multi_modal_projector."
            )
        levels = (module.parameters, recipe.parameters)
        bodies.append(Body(module.models, module.slices, levels, group, module.place))
    return tuple(bodies)


def _module_group(recipe: Recipe, name: str) -> str:
    for group, pattern in _GROUPS.items():
        if pattern.search(name):
            return group
    if _TEXT_NAMES.search(name):
        return _TEXT
    raise ConfigError(
        f"{recipe.label}: modules.{name}: unknown module; possible are 'default', which is all of "
        "a model, and names with text, vision, audio or projector in them."
    )


def group_of(name: str) -> str:
    """The part of a model to which a tensor belongs, judged by its name."""
    found = (group for group, pattern in _GROUPS.items() if pattern.search(name))
    return next(found, _TEXT)


def refuse_uncovered(recipe: Recipe, bodies: Sequence[Body], names: Iterable[str]) -> None:
    """Refuse modules that leave tensors of a model out.

    Raises:
        MismatchError: A tensor belongs to none of them.
    """
    for name in names:
        if not any(body.makes(name) for body in bodies):
            raise MismatchError(
                f"{recipe.label}: modules: '{name}' is in none of "
                f"{', '.join(recipe.modules)}. Add a module for the {group_of(name)} part."
            )


def is_stacked(recipe: Recipe) -> bool:
    """Whether tensors of the output come from other models or layers than their names say."""
    return bool(recipe.slices or recipe.modules)
