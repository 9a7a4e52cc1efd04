"""The files of a model folder that a card and a push read: records, configs, a lone precision.

They may come from anybody: what is shown of a record is read by its type.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from mergekit_bayes import documents
from mergekit_bayes.checkpoint.layout import precision_set
from mergekit_bayes.checkpoint.side_files import ADAPT_REPORT, EXTRACT_REPORT, MERGE_REPORT
from mergekit_bayes.documents import (
    SETTINGS,
    DocumentError,
    parse_yaml_documents,
    read_mapping,
    read_text,
)
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.posterior.stored import StoredPrecisions
from mergekit_bayes.recipes import flags_in

CARD = "README.md"
_LARGEST_CARD = 4 << 20  # bytes; the largest published ones have about 1 MB


class _Record(BaseModel):
    """Keys of a record that a card shows; others are not looked at."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class MergedModel(_Record):
    """A model in `merge_report.json`, as far as a card shows it."""

    ref: str = ""
    role: str = "task"
    scale: float | None = None
    commit: str | None = None
    observations: float | None = None
    ratio: float | None = None
    mixture: str | None = None
    share: float | None = None


class MergeRecord(_Record):
    """`merge_report.json`, as far as a card shows it: of whole models, or of adapters."""

    version: str = ""
    summary: str = ""
    method: str = ""
    formula: str = ""
    weights: str = "uniform"
    notes: list[str] = []
    models: list[MergedModel] = []
    stages: dict[str, list[MergedModel]] = {}
    merged_tensors: int = 0
    copied: dict[str, object] | list[object] = []
    left_out: dict[str, object] | list[object] = []
    guard: float = 0.0
    guarded_share: float = 0.0
    largest_multiplier: float = 0.0
    changed_share: float | None = None
    lost_share: float | None = None
    adapters: list[str] = []
    scales: list[float] = []
    rank: int = 0
    largest_error: float = 0.0


class CheckRecord(_Record):
    """A check in `adapt_report.json`; what is not finite is text."""

    step: int = 0
    toxic_share: float | None = None
    held_out_rise: float | str | None = None
    memory_kl: float | str | None = None


class AdaptRecord(_Record):
    """`adapt_report.json`, as far as a card shows it."""

    steps: int = 0
    kept_step: int = 0
    reached: bool | None = None
    checks: list[CheckRecord] = []
    unit: str = "observation"
    removed: int = 0
    added: int = 0
    memory: int = 0
    base: float = 0.0
    kappa: float = 0.0
    tau: float = 1.0
    prior: str | float = "none"
    refused_steps: int = 0
    reconstruction_error: float | None = None
    without_precision: str | None = None


class LayerRecord(_Record):
    """A layer in `extract_report.json`, as far as a card shows it."""

    rank: int = 0


class ExtractRecord(_Record):
    """`extract_report.json`, as far as a card shows it."""

    version: str = ""
    layers: dict[str, LayerRecord] = {}
    summary: list[str] = []
    notes: list[str] = []


def read_record(file: Path) -> dict[str, object]:
    """The content of a JSON or YAML file; empty if the file does not exist.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a mapping.
    """
    return read_mapping(file) if file.exists() else {}


class WrittenRecipe(NamedTuple):
    """`merge_recipe.yaml`.

    Attributes:
        documents: What it merges in turn; the last one makes the output.
        flags: What the command that repeats the bytes needs besides it, values by names.
    """

    documents: tuple[dict[str, object], ...] = ()
    flags: Mapping[str, str] = {}


def read_written_recipe(file: Path) -> WrittenRecipe:
    """The recipe beside a merge; without documents if the file does not exist.

    Raises:
        CheckpointError: The file cannot be read, or does not hold mappings.
    """
    if not file.exists():
        return WrittenRecipe()
    try:
        content = read_text(file, SETTINGS)
        documents = tuple(d for d in parse_yaml_documents(content) if isinstance(d, dict))
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    else:
        if documents and all(isinstance(key, str) for d in documents for key in d):
            return WrittenRecipe(documents, flags_in(content))
        reason = "it holds no settings"
    raise CheckpointError(f"{file}: cannot be read ({reason}). Write it again, or remove it.")


def read_merge(folder: Path) -> MergeRecord | None:
    """What a folder's `merge_report.json` says; None without one, or if it tells of no merge.

    Raises:
        CheckpointError: The file cannot be read, or a value in it has another type.
    """
    file = folder / MERGE_REPORT
    if not file.exists():
        return None
    record = documents.read_record(MergeRecord, file)
    return record if record.models or record.adapters else None


def read_adaptation(folder: Path) -> AdaptRecord | None:
    """What a folder's `adapt_report.json` says; None without one.

    Raises:
        CheckpointError: The file cannot be read, or a value in it has another type.
    """
    file = folder / ADAPT_REPORT
    return documents.read_record(AdaptRecord, file) if file.exists() else None


def read_extraction(folder: Path) -> ExtractRecord | None:
    """What a folder's `extract_report.json` says; None without one.

    Raises:
        CheckpointError: The file cannot be read, or a value in it has another type.
    """
    file = folder / EXTRACT_REPORT
    return documents.read_record(ExtractRecord, file) if file.exists() else None


def texts(value: object) -> tuple[str, ...]:
    """The texts of a list; empty if it is none."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def mapping(value: object) -> Mapping[str, object]:
    """The entries of a mapping under text keys; empty if it is none."""
    if not isinstance(value, dict):
        return {}
    return {k: v for k, v in value.items() if isinstance(k, str)}


def text_or_none(value: object) -> str | None:
    """A text that is not empty."""
    return value if isinstance(value, str) and value else None


def read_card(file: Path) -> str:
    """The text of a model card.

    Raises:
        CheckpointError: It cannot be read, or is too large.
    """
    try:
        return read_text(file, _LARGEST_CARD)
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    raise CheckpointError(f"{file}: cannot be read ({reason}). Write it again, or remove it.")


def lone_precision_files(folder: Path) -> list[Path]:
    """The precision files at the top of a folder that holds a posterior and no model.

    Raises:
        CheckpointError: As `precision_set`.
    """
    return precision_set(folder)


def precision_info(files: Sequence[Path]) -> PosteriorInfo | None:
    """What the header of a precision says about it; None without files or without such a header."""
    if not files:
        return None
    with StoredPrecisions(files) as source:
        return source.info
