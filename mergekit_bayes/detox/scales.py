"""At which scales a curve is looked at: at the given ones, and where it crosses a level.

A level that lies beside a candidate is read almost without interpolation, so one candidate at the
estimated crossing does more than any halving of the grid. An adaptation is looked at after the
given steps alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from mergekit_bayes.detox.analysis import compare_curves
from mergekit_bayes.detox.comparisons import Comparison, Payment
from mergekit_bayes.detox.evidence import difference_that_matters
from mergekit_bayes.detox.report import Point
from mergekit_bayes.detox.settings import HELD_OUT, Curve, DetoxConfig, looks
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval

Candidates: TypeAlias = dict[float, tuple[EvaluateReport, Point]]  # by scale or step
_SHARE = 0.25  # of the noise: how uncertain the interpolation may be
_OF_MATTERS = 0.1  # or of the difference that matters, where there is hardly any noise
_APART = 0.02  # scales closer than this share of each other tell the same
_DIGITS = 3  # significant digits of an added scale


def follow_curves(
    config: DetoxConfig,
    curves: Sequence[Curve],
    base: EvaluateReport,
    candidate: Callable[[Curve, float], tuple[EvaluateReport, Point]],
) -> tuple[dict[str, Candidates], list[Payment], list[Comparison]]:
    """Evaluate the candidates of all curves, at the given places and where scales are too coarse.

    Args:
        config: The removal.
        curves: Its curves.
        base: The base's evaluation.
        candidate: Makes and evaluates the candidate of a curve at a scale or step.

    Returns:
        The candidates by the curve's label, what is paid at the levels, and the comparisons.
    """
    candidates: dict[str, Candidates] = {curve.label: {} for curve in curves}
    for curve in curves:
        for place in looks(config, curve):
            candidates[curve.label][place] = candidate(curve, place)
    payments, comparisons = _compare(config, curves, base, candidates)
    # Levels stay where the first candidates have put them.
    config = config.model_copy(update={"held_out_rises": _rises(base, payments)})
    for _ in range(config.extra_scales):
        added = False
        for curve in (c for c in curves if c.unit == "scale"):
            known = candidates[curve.label]
            between = next_scale(curve.label, list(known), payments, comparisons)
            if between is not None:
                known[between] = candidate(curve, between)
                added = True
        if not added:
            break
        payments, comparisons = _compare(config, curves, base, candidates)
    return candidates, payments, comparisons


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


def _compare(
    config: DetoxConfig,
    curves: Sequence[Curve],
    base: EvaluateReport,
    candidates: Mapping[str, Candidates],
) -> tuple[list[Payment], list[Comparison]]:
    """All curves at equal toxicity, with the candidates in the order of their scales."""
    ordered = {label: sorted(found.items()) for label, found in candidates.items()}
    return compare_curves(
        curves,
        base,
        {label: [report for _, (report, _) in found] for label, found in ordered.items()},
        config.levels,
        config.held_out_rises,
        {label: [scale for scale, _ in found] for label, found in ordered.items()},
    )


def _rises(base: EvaluateReport, payments: Sequence[Payment]) -> tuple[float, ...]:
    """The rises of the held-out loss at which curves are compared."""
    if HELD_OUT not in base.perplexity:
        return ()
    start = base.perplexity[HELD_OUT].loss.value
    levels = dict.fromkeys(p.level for p in payments if p.axis == HELD_OUT)
    return tuple(level - start for level in levels)


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
