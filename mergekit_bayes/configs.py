"""Read the settings of a command: defaults, then a YAML file, then `--set key=value`, where the
later beat the earlier.

A config is a frozen pydantic model whose fields are the YAML keys. An unknown key is an error that
offers the nearest one that exists, and all errors of a file are reported at once.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_bayes.errors import ConfigError, nearest
from mergekit_bayes.records import Config

C = TypeVar("C", bound=Config)
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


def load_config(config: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file into a config.

    Args:
        config: The config class.
        path: The YAML file; its keys are the fields of the config.
        overrides: `key=value` or `outer.inner=value`, values as YAML.

    Raises:
        ConfigError: The file or an override cannot be read, or a setting is invalid.
    """
    return parse_config(config, with_overrides(read_yaml(path), overrides), str(path))


def parse_config(config: type[C], values: Mapping[str, object], label: str) -> C:
    """Check values against a config.

    Args:
        config: The config class.
        values: Values by field.
        label: Where the values come from, for messages.

    Raises:
        ConfigError: A field is missing or unknown, or a value is invalid; all of them at once.
    """
    try:
        return config.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"{label}: {_explain(config, e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


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


def _explain(config: type[BaseModel], error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a line that names the setting and offers a near match."""
    path = error["loc"]
    where = ".".join(str(key) for key in path)
    if error["type"] == "literal_error":
        expected = str(error["ctx"]["expected"])
        choices = re.findall(r"'([^']+)'", expected)
        near = nearest(str(error["input"]), choices)
        hint = f" Did you mean '{near}'?" if near else ""
        return f"{where}: '{error['input']}' is not {expected}.{hint}"
    if error["type"] == "extra_forbidden":
        near = _near_field(_config_at(config, path[:-1]), str(path[-1]))
        return f"{where}: unknown key" + (f"; did you mean '{near}'?" if near else ".")
    return f"{where}: {error['msg']}" if where else str(error["msg"])


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
