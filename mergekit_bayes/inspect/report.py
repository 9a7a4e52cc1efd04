"""What `bmerge inspect` reports."""

from collections.abc import Iterator

from mergekit_bayes import __version__
from mergekit_bayes.posterior import PosteriorInfo
from mergekit_bayes.records import Config

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_WIDE = 0.1  # IVON's noise should stay below this share of the weights' RMS


class PrecisionLayer(Config):
    """The precision of a layer, 1/weight^2.

    Attributes:
        quantiles: Least, the `QUANTILES`, largest.
        sigma_ratio: Posterior deviation at the median precision over the RMS of the weights.
        zeros: Entries without any precision.
    """

    parameters: int
    quantiles: tuple[float, ...]
    sigma_ratio: float | None
    zeros: int
    bad: int


class DifferenceLayer(Config):
    """How far the other model's layer is from the first's: RMS and largest entry of the difference,
    in weights.

    `relative` is the RMS over that of the first model's weights; None if those are zero.
    """

    parameters: int
    rms: float
    relative: float | None
    largest: float


class Layer(Config):
    """Parameters of one layer. `bad` counts entries that are not finite, which `rms` and `largest`
    leave out.

    Those three are None where only headers were read.
    """

    name: str
    tensors: int
    parameters: int
    rms: float | None
    largest: float | None
    bad: int | None
    precision: PrecisionLayer | None = None
    difference: DifferenceLayer | None = None


class PrecisionSummary(Config):
    """Where the precision lies, who made it and whether it can be trusted.

    Attributes:
        info: All that its author wrote; None for a file from elsewhere.
        belongs: Whether it was made for these weights (identity by sampled blocks); None if it does
            not say.
        covered: Share of the model's parameters that have a precision.
        numbers: Precisions that are stored for them: fewer where one stands for a row or a tensor.
        unknown: Its tensors that the model lacks, or has in another shape.
        zeros, bad: Parameters whose precision is zero; is negative or not finite. None where only
            headers were read.
        not_samplable: Why weights cannot be drawn from it (`bmerge evaluate --samples`) unless a
            prior is given.
    """

    files: tuple[str, ...]
    info: PosteriorInfo | None
    belongs: bool | None
    covered: float
    numbers: int
    unknown: tuple[str, ...]
    zeros: int | None
    bad: int | None
    not_samplable: str | None = None


class Comparison(Config):
    """The other model. `only_here` and `only_there` are tensors without a partner of the same
    shape.
    """

    path: str
    parameters: int
    rms: float
    relative: float | None
    largest: float
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]


class InspectReport(Config):
    """What is in a checkpoint.

    Attributes:
        path: A local path, or the Hub id with its commit.
        identity: SHA-256 by sampled blocks; None where only headers were read.
        parameters: Without buffers and tied copies.
        dtypes: Parameters by the dtype that holds them.
        buffers: Tensors that are no parameters.
        tied: Stored copies of another tensor.
        layers: Embeddings, layers in order, the rest, the head.
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
    layers: tuple[Layer, ...]
    precision: PrecisionSummary | None
    comparison: Comparison | None
    quantiles: tuple[float, ...] = (0.0, *QUANTILES, 1.0)
    notes: tuple[str, ...]


def layer_notes(layers: tuple[Layer, ...], precision: PrecisionSummary | None) -> Iterator[str]:
    if bad := sum(layer.bad or 0 for layer in layers):
        yield f"{bad:,} weights are not finite"
    if precision is None:
        yield "no precision: make one with `bmerge precision`, or fine-tune with IVON"
        return
    if precision.belongs is False:
        yield "the precision was made for other weights"
    if precision.info is None:
        yield "the precision does not say where it comes from; it is taken as summed over the data, prior 0"
    if precision.bad:
        yield f"{precision.bad:,} entries of the precision are negative or not finite"
    if precision.zeros:
        yield f"{precision.zeros:,} entries of the precision are zero"
    if precision.covered < 1:
        yield f"{1 - precision.covered:.1%} of the parameters have no precision"
    held = sum(layer.precision.parameters for layer in layers if layer.precision is not None)
    if precision.numbers < held:
        yield f"the precision is pooled: {precision.numbers:,} numbers stand for {held:,} parameters"
    if precision.unknown:
        yield f"{len(precision.unknown)} tensors of the precision fit none of the model, '{precision.unknown[0]}' first"
    if precision.info is None or precision.info.estimator != "ivon":
        # the optimizer's own health says nothing about a curvature that was measured afterwards
        return
    for key, bound, why in (
        ("init_fraction", 0.5, "more than half of IVON's curvature is still its initial value"),
        ("kappa", 1.0, "IVON's curvature is mostly noise"),
    ):
        value = precision.info.health.get(key)
        if isinstance(value, (int, float)) and value > bound:
            yield f"{key} {value:.3g}: {why}"
    wide = [
        x.name
        for x in layers
        if x.precision and x.precision.sigma_ratio and x.precision.sigma_ratio > _WIDE
    ]
    if wide:
        yield f"IVON's noise was above a tenth of the weights' RMS in {', '.join(wide)}; raise ess or hess_init"
