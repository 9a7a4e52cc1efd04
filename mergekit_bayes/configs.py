"""Read a verb's settings: defaults, then a YAML file, then `--set key=value`, each beating the one
before.

A config is a frozen pydantic model whose fields are the YAML keys. An unknown key is an error that
offers the nearest known one, and all errors of a file are told at once.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.records import Config

C = TypeVar("C", bound=Config)
_ELSEWHERE = {  # what transformers and peft call the same
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


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file into a config.

    Args:
        kind: The config class.
        path: The YAML file; its keys are the fields of `kind`.
        overrides: `key=value` or `outer.inner=value`, values as YAML.
    """
    return parse_config(kind, with_overrides(read_yaml(path), overrides), str(path))


def parse_config(kind: type[C], values: Mapping[str, Any], label: str) -> C:
    """Check a mapping against a config; `label` names it in messages."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{label}: {_explain(kind, e)}" for e in error.errors())
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping."""
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())}).") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(found).__name__}.")
    return found


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with each `key=value` set; dots go into nested mappings."""
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set: expected key=value, found '{item}'.")
        *outer, last = key.split(".")
        here = values
        for part in outer:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ConfigError(f"--set {key}: '{part}' holds a value, not keys.")
        try:
            here[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: '{text}' is not a YAML value.") from None
    return values


def _explain(kind: type[BaseModel], error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "literal_error":
        expected = str(error["ctx"]["expected"])
        close = difflib.get_close_matches(
            str(error["input"]), re.findall(r"'([^']+)'", expected), n=1
        )
        return f"{where}: '{error['input']}' is not {expected}." + (
            f" Did you mean '{close[0]}'?" if close else ""
        )
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}" if where else str(error["msg"])
    fields: type[BaseModel] | None = kind
    for part in error["loc"][:-1]:
        annotation = (
            fields.model_fields[part].annotation if fields and part in fields.model_fields else None
        )
        kinds = [
            k
            for k in (annotation, *get_args(annotation))
            if isinstance(k, type) and issubclass(k, BaseModel)
        ]
        fields = kinds[0] if kinds else None
    known, name = list(fields.model_fields) if fields else [], str(error["loc"][-1])
    close = (
        [_ELSEWHERE[name]]
        if _ELSEWHERE.get(name) in known
        else difflib.get_close_matches(name, known, n=1)
    )
    return f"{where}: unknown key" + (f"; did you mean '{close[0]}'?" if close else ".")
