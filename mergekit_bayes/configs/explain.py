"""What is wrong with settings, in words: which one, what was expected and what was found."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_bayes.errors import ConfigError, nearest, shown

_FOREIGN_NAMES = {  # of transformers and peft, in ours
    "lr": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "num_train_epochs": "epochs",
    "lr_scheduler_type": "scheduler",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "rank": "r",
}
_MOST = 10  # lines of one message


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    union = get_origin(annotation) in (Union, UnionType)
    allowed = get_args(annotation) if union else (annotation,)
    return tuple(member for member in allowed if member is not NoneType)


def config_error(
    config: type[BaseModel],
    error: ValidationError,
    label: str,
    name_of: Callable[[str], str] = str,
) -> ConfigError:
    """What pydantic found wrong, a line for each setting, the first ones of many.

    Args:
        config: The config class.
        error: What pydantic raised.
        label: Where the values come from.
        name_of: What the user calls a field.
    """
    groups: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for found in error.errors():
        location = found["loc"]
        # Of a key that is no text, the place is what it is a key of.
        if _is_of_key(found):
            location = location[: -1 if found["type"] == "invalid_key" else -2]
        groups.setdefault(_setting_at(config, location), []).append(found)
    lines = []
    for path, errors in groups.items():
        # Where several types are allowed there is an error for each; the outermost tells the value.
        # A list whose values are wrong also counts as too short.
        outermost = min(
            errors, key=lambda e: (e["type"] == "too_short", not _is_of_key(e), len(e["loc"]))
        )
        text = _explain(config, path, outermost)
        where = ".".join([name_of(path[0]), *path[1:]]) if path else ""
        lines.append(f"{label}: {where}: {text}" if where else f"{label}: {text}")
    if len(lines) > _MOST:
        lines[_MOST:] = [f"{label}: {len(lines) - _MOST} more such lines. Is it the right file?"]
    return ConfigError("\n".join(lines))


def _setting_at(config: type[BaseModel], location: Sequence[str | int]) -> tuple[str, ...]:
    """The keys of a setting; what follows in pydantic's location is inside of its value."""
    keys: list[str] = []
    place: Any = config
    for key in location:
        if place is None:
            break
        if isinstance(key, int):  # of a list of configs
            continue
        keys.append(str(key))
        place = _inside(place, key)
    return tuple(keys)


def _explain(config: type[BaseModel], path: tuple[str, ...], error: ErrorDetails) -> str:
    """What is wrong with a setting: what was expected, and what was found."""
    kind, value = error["type"], error["input"]
    if _is_of_key(error):
        return (
            f"expected text as a key, found {described(value)}. YAML takes numbers, dates and "
            "words like on, no and null for other values, unless they are in quotes."
        )
    if not path:  # of the config as a whole
        message = str(error["msg"]).removeprefix("Value error, ")
        return f"expected keys and values, found {described(value)}." if "type" in kind else message
    if kind == "missing":
        return "is required, and was not given."
    owner = _config_at(config, path[:-1])
    if kind == "extra_forbidden":
        near = _near_field(owner, path[-1])
        return "unknown key" + (f"; did you mean '{near}'?" if near else ".")
    if kind == "literal_error":
        expected = str(error["ctx"]["expected"])
        near = nearest(str(value), re.findall(r"'([^']+)'", expected))
        hint = f" Did you mean '{near}'?" if near else ""
        other = _beside_choices(owner, path[-1])
        return f"{described(value)} is not {expected}{f', nor {other}' if other else ''}.{hint}"
    if kind == "too_short":
        return "expected at least one value, found none."
    if kind == "model_type":
        return f"expected keys and values, found {described(value)}."
    if kind == "value_error" or owner is None:
        return str(error["msg"]).removeprefix("Value error, ")
    annotation, metadata = _annotation(owner.model_fields[path[-1]])
    inside = error["loc"][len(path) :]
    place = ""
    if inside and get_origin(annotation) in (tuple, dict):
        place = (
            f" as number {int(inside[0]) + 1} of the list"
            if isinstance(inside[0], int)
            else f" for '{inside[0]}'"
        )
        annotation, metadata = _stripped(get_args(annotation)[int(get_origin(annotation) is dict)])
    return f"expected {_expected(annotation, metadata)}, found {described(value)}{place}."


