"""The value that a setting has in one tensor: scalars, gradients over layers, filters, levels.

Which value counts, of a tensor with name n at position t in its stack of layers:

- A scalar is the value everywhere.
- A gradient v_0 .. v_m is a polyline over the layers, x = m t:

      v = v_i + (x - i) (v_(i+1) - v_i)    i = floor(x)

  One of true and false, or of texts, is not interpolated: v = v_i.
- Of filters the first one counts whose text is part of n.
- Where no filter matches, the next level is asked: source, slice, module, recipe.

The position is i / (L - 1) in layer i of the L layers of a slice, 1 in a slice of one layer, and 0
outside of layers, also behind the last one.

Source: https://github.com/arcee-ai/mergekit, README.md, "Parameter Specification"; what it does not
say is as mergekit 0.1.5 does it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from mergekit_bayes.errors import ConfigError, did_you_mean, shown
from mergekit_bayes.mergekit.objects import Filter, Module, Recipe, Scalar, Setting
from mergekit_bayes.mergekit.places import SETTINGS

Kind: TypeAlias = Literal["number", "whole", "truth", "text"]

_TRUTHS = {
    **dict.fromkeys(("true", "yes", "y", "on", "t", "1"), True),
    **dict.fromkeys(("false", "no", "n", "off", "f", "0"), False),
}
_NOUNS = {
    "number": "a number",
    "whole": "a whole number",
    "truth": "true or false",
    "text": "text",
}
_ROUNDING = 1e-9  # of a position, as a share of the distance of two values
_NUMERAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def value_at(
    value: Setting, tensor_name: str, position: float, kind: Kind = "number"
) -> Scalar | None:
    """The value of a setting in one tensor.

    Args:
        value: What the recipe sets.
        tensor_name: The tensor's name, which filters are compared with: in the model whose setting
            it is, or in the output for a setting of all models together.
        position: Of the tensor in its layers, in [0, 1].
        kind: What the setting is.

    Returns:
        The value; None if no filter matches.

    Raises:
        ConfigError: The value is not of this kind.
    """
    if isinstance(value, tuple):
        if value and isinstance(value[0], Filter):
            matches = (f for f in value if isinstance(f, Filter) and _matches(f, tensor_name))
            match = next(matches, None)
            return None if match is None else value_at(match.value, tensor_name, position, kind)
        return _gradient(value, position, kind)
    assert not isinstance(value, Filter)
    return _of_kind(value, kind)


def _matches(given: Filter, name: str) -> bool:
    return given.filter is None or given.filter == "*" or given.filter in name


def _gradient(values: tuple[Scalar | Filter, ...], position: float, kind: Kind) -> Scalar:
    """The value of a gradient at a position."""
    place = position * (len(values) - 1)
    if abs(place - round(place)) < _ROUNDING:
        place = round(place)
    index = min(math.floor(place), len(values) - 1)
    fraction = place - index
    first, following = (_entry(values, i, kind) for i in (index, min(index + 1, len(values) - 1)))
    if isinstance(first, bool | str) or isinstance(following, str) or not fraction:
        return first
    return _of_kind((1 - fraction) * first + fraction * following, kind)


def _entry(values: tuple[Scalar | Filter, ...], index: int, kind: Kind) -> Scalar:
    value = values[index]
    assert not isinstance(value, Filter)
    return _of_kind(value, kind)


def _of_kind(value: Scalar, kind: Kind) -> Scalar:
    """A scalar as what its setting is: YAML reads 1e-8 as text, and 1 may mean true.

    Raises:
        ConfigError: It cannot be that.
    """
    converted: Scalar | None = None
    if kind == "text":
        converted = value if isinstance(value, str) else None
    elif kind == "truth":
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        text = str(whole).lower() if isinstance(whole, bool | int | str) else ""
        converted = _TRUTHS.get(text)
    elif isinstance(value, str):
        number = float(value) if _NUMERAL.fullmatch(value) and len(value) < 400 else math.inf
        converted = _of_kind(number, kind) if math.isfinite(number) else None
    elif kind == "whole":
        is_whole = not isinstance(value, bool) and float(value).is_integer()
        converted = int(value) if is_whole else None
    elif math.isfinite(value):
        converted = float(value)
    if converted is None:
        raise ConfigError(f"expected {_NOUNS[kind]}, found {shown(value)}.")
    return converted


def setting_at(
    name: str,
    levels: Iterable[Mapping[str, Setting]],
    tensor_name: str,
    position: float,
    kind: Kind = "number",
) -> Scalar | None:
    """The value of a setting in one tensor, from the nearest level that gives one.

    Args:
        name: The setting.
        levels: What is set, the nearest first: of the source, its slice, its module, the recipe.
        tensor_name: As in `value_at`.
        position: As in `value_at`.
        kind: What the setting is.

    Returns:
        The value; None if no level sets it, or none of their filters matches.

    Raises:
        ConfigError: A value is not of this kind.
    """
    for level in levels:
        if name in level:
            try:
                value = value_at(level[name], tensor_name, position, kind)
            except ConfigError as error:
                raise ConfigError(f"'{name}' in '{tensor_name}': {error}") from None
            if value is not None:
                return value
    return None


class GivenSetting(NamedTuple):
    """A setting where a recipe says it.

    Attributes:
        path: The path of its key, `models[0].parameters.weight`.
        name: Its name.
        value: What it is set to.
        is_of_model: Whether it is set for one model, and not for all of them.
    """

    path: str
    name: str
    value: Setting
    is_of_model: bool


def given_settings(recipe: Recipe) -> Iterator[GivenSetting]:
    """All settings of a recipe, the recipe's own first."""
    levels: list[tuple[str, Mapping[str, Setting], bool]] = [("", recipe.parameters, False)]
    bodies: list[Recipe | Module] = [recipe, *recipe.modules.values()]
    for body in bodies:
        if isinstance(body, Module):
            levels.append((body.place, body.parameters, False))
        levels += [(source.place, source.parameters, True) for source in body.models]
        for piece in body.slices:
            levels.append((piece.place, piece.parameters, False))
            levels += [(source.place, source.parameters, True) for source in piece.sources]
    for place, parameters, is_of_model in levels:
        for name, value in parameters.items():
            path = f"{place}.parameters.{name}" if place else f"parameters.{name}"
            yield GivenSetting(path, name, value, is_of_model)


