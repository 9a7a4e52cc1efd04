"""What deserves a look in a checkpoint: the notes of a report."""

import math
from collections.abc import Iterator, Sequence

from mergekit_bayes.errors import BmergeError
from mergekit_bayes.inspect.report import LayerReport, PrecisionSummary
from mergekit_bayes.posterior import Posterior, PosteriorInfo, open_posterior
from mergekit_bayes.posterior.information import doubts
from mergekit_bayes.posterior.mixture import Mixture, read_mixture

_WIDE = 0.2  # IVON's noise should stay below this share of the weights' RMS
_ROUNDING = 0.02  # of precisions in BF16, twice
_HEALTH = (  # number in IVON's health report, its bound, what it means above the bound
    ("init_fraction", 0.5, "more than half of IVON's curvature is still its initial value"),
    ("kappa", 1.0, "noise decides the size of IVON's curvature"),
)


def layer_notes(layers: Sequence[LayerReport], precision: PrecisionSummary | None) -> Iterator[str]:
    """Notes on bad entries and on what a merge should know of the precision.

    Args:
        layers: The layers, with values.
        precision: The precision; None if there is none.
    """
    if bad := sum(layer.bad or 0 for layer in layers):
        yield f"{bad:,} weights are not finite"
    if precision is None:
        yield "no precision: make one with `bmerge precision`, or fine-tune with IVON"
        return
    yield from _precision_notes(layers, precision)
    info = precision.info
    # Not of a curvature that was measured afterwards, which has no `init_fraction`: IVON's noise in
    # training says nothing about it.
    if info is not None and info.estimator == "ivon" and "init_fraction" in info.health:
        yield from _ivon_notes(layers, info)


def mixture_notes(model: Posterior) -> Iterator[str]:
    """What of a mixture is missing, or is not what its record says. Reads headers and hashes.

    Args:
        model: The plain model of its folder; any other model has none of these notes.
    """
    mixture = None if model.parts else read_mixture(model.path)
    if mixture is None:
        return
    for number, run in enumerate(mixture.runs):
        place = mixture.place(model.path, number)
        if (what := _fault(model, mixture, number)) is not None:
            yield f"the run '{run}' of this mixture: {what} ('{place}'), so that it does not merge"


def _fault(plain: Posterior, mixture: Mixture, number: int) -> str | None:
    """What is wrong with a component; None where nothing is."""
    place = mixture.place(plain.path, number)
    if not place.is_dir():
        return "its folder is missing"
    try:
        with open_posterior(str(place)) as posterior:
            if posterior.identity != mixture.components[number].mean.blocks:
                return "its weights are others than the record of the mixture says"
            if posterior.precision is None:
                return "its precision is missing"
            if posterior.info is not None and posterior.info.mean.blocks != posterior.identity:
                return "its precision was made for other weights"
    except BmergeError as error:
        return f"it cannot be read: {error}"
    return None


def _precision_notes(layers: Sequence[LayerReport], precision: PrecisionSummary) -> Iterator[str]:
    if precision.belongs is False:
        yield "the precision was made for other weights"
    if precision.info is None:
        yield (
            "the precision does not say where it comes from; it is taken as summed over the data, "
            "prior 0"
        )
    if precision.bad:
        yield f"{precision.bad:,} entries of the precision are negative or not finite"
    if precision.zeros:
        yield f"{precision.zeros:,} entries of the precision are zero"
    if precision.covered < 1:
        yield f"{1 - precision.covered:.1%} of the parameters have no precision"
    covered = sum(layer.precision.parameters for layer in layers if layer.precision is not None)
    if precision.matrices:
        yield (
            f"{precision.matrices} tensors have matrices, whose diagonals are "
            "shown: the precision of an entry given all others"
        )
    elif precision.numbers < covered:
        yield (
            f"the precision is pooled: {precision.numbers:,} numbers stand for {covered:,} "
            "parameters"
        )
    if precision.information is not None:
        yield from (f"the precision is doubtful: {d}" for d in doubts(precision.information))
        # Pooling changes the largest number, too.
        is_by_entry = precision.numbers == covered
        if is_by_entry and (factor := _scaled_by(layers, precision.info)) is not None:
            yield (
                f"the numbers of the precision are {factor:.3g} times those that its record "
                "describes: they were scaled, or are in another unit"
            )
    for name, reason in list(precision.misfits.items())[:1]:
        count = len(precision.misfits)
        others = f" and {count - 1:,} other tensors" if count > 1 else ""
        yield f"'{name}'{others} of the precision fit none of the model: of the first, {reason}"


def _scaled_by(layers: Sequence[LayerReport], info: PosteriorInfo | None) -> float | None:
    """By what all precisions seem to have been multiplied since they were recorded; None for 1.

    The smallest and the largest must have changed by one factor.
    """
    health = {} if info is None else info.health
    low, high = health.get("precision_min"), health.get("precision_max")
    ends = [
        layer.precision.quantiles
        for layer in layers
        if layer.precision and layer.precision.quantiles
    ]
    if not (isinstance(low, int | float) and isinstance(high, int | float) and high > 0 and ends):
        return None
    factor = max(end[-1] for end in ends) / high
    is_scaled = math.isclose(min(end[0] for end in ends), factor * low, rel_tol=_ROUNDING)
    return factor if is_scaled and not math.isclose(factor, 1, rel_tol=_ROUNDING) else None


def _ivon_notes(layers: Sequence[LayerReport], info: PosteriorInfo) -> Iterator[str]:
    for key, bound, meaning in _HEALTH:
        value = info.health.get(key)
        if isinstance(value, (int, float)) and value > bound:
            yield f"{key} {value:.3g}: {meaning}"
    wide = ", ".join(
        layer.name
        for layer in layers
        if layer.precision and (layer.precision.sigma_ratio or 0) > _WIDE
    )
    if wide:
        yield (
            f"IVON's noise was above a fifth of the weights' RMS in {wide}; raise ess or hess_init"
        )
