"""What `bmerge inspect` reports."""

from pydantic import Field

from mergekit_bayes import __version__
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.posterior.information import Information
from mergekit_bayes.records import Frozen

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class PrecisionLayer(Frozen):
    """The precision of a layer, 1/weight^2.

    Attributes:
        parameters: Parameters that have a precision.
        quantiles: The smallest, the `QUANTILES`, the largest.
        sigma_ratio: Posterior deviation at the median of the stored precision over the RMS of the
            weights; None if either is zero.
        zeros: Parameters whose precision is zero.
        bad: Parameters whose precision is negative or not finite.
    """

    parameters: int
    quantiles: tuple[float, ...]
    sigma_ratio: float | None
    zeros: int
    bad: int


class DifferenceLayer(Frozen):
    """The difference between the layers of two models, in weights.

    Attributes:
        parameters: Compared parameters, which are finite in both models.
        rms: RMS of the difference.
        relative: `rms` over the RMS of the first model's weights; None if those are zero.
        largest: Largest absolute difference.
    """

    parameters: int
    rms: float
    relative: float | None
    largest: float


class LayerReport(Frozen):
    """The parameters of one layer.

    Attributes:
        name: Common start of the tensors' names, or `embeddings`, `rest`, `head`.
        tensors: Number of tensors.
        parameters: Number of entries.
        rms: RMS of the finite entries; None where only headers were read.
        largest: Largest absolute value of the finite entries, likewise.
        bad: Entries that are not finite, likewise.
        precision: Its precision; None without one.
        difference: Difference to the other model's layer; None without a partner.
    """

    name: str
    tensors: int
    parameters: int
    rms: float | None
    largest: float | None
    bad: int | None
    precision: PrecisionLayer | None = None
    difference: DifferenceLayer | None = None


class PrecisionSummary(Frozen):
    """Where the precision lies, who made it, and whether it can be trusted.

    Attributes:
        files: Its files.
        info: All that its author wrote; None for a file from elsewhere.
        belongs: Whether it was made for these weights (identity by sampled blocks); None if it does
            not say, or where only headers were read.
        covered: Share of the model's parameters that have a precision.
        numbers: Stored precisions: fewer where one stands for a row or a tensor.
        matrices: Tensors that have matrices; of these the layers show the diagonals.
        unknown: Its tensors that the model lacks or has in another shape, or of another dtype.
        misfits: What is wrong with each of them.
        zeros: Parameters whose precision is zero; None where only headers were read.
        bad: Parameters whose precision is negative or not finite, likewise.
        information: What a sample of its entries says about its worth; None where only headers
            were read, or most entries have no number of their own.
        not_samplable: Why weights cannot be drawn from it (`bmerge evaluate --samples`), of numbers
            unless a prior is given.
        draws_over_rms: Median deviation of the draws for predictions over the RMS of the weights,
            at the median matrix; None where `info` has no `predictive`, where only headers were
            read, and for BASE+ADAPTER, of which the factors are drawn.
    """

    files: tuple[str, ...]
    info: PosteriorInfo | None
    belongs: bool | None
    covered: float
    numbers: int
    unknown: tuple[str, ...]
    misfits: dict[str, str] = {}
    zeros: int | None
    bad: int | None
    information: Information | None = None
    not_samplable: str | None = None
    draws_over_rms: float | None = None
    matrices: int = 0


class Comparison(Frozen):
    """The difference to another model, over all of its tensors.

    Attributes:
        path: The other model.
        parameters: Compared parameters.
        rms: RMS of the difference.
        relative: `rms` over the RMS of the first model's weights; None if those are zero.
        largest: Largest absolute difference.
        only_here: Tensors of the first model without a partner of the same shape.
        only_there: Tensors of the other model without a partner.
    """

    path: str
    parameters: int
    rms: float
    relative: float | None
    largest: float
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]


class MixedRun(Frozen):
    """A component of a mixture.

    Attributes:
        label: The run, as it was named when it was mixed.
        weight: Its weight; those of a mixture sum to one.
        path: Where it is.
    """

    label: str
    weight: float
    path: str


class InspectReport(Frozen):
    """What is in a checkpoint.

    Attributes:
        version: Version of bmerge.
        path: A local path, or the Hub id with its commit.
        files: Files of the tensors.
        bytes: Their size.
        identity: SHA-256 by sampled blocks; None where only headers were read.
        tensors: Number of stored tensors.
        parameters: Entries without buffers and tied copies.
        dtypes: Parameters by the dtype that holds them.
        buffers: Tensors that are no parameters.
        tied: Stored copies of another tensor.
        layers: Embeddings, numbered layers in order, the rest, the head.
        precision: Its precision; None without one.
        comparison: The difference to another model; None without one.
        mixture: The components of a mixture, of which the plain model is shown; a report of any
            other model has no such key.
        quantiles: The shares of the quantiles in `layers`.
        notes: What deserves a look.
    """

    version: str = __version__
    path: str
    files: tuple[str, ...]
    bytes: int
    identity: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    buffers: tuple[str, ...]
    tied: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    precision: PrecisionSummary | None
    comparison: Comparison | None
    mixture: tuple[MixedRun, ...] = Field(default=(), exclude_if=lambda runs: not runs)
    quantiles: tuple[float, ...] = (0.0, *QUANTILES, 1.0)
    notes: tuple[str, ...]
