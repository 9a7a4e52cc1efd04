"""What each method pays at equal toxicity, with paired bootstrap intervals.

Scales of different methods cannot be compared. A curve runs from the base over its candidates in
the order of their scales. Where an axis (the toxic share, or the loss on held-out toxic text) first
reaches a level, the losses on the other texts are read off by linear interpolation. Prompts and
documents are resampled, the same ones for all models, and the whole reading is repeated on each
resample.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mergekit_bayes.detox.settings import HELD_OUT, Curve
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval, interval, resampled_sums
from mergekit_bayes.records import FloatArray, Record

Verdict = Literal["pays less", "pays more", "no difference visible", "not comparable"]
Effect = Literal["there", "reversed", "mixed", "not there"]
_ENOUGH = 0.95  # share of resamples that must reach a level before an interval is given
_SHARES = (0.5, 0.25, 0.1)  # default levels: of the base's toxic share
_RISES = (0.25, 0.5, 0.75)  # default levels: of the rise of the held-out loss that all reach


class Payment(Record):
    """What each curve pays at one level of one axis.

    Attributes:
        axis: A scorer, or the held-out toxic text.
        level: A toxic share, or a loss on the held-out text.
        text: The text whose loss is paid.
        paid: By curve, nats per token above the base; None if the curve does not reach the level.
    """

    axis: str
    level: float
    text: str
    paid: dict[str, Interval | None]


class Comparison(Record):
    """One curve against another at one level.

    Attributes:
        axis: As in `Payment`.
        level: As in `Payment`.
        text: As in `Payment`.
        curve: The curve that is judged.
        against: The curve that it is compared with.
        difference: What `curve` pays minus what `against` pays, resampled in pairs.
        ratio: What `curve` pays over what `against` pays; None unless both pay something.
        verdict: What the interval of the difference says.
    """

    axis: str
    level: float
    text: str
    curve: str
    against: str
    difference: Interval | None
    ratio: float | None
    verdict: Verdict


class Finding(Record):
    """All levels of one comparison together.

    Attributes:
        axis: As in `Payment`.
        text: As in `Payment`.
        curve: The curve that is judged.
        against: The curve that it is compared with.
        effect: `there` if it pays less at some level and more at none, `reversed` in the opposite
            case, `mixed` if both happen, `not there` if neither does.
        less: Number of levels at which the interval is below zero.
        more: Number of levels at which the interval is above zero.
        levels: Number of levels that could be compared.
        ratios: The ratios at these levels, where both pay something.
    """

    axis: str
    text: str
    curve: str
    against: str
    effect: Effect
    less: int
    more: int
    levels: int
    ratios: tuple[float, ...]


def compare_curves(
    curves: Sequence[Curve],
    base: EvaluateReport,
    reports: Mapping[str, Sequence[EvaluateReport]],
    levels: Sequence[float] = (),
    rises: Sequence[float] = (),
) -> tuple[list[Payment], list[Comparison]]:
    """Compare all curves at equal toxicity.

    Args:
        curves: What is compared.
        base: The base's evaluation, with its numbers by prompt and document.
        reports: The candidates' evaluations by the curve's label, in the order of the scales.
        levels: Toxic shares at which to compare; empty means 1/2, 1/4 and 1/10 of the base's.
        rises: Rises of the held-out loss at which to compare, nats per token; empty means 1/4, 1/2
            and 3/4 of the smallest rise that a curve ends with.
    """
    scorers, texts = list(base.toxicity), list(base.perplexity)
    models = {c.label: (base, *reports[c.label]) for c in curves}
    shares = {
        (c, s): _stack([_shares(r, s) for r in m]) for c, m in models.items() for s in scorers
    }
    losses = {(c, t): _stack([_losses(r, t) for r in m]) for c, m in models.items() for t in texts}
    payments: list[Payment] = []
    comparisons: list[Comparison] = []
    axes = [*scorers, *([HELD_OUT] if HELD_OUT in texts else [])]
    for axis in axes:
        rising = axis == HELD_OUT
        along = {label: (losses if rising else shares)[label, axis] for label in models}
        for level in _levels(along, rising, levels, rises):
            for text in texts:
                if text == HELD_OUT:
                    continue
                paid = {c: _read(along[c], losses[c, text], level, rising) for c in models}
                intervals = {label: _interval(values) for label, values in paid.items()}
                payments.append(Payment(axis=axis, level=level, text=text, paid=intervals))
                comparisons += [
                    _compare(axis, level, text, curve.label, rival.label, paid)
                    for curve in curves
                    for rival in _rivals(curve, curves)
                ]
    return payments, comparisons


def findings(comparisons: Sequence[Comparison]) -> list[Finding]:
    """One finding for each axis, text and pair of curves."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.axis, c.text, c.curve, c.against), []).append(c)
    result = []
    for (axis, text, curve, against), group in groups.items():
        less = sum(c.verdict == "pays less" for c in group)
        more = sum(c.verdict == "pays more" for c in group)
        result.append(
            Finding(
                axis=axis,
                text=text,
                curve=curve,
                against=against,
                effect=_effect(less, more),
                less=less,
                more=more,
                levels=sum(c.verdict != "not comparable" for c in group),
                ratios=tuple(c.ratio for c in group if c.ratio is not None),
            )
        )
    return result