def _beside_choices(config: type[BaseModel] | None, name: str) -> str:
    """What a setting may be that is no word of its choices; empty if nothing is."""
    allowed = members(config.model_fields[name].annotation) if config else ()
    others = [m for m in allowed if get_origin(m) is not Literal] if len(allowed) > 1 else []
    return " or ".join(map(_expected, others))


def _is_of_key(error: ErrorDetails) -> bool:
    """Whether pydantic refused a key, because it is no text."""
    return error["type"] == "invalid_key" or error["loc"][-1:] == ("[key]",)


def _annotation(field: FieldInfo) -> tuple[Any, Sequence[Any]]:
    allowed = members(field.annotation)
    annotation = allowed[0] if len(allowed) == 1 else field.annotation
    inner, metadata = _stripped(annotation)
    return inner, [*field.metadata, *metadata]


def _stripped(annotation: Any) -> tuple[Any, Sequence[Any]]:
    """A type and the constraints that it is annotated with."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    inner, *metadata = get_args(annotation)
    constraints: list[Any] = []
    for item in metadata:
        constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    return inner, constraints


_NOUNS = {  # one, and several in a list
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}


def _expected(annotation: Any, constraints: Sequence[Any] = (), *, several: bool = False) -> str:
    """A type with its constraints, in words."""
    inner, more = _stripped(annotation)
    bounds = " and ".join(_bounds([*constraints, *more]))
    nouns = dict.fromkeys(_noun(member, several=several) for member in members(inner))
    words = " or ".join(nouns)
    return f"{words} {bounds}" if bounds else words


def _noun(member: Any, *, several: bool) -> str:
    origin = get_origin(member)
    if origin is tuple:
        return f"a list of {_expected(get_args(member)[0], several=True)}"
    if origin is Literal:
        return " or ".join(f"'{choice}'" for choice in get_args(member))
    if origin is dict or _is_config(member):
        return "keys and values"
    return _NOUNS.get(member, ("a value", "values"))[several]


def _bounds(constraints: Sequence[Any]) -> Iterator[str]:
    for name, words in (
        ("gt", "above"),
        ("ge", "of at least"),
        ("lt", "below"),
        ("le", "of at most"),
    ):
        for constraint in constraints:
            if (bound := getattr(constraint, name, None)) is not None:
                yield f"{words} {bound}"


def described(value: object) -> str:
    """A value for a message, in the words of a settings file."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return shown(value)
    if isinstance(value, Mapping):
        return "keys and values"
    return (
        "a list" if isinstance(value, (list, tuple)) else f"a value of type {type(value).__name__}"
    )


def _config_at(config: type[BaseModel], keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The nested config to which these keys lead, if they lead to one."""
    place: Any = config
    for key in keys:
        place = _inside(place, key)
    return place if _is_config(place) else None


def _inside(place: Any, key: str | int) -> Any:
    """Where a key of a config, or of a mapping of configs, leads: to another of these, or None."""
    if get_origin(place) is dict:
        return get_args(place)[1]
    field = place.model_fields.get(str(key)) if place else None
    annotation = field.annotation if field else None
    if get_origin(annotation) is dict:
        return annotation if _is_config(get_args(annotation)[1]) else None
    return next((m for m in (annotation, *get_args(annotation)) if _is_config(m)), None)


def _is_config(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _near_field(config: type[BaseModel] | None, name: str) -> str | None:
    """The field that an unknown name means, if one is close."""
    fields = list(config.model_fields) if config else []
    foreign = _FOREIGN_NAMES.get(name)
    return foreign if foreign in fields else nearest(name, fields)
