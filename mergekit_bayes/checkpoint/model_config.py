"""The `config.json` of a model folder, as far as a merge reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.strict_json import parse_json


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`; empty if there is none that can be read.

    A model may be a bare file, and a merge of tensors needs no config.
    """
    try:
        content = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model.

    Models with several modalities nest it as `text_config`; for others it is the config itself.
    """
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config
