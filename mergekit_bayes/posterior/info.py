"""What a posterior says about itself: estimator, units, prior, identity."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import CheckpointSource, TensorSource
from mergekit_bayes.documents import SETTINGS, DocumentError, as_record, parse_json
from mergekit_bayes.errors import CheckpointError, PrecisionError, shown
from mergekit_bayes.posterior.edits import Edit, Identity
from mergekit_bayes.records import Frozen

FORMAT = 2  # what is written; what is read is every one up to it
LOSS = "loss"  # key of `PosteriorInfo.training`: the loss whose curvature it is, in words
INPUTS = "inputs"  # the estimator whose matrices are no curvature of the loss: in squared inputs
KRONECKER = "kronecker"  # the estimator of products of matrices
_SOFTMAX = "softmax cross-entropy"
_HEADER_KEY = "bmerge"  # in the safetensors metadata
Pool = Literal["tensor", "row", "row-column"]
_WITHOUT_KEY: Any = Field(None, exclude_if=lambda value: value is None)
_LARGEST = 3.4e38  # about the largest float32, in which merges are computed


class Prior(Frozen):
    """What a stored precision contains besides the data's part.

    Attributes:
        kind: `none`; `isotropic`, which is `precision` on every entry, on the scale of the stored
            tensors; `base`, which is the base posterior as a merge counted it: `base_prior +
            base_count * (H of the base per observation) + DELTA_0`; or `unknown`.
        centre: Where the prior has its mean.
        precision: The isotropic prior's precision, 1/weight^2.
        base: Identity of the base's mean, for `base`.
        base_precision: Identity of the base's precision, for `base`.
        base_count: The factor before the base's data part, for `base`.
    """

    kind: Literal["none", "isotropic", "base", "unknown"] = "none"
    centre: Literal["zero", "base"] = "zero"
    precision: float = 0.0
    base: Identity | None = None
    base_precision: Identity | None = None
    base_count: float | None = None


class Anchor(Frozen):
    """What the training pulled towards.

    Attributes:
        kind: Nothing, zero or the base's weights.
        precision: Strength of the pull, 1/weight^2; None if it was not quadratic.
    """

    kind: Literal["none", "zero", "base"] = "none"
    precision: float | None = 0.0


class Predictive(Frozen):
    """How weights are drawn around the mean for predictions, where that is not from S as it is.

        theta = mean + eps sqrt( temperature / (S - S_prior + prior) ),   S_prior that of `Prior`

    A fine-tune stores the curvature per observation of its data, and was trained under the noise of
    a colder posterior with a floor under the curvature. This is that noise.

    Attributes:
        prior: What every entry has in place of the prior inside S, 1/weight^2.
        temperature: Factor on the variance.
    """

    prior: float
    temperature: float


class Term(Frozen):
    """One posterior inside a merge.

    Attributes:
        label: The model as the merge was given it.
        mean: Identity of its weights.
        scale: Its scale in the merge.
        gain: The factor by which its stored precision was counted.
        pool: The form to which its precision had been pooled for storing, as in its record.
    """

    label: str
    mean: Identity
    scale: float
    gain: float = 1.0
    pool: Pool | None = _WITHOUT_KEY


class MergeTrace(Frozen):
    """How a merge counted, which a later merge must know to undo a term exactly.

    Attributes:
        common_count: Observations for which every precision was counted; None if each had its own.
        anchor: The `--anchor` of the merge: what each task's training is taken to have pulled
            towards.
        shrink: The `--shrink` of the merge.
        pool: The `--pool` of the merge.
        only: Pattern of the tensors that were merged; None for all.
        uneven: Some tensor or entry was merged by other scales than the terms'.
        guarded_share: Share of entries at which the guard held the precision up.
    """

    common_count: float | None
    anchor: str = "h0"
    shrink: str | None = None
    pool: str | None = None
    only: str | None = None
    uneven: bool = False
    guarded_share: float = 0.0


class PosteriorInfo(Frozen):
    """Everything needed to use a precision without asking its author.

    Attributes:
        format: Version of this record and of its files (`docs/posterior-format.md`).
        estimator: Where the curvature comes from: `ggn`, `ivon`, `fisher`, ... A merge carries the
            estimator of its terms.
        unit: What one observation is.
        observations: N, the number of observations that the data's part stands for.
        ess: The count by which the stored precision is scaled, `S = ess * (curvature + prior)`;
            readers multiply by `observations / ess`.
        sampled: Number of examples that were used for the estimate.
        prior: What the precision contains besides the data's part.
        anchor: What the training pulled towards.
        mean: Identity of the weights at which the curvature was taken.
        base: Identity of the weights from which the training started.
        tokenizer: SHA-256 of `tokenizer.json`.
        dtype: The number format of the mean.
        training: Optimizer, its hyperparameters, steps, batch size in observations, loss reduction,
            and under `LOSS` the loss whose curvature this is.
        health: `init_fraction`, `kappa`, quantiles of the curvature, counts of bad entries.
        aliases: Tied names: the alias to the name under which the tensor is stored.
        terms: The posteriors of a merge.
        merge: How a merge counted them.
        predictive: How weights are drawn; None for S as it is, where it has a prior. A record
            without it has no such key.
        edits: The adaptations inside, the oldest first. A record without any has no such key.
        pool: The form to which an estimate was pooled, when it was made or stored again; a record
            has no such key where it was not. That of a merge was chosen by it and is in `merge`.
    """

    format: int = FORMAT
    estimator: str
    unit: Literal["example", "token"] | None = None
    observations: float | None = None
    ess: float | None = None
    sampled: float | None = None
    prior: Prior = Field(default_factory=Prior)
    anchor: Anchor = Field(default_factory=Anchor)
    mean: Identity
    base: Identity | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    training: dict[str, Any] = {}
    health: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    terms: tuple[Term, ...] = ()
    merge: MergeTrace | None = None
    predictive: Predictive | None = _WITHOUT_KEY
    edits: Annotated[tuple[Edit, ...], Field(exclude_if=lambda edits: not edits)] = ()
    pool: Pool | None = _WITHOUT_KEY

    def to_metadata(self) -> dict[str, str]:
        """The record as the string-to-string metadata of a precision file of today's format."""
        return {"format": "pt", _HEADER_KEY: self.in_current_format().model_dump_json()}

    def in_current_format(self) -> "PosteriorInfo":
        """The record as it is written today; its content is the same in every format so far."""
        return self.model_copy(update={"format": FORMAT})


