"""Where a curve needs one more candidate: at the scale at which it crosses a level.

A level that lies beside a candidate is read almost without interpolation, so one candidate at the
estimated crossing does more than any halving of the grid.
"""

from collections.abc import Iterable, Sequence

from mergekit_bayes.detox.analysis import Comparison, Payment
from mergekit_bayes.detox.evidence import difference_that_matters
from mergekit_bayes.metrics.base import Interval

_SHARE = 0.25  # of the noise: how uncertain the interpolation may be
_OF_MATTERS = 0.1  # or of the difference that matters, where there is hardly any noise
_APART = 0.02  # scales closer than this share of each other tell the same
_DIGITS = 3  # significant digits of an added scale


def next_scale(
    label: str,
    scales: Sequence[float],
    payments: Iterable[Payment],
    comparisons: Iterable[Comparison],
) -> float | None:
    """The scale at which one more candidate of a curve narrows the intervals most.

    Args:
        label: The curve.
        scales: Its scales so far.
        payments: What all curves pay at the levels.
        comparisons: Their comparisons.

    Returns:
        None where the interpolation is as good as the noise lets one see, or no level is reached.
    """
    noises = _noises(label, comparisons)
    best, worst = None, 1.0
    for p in payments:
        grid, paid = p.grid.get(label), p.paid.get(label)
        scale = p.scale.get(label)
        if grid is None or paid is None or scale is None:
            continue
        noise = noises.get((p.axis, p.level, p.text), _half_width(paid) - grid)
        allowed = max(_SHARE * noise, _OF_MATTERS * difference_that_matters([paid.value]))
        added = float(f"{scale:.{_DIGITS}g}")
        is_new = all(abs(added - s) > _APART * s for s in scales)
        if added > 0 and is_new and grid / allowed > worst:
            best, worst = added, grid / allowed
    return best


def _noises(label: str, comparisons: Iterable[Comparison]) -> dict[tuple[str, float, str], float]:
    """The smallest half-width from resampling of the comparisons of a curve, by level and text."""
    result: dict[tuple[str, float, str], float] = {}
    for c in comparisons:
        if label not in (c.curve, c.against) or c.difference is None or c.grid is None:
            continue
        noise = _half_width(c.difference) - c.grid
        key = (c.axis, c.level, c.text)
        result[key] = min(noise, result.get(key, noise))
    return result


def _half_width(x: Interval) -> float:
    return (x.high - x.low) / 2 if x.low is not None and x.high is not None else 0.0