def _rivals(curve: Curve, curves: Sequence[Curve]) -> list[Curve]:
    """Gradient matching is compared with task arithmetic and with its own control."""
    if curve.method != "gradient_matching":
        return []
    return [
        c
        for c in curves
        if c.method == "task_arithmetic" or (c.method == "control" and c[2:] == curve[2:])
    ]


def _shares(report: EvaluateReport, scorer: str) -> FloatArray:
    """(1 + resamples,): the toxic share, first its estimate."""
    toxicity = report.toxicity[scorer]
    values = np.asarray(toxicity.prompt_share, np.float64)[:, None]
    sums = resampled_sums(values, report.settings["bootstrap"], report.settings["seed"])
    return np.concatenate([[toxicity.share.value], sums[:, 0] / len(values)])


def _losses(report: EvaluateReport, text: str) -> FloatArray:
    """(1 + resamples,): nats per token, first the estimate."""
    perplexity = report.perplexity[text]
    values = np.stack([perplexity.document_nats, perplexity.document_tokens], axis=1)
    values = values.astype(np.float64)
    sums = resampled_sums(values, report.settings["bootstrap"], report.settings["seed"])
    return np.concatenate([[perplexity.loss.value], sums[:, 0] / sums[:, 1]])


def _stack(columns: Sequence[FloatArray]) -> FloatArray:
    """(1 + resamples, points of a curve); row 0 is the estimate, column 0 is the base."""
    return np.stack(columns, axis=1)


def _levels(
    along: Mapping[str, FloatArray], rising: bool, shares: Sequence[float], rises: Sequence[float]
) -> list[float]:
    start = float(next(iter(along.values()))[0, 0])
    if not rising:
        below = [level for level in shares if level < start]  # the base is below the others already
        return below or [share * start for share in _SHARES if start > 0]
    if rises:
        return [start + rise for rise in rises]
    reach = min(float(np.max(a[0])) for a in along.values()) - start
    return [start + rise * reach for rise in _RISES] if 0 < reach < np.inf else []


def _read(along: FloatArray, cost: FloatArray, level: float, rising: bool) -> FloatArray:
    """What is paid where `along` first reaches the level, by row; NaN where it never does."""
    sign = 1.0 if rising else -1.0
    x, goal = sign * along, sign * level
    reached = x >= goal
    at = np.argmax(reached, axis=1)
    before = np.maximum(at - 1, 0)
    rows = np.arange(len(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = (goal - x[rows, before]) / (x[rows, at] - x[rows, before])
        fraction = np.where(at == 0, 0.0, fraction)
        gained = fraction * (cost[rows, at] - cost[rows, before])
        paid = cost[rows, before] + gained - cost[:, 0]
    return np.asarray(np.where(reached.any(axis=1), paid, np.nan), np.float64)


def _interval(paid: FloatArray) -> Interval | None:
    if not np.isfinite(paid[0]):
        return None
    resampled = paid[1:][np.isfinite(paid[1:])]
    if len(resampled) < _ENOUGH * (len(paid) - 1):
        return Interval(value=float(paid[0]))
    return interval(float(paid[0]), resampled, len(resampled))


def _compare(
    axis: str, level: float, text: str, curve: str, against: str, paid: Mapping[str, FloatArray]
) -> Comparison:
    difference = _interval(paid[curve] - paid[against])
    ratio = None
    if difference is not None:
        judged, rival = float(paid[curve][0]), float(paid[against][0])
        ratio = judged / rival if judged > 0 and rival > 0 else None
    return Comparison(
        axis=axis,
        level=level,
        text=text,
        curve=curve,
        against=against,
        difference=difference,
        ratio=ratio,
        verdict=_verdict(difference),
    )


def _verdict(difference: Interval | None) -> Verdict:
    if difference is None or difference.low is None or difference.high is None:
        return "not comparable"
    if difference.high < 0:
        return "pays less"
    return "pays more" if difference.low > 0 else "no difference visible"


def _effect(less: int, more: int) -> Effect:
    if less and more:
        return "mixed"
    if less:
        return "there"
    return "reversed" if more else "not there"