def recorded_losses(infos: Iterable[PosteriorInfo | None]) -> list[str]:
    """The losses on record in several precisions, each once; of a merge those of its terms."""
    found = (info.training.get(LOSS) for info in infos if info is not None)
    return sorted({one for text in found if text for one in str(text).split("; ")})


def note_on_losses(infos: Mapping[str, PosteriorInfo | None]) -> str | None:
    """A note that precisions which are merged are of different losses, or may be.

    The curvature of another loss has another size for the same knowledge. A record without a loss
    is older than such records, or of another program: for softmax its unit is today's, for other
    heads it was another.

    Args:
        infos: The record of each precision by the model's name; None for one without a record.

    Returns:
        None where nothing speaks against one loss.
    """
    losses = {ref: recorded_losses([info]) for ref, info in infos.items() if info is not None}
    told = {ref: " and ".join(found) for ref, found in losses.items() if found}
    kinds = recorded_losses(infos.values())
    if len(kinds) > 1:
        listed = ", ".join(f"'{ref}' has that of {loss}" for ref, loss in told.items())
        return (
            f"the precisions are of different losses, so that their sizes do not compare: {listed}"
        )
    unknown = [ref for ref, found in losses.items() if not found]
    if kinds and kinds != [_SOFTMAX] and unknown:
        return (
            f"{', '.join(map(repr, unknown))}: the precision does not record its loss, that of "
            f"'{next(iter(told))}' is of {kinds[0]}. If it was made before losses were recorded, "
            "it is in another unit: make it again with `bmerge precision`"
        )
    return None


