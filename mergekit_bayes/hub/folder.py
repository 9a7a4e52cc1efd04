"""The files of a model folder that a card and a push read: records, configs, a lone precision."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import yaml

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import PosteriorInfo, read_info

CARD = "README.md"


class MergedModel(TypedDict, total=False):
    """A model in `merge_report.json`, as far as a card shows it."""

    ref: str
    role: str
    scale: float | None
    commit: str | None
    observations: float | None
    ratio: float | None


class MergeRecord(TypedDict, total=False):
    """`merge_report.json`, as far as a card shows it: of whole models, or of adapters."""

    version: str
    summary: str
    method: str
    formula: str
    weights: str
    notes: list[str]
    models: list[MergedModel]
    merged_tensors: int
    copied: list[str]
    left_out: list[str]
    guard: float
    guarded_share: float
    largest_multiplier: float
    changed_share: float | None
    lost_share: float | None
    adapters: list[str]
    scales: list[float]
    rank: int
    largest_error: float


def read_record(file: Path) -> dict[str, object]:
    """The content of a JSON or YAML file; empty if the file does not exist.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a mapping.
    """
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    if not file.exists():
        return {}
    try:
        content = parse(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        return content
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: cannot be read ({reason}). Write it again, or remove it."
        ) from None


def lone_precision_files(folder: Path) -> list[Path]:
    """The precision files at the top of a folder that holds a posterior and no model."""
    return sorted(folder.glob("precision*.safetensors"))


def precision_info(files: Sequence[Path]) -> PosteriorInfo | None:
    """What the header of a precision says about it; None without files or without such a header."""
    if not files:
        return None
    with SafetensorsSource(files) as source:
        return read_info(source)
