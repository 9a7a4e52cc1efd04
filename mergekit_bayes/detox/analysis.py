"""What each method pays at equal toxicity, with paired bootstrap intervals.

Scales of different methods do not compare. A curve runs from the base over its candidates in the
order of their scales; where an axis (the toxic share, or the loss on held-out toxic text) first
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
from mergekit_bayes.records import Array, Record

Verdict = Literal["pays less", "pays more", "no difference visible", "not comparable"]
_ENOUGH = 0.95  # share of resamples that must reach a level before an interval is given
_PARTS = (0.5, 0.25, 0.1)
_RISES = (0.25, 0.5, 0.75)


class Matched(Record):
    """What each curve pays at one level of one axis: nats a token above the base; None where it
    does not get there.

    `axis` is a scorer, whose level is a toxic share, or the held-out toxic text, whose level is a
    loss.
    """

    axis: str
    level: float
    text: str
    paid: dict[str, Interval | None]


class Comparison(Record):
    """One curve against another at one level: `difference` of what they pay, `ratio` where both pay
    anything.
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
        effect: `there` if it pays less at some level and more at none, `reversed` if the other way
            round, `mixed` if both happen, `not there` if neither.
        less, more, levels: At how many levels the interval is below, above zero; how many could be
            compared.
    """

    axis: str
    text: str
    curve: str
    against: str
    effect: Literal["there", "reversed", "mixed", "not there"]
    less: int
    more: int
    levels: int
    ratios: tuple[float, ...]


def match(
    curves: Sequence[Curve],
    base: EvaluateReport,
    reports: Mapping[str, Sequence[EvaluateReport]],
    levels: Sequence[float] = (),
    rises: Sequence[float] = (),
) -> tuple[list[Matched], list[Comparison]]:
    """Compare all curves at equal toxicity.

    Args:
        base: Of the base, with its numbers by prompt and document.
        reports: By curve's label, in the order of the scales.
        levels: Toxic shares; empty: parts of the base's.
        rises: Of the held-out loss, nats a token; empty: parts of the smallest rise that a curve
            ends with.
    """
    scorers, texts = list(base.toxicity), list(base.perplexity)
    shares = {
        (c.label, s): _stack([_shares(r, s) for r in (base, *reports[c.label])])
        for c in curves
        for s in scorers
    }
    losses = {
        (c.label, t): _stack([_losses(r, t) for r in (base, *reports[c.label])])
        for c in curves
        for t in texts
    }
    matched, compared = [], []
    axes = [*scorers, *([HELD_OUT] if HELD_OUT in texts else [])]
    for axis in axes:
        held_out = axis == HELD_OUT
        along = {c.label: (losses if held_out else shares)[c.label, axis] for c in curves}
        for level in _levels(along, held_out, levels, rises):
            for text in texts:
                if text == HELD_OUT:
                    continue
                paid = {
                    c.label: _read(along[c.label], losses[c.label, text], level, held_out)
                    for c in curves
                }
                intervals = {label: _interval(p) for label, p in paid.items()}
                matched.append(Matched(axis=axis, level=level, text=text, paid=intervals))
                compared += [
                    _compare(axis, level, text, c.label, o.label, paid)
                    for c in curves
                    for o in _rivals(c, curves)
                ]
    return matched, compared


def findings(compared: Sequence[Comparison]) -> list[Finding]:
    """One finding for each axis, text and pair of curves."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for c in compared:
        groups.setdefault((c.axis, c.text, c.curve, c.against), []).append(c)
    found = []
    for (axis, text, curve, against), group in groups.items():
        less = sum(c.verdict == "pays less" for c in group)
        more = sum(c.verdict == "pays more" for c in group)
        effect: Literal["there", "reversed", "mixed", "not there"] = "not there"
        if less or more:
            effect = "mixed" if less and more else "there" if less else "reversed"
        found.append(
            Finding(
                axis=axis,
                text=text,
                curve=curve,
                against=against,
                effect=effect,
                less=less,
                more=more,
                levels=sum(c.verdict != "not comparable" for c in group),
                ratios=tuple(c.ratio for c in group if c.ratio is not None),
            )
        )
    return found