def read_info(source: CheckpointSource) -> PosteriorInfo | None:
    """Read `PosteriorInfo` from a precision file's header; None if another program wrote it."""
    return parse_info(source.metadata, source.files[0])


def parse_info(metadata: Mapping[str, str], file: Path) -> PosteriorInfo | None:
    """Parse `PosteriorInfo` from the metadata of a precision file.

    Args:
        metadata: The `__metadata__` of the file's header.
        file: The file, for messages.

    Returns:
        The record; None if another program wrote the file.

    Raises:
        PrecisionError: The record is broken, or of a format that this version does not read.
    """
    text = metadata.get(_HEADER_KEY)
    if text is None:
        return None
    try:
        if len(text) > SETTINGS:
            raise DocumentError(f"{len(text):,} characters, where at most {SETTINGS:,} are read")
        content = parse_json(text)
        if not isinstance(content, dict):
            raise DocumentError("it is not a mapping")
        if content.get("format") not in range(1, FORMAT + 1):
            raise PrecisionError(
                f"{file}: posterior format {shown(content.get('format'))}, this version reads 1 to "
                f"{FORMAT}. Update mergekit-bayes."
            )
        info = as_record(PosteriorInfo, content)
        _check_numbers(info)
        return info
    except DocumentError as error:
        raise PrecisionError(
            f"{file}: its posterior information cannot be read ({error}). Make the precision "
            "again, or take the file as it was."
        ) from None


def _check_numbers(info: PosteriorInfo) -> None:
    """Refuse numbers with which no merge can count.

    Raises:
        DocumentError: A number is NaN or beyond float32, or a prior's precision is below zero.
    """
    prior, merge = info.prior, info.merge
    numbers: dict[str, float | None] = {
        "observations": info.observations,
        "ess": info.ess,
        "sampled": info.sampled,
        "prior.precision": prior.precision,
        "prior.base_count": prior.base_count,
        "anchor.precision": info.anchor.precision,
        "merge.common_count": merge.common_count if merge is not None else None,
    }
    if info.predictive is not None:
        for name, number in info.predictive:
            numbers[f"predictive.{name}"] = number
            if not number > 0:
                raise DocumentError(f"predictive.{name} is {number}, not above zero")
    for i, term in enumerate(info.terms):
        numbers |= {f"terms.{i}.scale": term.scale, f"terms.{i}.gain": term.gain}
    for i, edit in enumerate(info.edits):
        numbers |= {
            f"edits.{i}.{name}": getattr(edit, name)
            for name in ("kappa", "tau", "base", "start_count")
        }
        if edit.start_count is not None and edit.start_count <= 0:
            raise DocumentError(f"edits.{i}.start_count is {edit.start_count}, not above zero")
    for name, number in numbers.items():
        if number is not None and not abs(number) <= _LARGEST:
            raise DocumentError(f"{name} is {number}, which no merge can count with")
    for name in ("prior.precision", "anchor.precision"):
        if (numbers[name] or 0) < 0:
            raise DocumentError(f"{name} is {numbers[name]}, and a precision is not negative")


def identify(source: TensorSource, *, full: bool = True) -> Identity:
    """Identity of a set of tensors, with the hash of all bytes unless `full` is False."""
    return Identity(blocks=identity(source), full=identity(source, full=True) if full else None)


def base_identity(path: Path) -> Identity | None:
    """Identity of a model file or folder; None where no safetensors files can be opened."""
    try:
        source = SafetensorsSource(checkpoint_files(path))
    except CheckpointError:
        return None  # pickles: a merge could not check such a base anyway
    with source:
        return identify(source)
