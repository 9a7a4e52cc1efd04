"""The base of all settings, and how they are read: defaults, then a YAML file, then `--set
key=value`, where the later beat the earlier.

A config is a frozen pydantic model whose fields are the YAML keys. Wherever it is made, from a
file, from flags or by a call of its class, what is wrong with it is a `ConfigError` that says all
of it at once: which setting, what was expected and what was found. An unknown key is answered with
the nearest one that exists.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mergekit_bayes.errors import ConfigError, nearest
from mergekit_bayes.records import Frozen

# Two spellings of one setting: configs have one of them as a field and take the other, too.
_SPELLINGS = {"out": "output", "output": "out"}
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


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(Frozen)


# For type checkers, as pydantic declares its own metaclass.
@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class _Explained(ModelMetaclass):
    """Metaclass of `Config`: a call with wrong values raises a `ConfigError`.

    pydantic makes nested configs without calling their class, so they report to the outer one.
    """

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise _config_error(cast(type[Config], cls), error, cls.__name__) from None


class Config(Frozen, metaclass=_Explained):
    """Base of all settings: what a YAML file, the flags of a command or a caller gives.

    One value stands for a list of one, a `Path` for its text, and `out` and `output` are one
    setting.

    Raises:
        ConfigError: A setting is missing or unknown, or a value is invalid; all of them at once.
    """

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        read = {}
        for name, value in values.items():
            field = field_named(cls, name)
            if field != name and field in values:
                raise ValueError(f"'{field}' and '{name}' are one setting. Give one of them.")
            value = _text_of_paths(value)
            if field in cls.model_fields and _is_one_of_a_list(cls.model_fields[field], value):
                value = (value,)
            read[field] = value
        return read

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, but with a `ConfigError` for what is wrong."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _config_error(cls, error, cls.__name__) from None


C = TypeVar("C", bound=Config)


def field_named(config: type[Config], name: str) -> str:
    """The field that a key means, which may be the other spelling of its name."""
    other = _SPELLINGS.get(name)
    fields = config.model_fields
    return other if other in fields and name not in fields else name


def load_config(config: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file into a config.

    Args:
        config: The config class.
        path: The YAML file; its keys are the fields of the config.
        overrides: `key=value` or `outer.inner=value`, values as YAML.

    Raises:
        ConfigError: The file or an override cannot be read, or a setting is invalid.
    """
    values = {_spelled(config, key): value for key, value in read_yaml(path).items()}
    spelled = [_spelled(config, override) for override in overrides]
    return parse_config(config, with_overrides(values, spelled), str(path))


def parse_config(
    config: type[C],
    values: Mapping[str, object],
    label: str,
    *,
    name_of: Callable[[str], str] = str,
) -> C:
    """Check values against a config.

    Args:
        config: The config class.
        values: Values by field.
        label: Where the values come from, for messages.
        name_of: What the user calls a field, for messages: a flag instead of the key.

    Raises:
        ConfigError: A field is missing or unknown, or a value is invalid; all of them at once.
    """
    try:
        return super(Config, config).model_validate(dict(values))
    except ValidationError as error:
        raise _config_error(config, error, label, name_of) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return values


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set each `key=value` in a mapping, which is changed; dots go into nested mappings.

    Raises:
        ConfigError: An override without key or value, whose value is no YAML, or which goes into
            something that is no mapping.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: expected key=value, found '{override}'.")
        *outer_keys, last_key = key.split(".")
        mapping = values
        for outer_key in outer_keys:
            mapping = mapping.setdefault(outer_key, {})
            if not isinstance(mapping, dict):
                raise ConfigError(f"--set {key}: '{outer_key}' holds a value, not keys.")
        try:
            mapping[last_key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: '{text}' is not a YAML value.") from None
    return values


def _spelled(config: type[Config], key: str) -> str:
    """A key, or an override that begins with one, by the name of the field that it means."""
    match = re.match(r"[^.=]*", str(key))
    name = match[0] if match else ""
    return key if not name else field_named(config, name) + key[len(name) :]


def _text_of_paths(value: Any) -> Any:
    """The value with text for each path in it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_text_of_paths, value)) if type(value) in (list, tuple) else value
    if type(value) is dict:
        return {key: _text_of_paths(inner) for key, inner in value.items()}
    return value


def _is_one_of_a_list(field: FieldInfo, value: object) -> bool:
    """Whether the field holds a list, and nothing else, and the value may be its only element."""
    members = _members(field.annotation)
    is_list = bool(members) and all(get_origin(member) is tuple for member in members)
    return is_list and isinstance(value, (str, int, float))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if union else (annotation,)
    return tuple(member for member in members if member is not NoneType)


def _config_error(
    config: type[BaseModel],
    error: ValidationError,
    label: str,
    name_of: Callable[[str], str] = str,
) -> ConfigError:
    """All that pydantic found wrong, a line for each setting."""
    groups: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for found in error.errors():
        groups.setdefault(_setting_at(config, found["loc"]), []).append(found)
    lines = []
    for path, errors in groups.items():
        # Where several types are allowed there is an error for each; the outermost tells the value.
        # A list whose values are wrong also counts as too short.
        outermost = min(errors, key=lambda e: (e["type"] == "too_short", len(e["loc"])))
        text = _explain(config, path, outermost)
        where = ".".join([name_of(path[0]), *path[1:]]) if path else ""
        lines.append(f"{label}: {where}: {text}" if where else f"{label}: {text}")
    return ConfigError("\n".join(lines))


def _setting_at(config: type[BaseModel], location: Sequence[str | int]) -> tuple[str, ...]:
    """The keys of a setting; what follows in pydantic's location is inside of its value."""
    keys: list[str] = []
    inner: type[BaseModel] | None = config
    for key in location:
        if inner is None:
            break
        keys.append(str(key))
        inner = _config_at(inner, [key])
    return tuple(keys)


def _explain(config: type[BaseModel], path: tuple[str, ...], error: ErrorDetails) -> str:
    """What is wrong with a setting: what was expected, and what was found."""
    kind, value = error["type"], error["input"]
    if not path:  # of the config as a whole
        message = str(error["msg"]).removeprefix("Value error, ")
        return f"expected keys and values, found {_shown(value)}." if "type" in kind else message
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
        return f"{_shown(value)} is not {expected}.{hint}"
    if kind == "too_short":
        return "expected at least one value, found none."
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
    return f"expected {_expected(annotation, metadata)}, found {_shown(value)}{place}."


def _annotation(field: FieldInfo) -> tuple[Any, Sequence[Any]]:
    members = _members(field.annotation)
    annotation = members[0] if len(members) == 1 else field.annotation
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
    nouns = dict.fromkeys(_noun(member, several=several) for member in _members(inner))
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


def _shown(value: object) -> str:
    """A value for a message, in the words of a settings file."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "keys and values"
    return (
        "a list" if isinstance(value, (list, tuple)) else f"a value of type {type(value).__name__}"
    )


def _config_at(config: type[BaseModel], keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The nested config to which these keys lead, if they lead to one."""
    inner: type[BaseModel] | None = config
    for key in keys:
        field = inner.model_fields.get(str(key)) if inner else None
        annotation = field.annotation if field else None
        inner = next((m for m in (annotation, *get_args(annotation)) if _is_config(m)), None)
    return inner


def _is_config(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _near_field(config: type[BaseModel] | None, name: str) -> str | None:
    """The field that an unknown name means, if one is close."""
    fields = list(config.model_fields) if config else []
    foreign = _FOREIGN_NAMES.get(name)
    return foreign if foreign in fields else nearest(name, fields)
