"""The base of all settings, and how they are read: defaults, then a YAML file, then `--set
key=value`, where the later beat the earlier.

A config is a frozen pydantic model whose fields are the YAML keys. Wherever it is made, from a
file, from flags or by a call of its class, what is wrong with it is a `ConfigError` that says all
of it at once: which setting, what was expected and what was found. An unknown key is answered with
the nearest one that exists.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mergekit_bayes.configs.explain import config_error, members
from mergekit_bayes.documents import (
    SETTINGS,
    DocumentError,
    parse_yaml,
    parse_yaml_documents,
    read_text,
)
from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.records import Frozen

# Two spellings of one setting: configs have one of them as a field and take the other, too.
_SPELLINGS = {"out": "output", "output": "out"}
_NAME_MAX = 255  # bytes of a file name, on all common file systems
_LONGEST_ENDING = ".checkpoints"  # of what is written beside an output until it is complete


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
            raise config_error(cast(type[Config], cls), error, cls.__name__) from None


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
                raise ValueError(_one_setting(field))
            value = _text_of_paths(value)
            if field in _SPELLINGS and isinstance(value, str):
                refuse_output_name(value)
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
            raise config_error(cls, error, cls.__name__) from None


C = TypeVar("C", bound=Config)
T = TypeVar("T")


def refuse_output_name(out: str) -> None:
    """Refuse an output whose name is too long or not UTF-8, or an unknown user's home folder.

    Raises:
        ConfigError: It is.
    """
    _refuse_bytes(out)
    try:
        parts = Path(out).expanduser().parts
    except RuntimeError:
        raise ConfigError(f"output {shown(out)}: there is no such home folder.") from None
    for part in parts:
        longest = _NAME_MAX - (len(_LONGEST_ENDING) if part == parts[-1] else 0)
        if (length := len(os.fsencode(part))) > longest:
            raise ConfigError(
                f"output {shown(part)}: the name has {length} bytes, where {longest} are possible. "
                "Choose a shorter one."
            )


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
    values: dict[str, Any] = {}
    for key, value in read_yaml(path).items():
        field = _spelled(config, key)
        if field in values:
            raise ConfigError(f"{path}: {_one_setting(field)}")
        if field == "trust_remote_code" and value is not False:
            raise ConfigError(
                f"{path}: trust_remote_code, which lets the code of a model's folder run, is not "
                "taken from a file. Pass --trust-remote-code if you trust that code."
            )
        values[field] = value
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
        raise config_error(config, error, label, name_of) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or holds something else.
    """
    return _mapping(_parsed(path, parse_yaml), str(path))


def read_yaml_documents(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file of one or more documents, each of which is a mapping.

    Raises:
        ConfigError: The file cannot be read, is no YAML, holds no document, or one that is
            something else.
    """
    documents = _parsed(path, parse_yaml_documents)
    if not documents:
        raise ConfigError(f"{path}: expected keys and values, found nothing.")
    if len(documents) == 1:
        return [_mapping(documents[0], str(path))]
    return [_mapping(d, f"{path}, document {i}") for i, d in enumerate(documents, 1)]


def _parsed(path: Path, parse: Callable[..., T]) -> T:
    """What the YAML in a file holds, with no key twice in a mapping."""
    try:
        text = read_text(path, SETTINGS)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except DocumentError as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    try:
        return parse(text, unique=True)
    except DocumentError as error:
        raise ConfigError(f"{path}: is not YAML ({error}).") from None


def _mapping(values: object, label: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{label}: expected keys and values, found {type(values).__name__}.")
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
            mapping[last_key] = parse_yaml(text)
        except DocumentError:
            raise ConfigError(f"--set {key}: '{text}' is not a YAML value.") from None
    return values


def _spelled(config: type[Config], key: str) -> str:
    """A key, or an override that begins with one, by the name of the field that it means."""
    if not isinstance(key, str):  # YAML has other keys as well; pydantic refuses them
        return key
    match = re.match(r"[^.=]*", key)
    name = match[0] if match else ""
    return key if not name else field_named(config, name) + key[len(name) :]


def _one_setting(field: str) -> str:
    return f"'{field}' and '{_SPELLINGS[field]}' are one setting. Give one of them."


def _text_of_paths(value: Any) -> Any:
    """The value with text for each path in it; an error for text that is not UTF-8."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        _refuse_bytes(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_text_of_paths, value)) if type(value) in (list, tuple) else value
    if type(value) is dict:
        return {key: _text_of_paths(inner) for key, inner in value.items()}
    return value


def _refuse_bytes(text: str) -> None:
    """Refuse the name of a file that is not UTF-8: no report and no recipe could hold it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{shown(text)} is not UTF-8. Rename the file or folder.")


def _is_one_of_a_list(field: FieldInfo, value: object) -> bool:
    """Whether the field holds a list, and nothing else, and the value may be its only element."""
    allowed = members(field.annotation)
    is_list = bool(allowed) and all(get_origin(member) is tuple for member in allowed)
    alone = (str, int, float, dict) if _holds_configs(field) else (str, int, float)
    return is_list and isinstance(value, alone)


def _holds_configs(field: FieldInfo) -> bool:
    """Whether the field is a list of configs, one of which is given by keys and values."""
    inner = [part for member in members(field.annotation) for part in get_args(member)]
    return any(isinstance(part, type) and issubclass(part, Config) for part in inner)