def _rivals(curve: Curve, curves: Sequence[Curve]) -> list[Curve]:
    """Gradient matching is compared with task arithmetic and with its own control."""
    if curve.method != "gradient_matching":
        return []
    return [
        c
        for c in curves
        if c.method == "task_arithmetic" or (c.method == "control" and c[2:] == curve[2:])
    ]


def _shares(report: EvaluateReport, scorer: str) -> Array:
    found = report.toxicity[scorer]
    values = np.asarray(found.prompt_share, np.float64)[:, None]
    resampled = resampled_sums(values, report.settings["bootstrap"], report.settings["seed"])[
        :, 0
    ] / len(values)
    return np.concatenate([[found.share.value], resampled])


def _losses(report: EvaluateReport, text: str) -> Array:
    found = report.perplexity[text]
    values = np.stack([found.document_nats, found.document_tokens], axis=1).astype(np.float64)
    sums = resampled_sums(values, report.settings["bootstrap"], report.settings["seed"])
    return np.concatenate([[found.loss.value], sums[:, 0] / sums[:, 1]])


def _stack(columns: Sequence[Array]) -> Array:
    """(1 + resamples, points of a curve); the first row is the estimate, the first column the base."""
    return np.stack(columns, axis=1)


def _levels(
    along: Mapping[str, Array], rising: bool, shares: Sequence[float], rises: Sequence[float]
) -> list[float]:
    start = float(next(iter(along.values()))[0, 0])
    if not rising:
        below = [level for level in shares if level < start]  # others are reached by doing nothing
        return below or [part * start for part in _PARTS if start > 0]
    if rises:
        return [start + r for r in rises]
    reach = min(float(np.max(a[0])) for a in along.values()) - start
    return [start + part * reach for part in _RISES] if 0 < reach < np.inf else []


def _read(along: Array, cost: Array, level: float, rising: bool) -> Array:
    """What is paid where `along` first reaches the level, by row; NaN where it never does."""
    sign = 1.0 if rising else -1.0
    x, goal = sign * along, sign * level
    reached = x >= goal
    at = np.argmax(reached, axis=1)
    before = np.maximum(at - 1, 0)
    rows = np.arange(len(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (goal - x[rows, before]) / (x[rows, at] - x[rows, before])
        part = np.where(at == 0, 0.0, part)
        paid = cost[rows, before] + part * (cost[rows, at] - cost[rows, before]) - cost[:, 0]
    return np.asarray(np.where(reached.any(axis=1), paid, np.nan), np.float64)


def _interval(paid: Array) -> Interval | None:
    if not np.isfinite(paid[0]):
        return None
    resampled = paid[1:][np.isfinite(paid[1:])]
    if len(resampled) < _ENOUGH * (len(paid) - 1):
        return Interval(value=float(paid[0]))
    return interval(float(paid[0]), resampled, len(resampled))


def _compare(
    axis: str, level: float, text: str, curve: str, against: str, paid: Mapping[str, Array]
) -> Comparison:
    difference = _interval(paid[curve] - paid[against])
    ratio = None
    verdict: Verdict = "not comparable"
    if difference is not None:
        mine, other = float(paid[curve][0]), float(paid[against][0])
        ratio = mine / other if mine > 0 and other > 0 else None
        if difference.low is not None and difference.high is not None:
            low, high = difference.low, difference.high
            verdict = (
                "pays less" if high < 0 else "pays more" if low > 0 else "no difference visible"
            )
    return Comparison(
        axis=axis,
        level=level,
        text=text,
        curve=curve,
        against=against,
        difference=difference,
        ratio=ratio,
        verdict=verdict,
    )
