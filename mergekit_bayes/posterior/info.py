"""What a posterior says about itself: estimator, units, prior, identity."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import CheckpointSource, TensorSource
from mergekit_bayes.errors import CheckpointError, PrecisionError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """Who a set of tensors is; `full` only where somebody asked for all bytes to be hashed."""

    blocks: str
    full: str | None = None


def base_identity(path: Path) -> Identity | None:
    try:
        source = SafetensorsSource(checkpoint_files(path))
    except CheckpointError:
        return None  # a base in pickles has no identity that a merge could check
    try:
        return identify(source)
    finally:
        source.close()


FORMAT = 1
_HEADER_KEY = "bmerge"  # in the safetensors metadata


class Prior(_Record):
    """What a stored precision contains besides its data.

    `isotropic` is `precision` on every entry, on the same scale as the stored tensors. `base` is
    the
    base posterior as a merge counted it: `base_prior + base_count * (H of the base per observation)
    + DELTA_0`.
    """

    kind: Literal["none", "isotropic", "base", "unknown"] = "none"
    centre: Literal["zero", "base"] = "zero"
    precision: float = 0.0
    base: Identity | None = None
    base_precision: Identity | None = None
    base_count: float | None = None


class Anchor(_Record):
    """What training pulled towards: nothing, zero or the base, with which precision (None: not a
    quadratic).
    """

    kind: Literal["none", "zero", "base"] = "none"
    precision: float | None = 0.0


class Term(_Record):
    """One posterior inside a merge."""

    label: str
    mean: Identity
    scale: float
    gain: float = 1.0  # how its stored precision was counted


class MergeTrace(_Record):
    """What a later merge must know to be exact: how this one counted."""

    common_count: float | None
    anchor: str = "h0"
    shrink: str | None = None
    pool: str | None = None
    only: str | None = None
    uneven: bool = False  # some tensor or entry was merged by other scales than the terms'
    guarded_share: float = 0.0


class PosteriorInfo(_Record):
    """Everything needed to use a precision again without asking its author.

    Attributes:
        estimator: How the curvature was found: `ggn`, `ivon`, `fisher`, ... A merge carries that of
            its terms.
        unit: What one observation is.
        observations: N, how many observations the likelihood part stands for.
        ess: The count by which the stored precision is scaled, `S = ess * (curvature + prior)`; readers
            multiply by `observations / ess`.
        sampled: How many examples were really looked at.
        mean: Identity of the weights at which the curvature was taken.
        training: Optimizer, its hyperparameters, steps, batch size in observations, loss reduction.
        health: `init_fraction`, `kappa`, quantiles of the curvature, counts of bad entries.
        aliases: Tied names, alias to the name under which the tensor is stored.
    """

    format: int = FORMAT
    estimator: str
    unit: Literal["example", "token"] | None = None
    observations: float | None = None
    ess: float | None = None
    sampled: float | None = None
    prior: Prior = Prior()
    anchor: Anchor = Anchor()
    mean: Identity
    base: Identity | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    training: dict[str, Any] = {}
    health: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    terms: tuple[Term, ...] = ()
    merge: MergeTrace | None = None

    def to_metadata(self) -> dict[str, str]:
        """The string-to-string metadata of a safetensors file."""
        return {"format": "pt", _HEADER_KEY: self.model_dump_json()}


def read_info(source: CheckpointSource) -> PosteriorInfo | None:
    """`PosteriorInfo` from a precision file's header; None for a foreign file."""
    return parse_info(source.metadata, source.files[0])


def parse_info(metadata: Mapping[str, str], file: Path) -> PosteriorInfo | None:
    """`PosteriorInfo` from the metadata of a precision file; None for a foreign file's."""
    text = metadata.get(_HEADER_KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
        if found.get("format") != FORMAT:
            raise PrecisionError(
                f"{file}: posterior format {found.get('format')}, this version reads {FORMAT}. "
                "Update mergekit-bayes."
            )
        return PosteriorInfo.model_validate(found)
    except (ValidationError, ValueError, AttributeError) as error:
        raise PrecisionError(
            f"{file}: its posterior information cannot be read ({error})."
        ) from None


def identify(source: TensorSource, *, full: bool = True) -> Identity:
    """Identity of a checkpoint, with the hash of all bytes unless `full` is False."""
    return Identity(blocks=identity(source), full=identity(source, full=True) if full else None)