def check_settings(
    recipe: Recipe, of_models: Mapping[str, Kind], of_all: Mapping[str, Kind]
) -> None:
    """Refuse settings that the merging rule does not have, or whose values it cannot use.

    Args:
        recipe: The recipe.
        of_models: The settings that each model may have of its own (`weight`), with their kinds.
        of_all: Those of all models together (`t`, `normalize`).

    Raises:
        ConfigError: A setting is unknown, is set for one model where it is one of all, or has a
            value of another kind; the message names the key.
    """
    kinds = {**of_models, **of_all}
    for given in given_settings(recipe):
        where = f"{recipe.label}: {given.path}"
        if given.name not in kinds:
            near = did_you_mean(given.name, kinds)
            known = f"possible are {', '.join(sorted(kinds))}." if kinds else "it has none."
            if given.name in SETTINGS:
                raise ConfigError(
                    f"{where}: '{recipe.merge_method}' has no such setting, and mergekit ignores "
                    f"it there: delete the line. {known[:1].upper()}{known[1:]}"
                )
            raise ConfigError(
                f"{where}: unknown setting of '{recipe.merge_method}'; {near or known}"
            )
        if given.is_of_model and given.name not in of_models:
            raise ConfigError(
                f"{where}: '{given.name}' is a setting of all models together. Write it under the "
                "'parameters' of the recipe or of a slice."
            )
        try:
            for scalar in _scalars(given.value):
                _of_kind(scalar, kinds[given.name])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _scalars(value: Setting) -> Iterator[Scalar]:
    """All values in a setting."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, Filter):
            yield from item.value if isinstance(item.value, tuple) else (item.value,)
        else:
            yield item
