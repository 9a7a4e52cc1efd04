"""Short names of models side by side, and of their folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.report import Variant

_LONGEST = 48  # characters; a longer name loses its middle, since models often differ at the end
_NOT_IN_A_NAME = re.compile(r"[^\w.+=@-]+")
_OURS = ("report.json", "report.md", "evaluation.png")  # what lies beside the folders


def labels_of(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last parts of its path that no other model has.

    Raises:
        ConfigError: A model is named twice.
    """
    _refuse_twice(models)
    parts = [_parts(model) for model in models]
    labels: list[str] = []
    for mine in parts:
        count = next((k for k in range(1, len(mine)) if _are_alone(mine, parts, k)), len(mine))
        labels.append(_free(_cut("/".join(mine[-count:])), labels))
    return labels


def variant_label(label: str, variant: Variant, taken: Sequence[str]) -> str:
    """The label of a variant of a model.

    Args:
        label: The model's own.
        variant: What became of it.
        taken: Labels that are given already.
    """
    return label if variant == "as it is" else _free(f"{label} {variant}", taken)


def folder_of(label: str) -> str:
    """The name of an evaluation's folder."""
    return _NOT_IN_A_NAME.sub("-", label).lstrip(".-") or "model"


def _refuse_twice(models: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for model in models:
        place = model if is_hub_id(model) else os.path.realpath(os.path.expanduser(model))
        if place in seen:
            raise ConfigError(
                f"'{seen[place]}' and '{model}' are the same model. Name each model once."
            )
        seen[place] = model


def _parts(model: str) -> tuple[str, ...]:
    if is_hub_id(model):
        return tuple(model.split("/"))
    path = Path(os.path.abspath(os.path.expanduser(model)))
    return path.parts[1:] or path.parts  # without the root, of which no folder is named


def _are_alone(mine: tuple[str, ...], parts: Sequence[tuple[str, ...]], count: int) -> bool:
    return sum(other[-count:] == mine[-count:] for other in parts) == 1


def _cut(name: str) -> str:
    if len(name) <= _LONGEST:
        return name
    kept = (_LONGEST - 3) // 2
    return f"{name[:kept]}...{name[-kept:]}"


def _free(label: str, taken: Sequence[str]) -> str:
    """The label, with a number if another one has it, or has the same folder on some disk."""
    folders = {folder_of(other).casefold() for other in taken} | set(_OURS)
    names = (label, *(f"{label} ({i})" for i in range(2, len(taken) + 3)))
    return next(name for name in names if folder_of(name).casefold() not in folders)
