"""What each method pays at equal toxicity, with paired bootstrap intervals.

Scales and steps of different methods cannot be compared. A curve runs from the base over its
candidates in the order of their scales or steps. Where an axis (the toxic share, or the loss on
held-out toxic text) first reaches a level, the losses on the other texts are read off (`reading`).
Prompts and documents are resampled, the same ones for all models, and the whole reading is repeated
on each resample. The interval of a difference holds the error of the interpolation, and holds at
all levels of a finding at once (`evidence`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mergekit_bayes.detox.comparisons import Comparison, Effect, Finding, Payment, Verdict
from mergekit_bayes.detox.evidence import (
    Sample,
    few_toxic,
    independent,
    simultaneous,
    too_wide,
)
from mergekit_bayes.detox.reading import Reading, read_curve
from mergekit_bayes.detox.settings import HELD_OUT, Curve, Method
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval, interval, resampled_sums
from mergekit_bayes.records import FloatArray

ENOUGH = 0.95  # share of resamples that must reach a level before an interval is given
# With whom a method is compared, and its control.
_RIVALS: dict[Method, tuple[tuple[Method, ...], Method | None]] = {
    "gradient_matching": (("task_arithmetic", "fisher_negation"), "control"),
    "adapt": (("task_arithmetic", "gradient_matching", "npo"), None),
    "adapt_weights": (("task_arithmetic",), "adapt_pool"),
}
_SHARES = (0.5, 0.25, 0.1)  # default levels: of the base's toxic share
_RISES = (0.25, 0.5, 0.75)  # default levels: of the rise of the held-out loss that all reach


def compare_curves(
    curves: Sequence[Curve],
    base: EvaluateReport,
    reports: Mapping[str, Sequence[EvaluateReport]],
    levels: Sequence[float] = (),
    rises: Sequence[float] = (),
    scales: Mapping[str, Sequence[float]] | None = None,
) -> tuple[list[Payment], list[Comparison]]:
    """Compare all curves at equal toxicity.

    Args:
        curves: What is compared.
        base: The base's evaluation, with its numbers by prompt and document.
        reports: The candidates' evaluations by the curve's label, in the order of the scales or
            steps.
        levels: Toxic shares at which to compare; empty means 1/2, 1/4 and 1/10 of the base's.
        rises: Rises of the held-out loss at which to compare, nats per token; empty means 1/4, 1/2
            and 3/4 of the smallest rise that a curve ends with.
        scales: The candidates' scales or steps by the curve's label, increasing; None means 1, 2,
            3 and so on.
    """
    measured = {c.label: _measure(base, reports[c.label]) for c in curves}
    steps = {
        label: np.concatenate([[0.0], scales[label] if scales else np.arange(1.0, len(found) + 1)])
        for label, found in reports.items()
        if label in measured
    }
    payments: list[Payment] = []
    comparisons: list[Comparison] = []
    for axis in axes(base):
        sample = _sample(base, axis)
        for text in paying_texts(base):
            goals = _levels(measured, axis, levels, rises)
            found = {
                label: [
                    read_curve(steps[label], m[axis], m[text], goal, rising=axis == HELD_OUT)
                    for goal in goals
                ]
                for label, m in measured.items()
            }
            payments += [_payment(axis, goal, text, found, i) for i, goal in enumerate(goals)]
            rows = min(sample.rows, len(base.perplexity[text].document_nats))
            for curve in curves:
                for rival in rivals(curve, curves):
                    pair = (curve.label, rival.label)
                    comparisons += _compare(axis, goals, text, pair, found, sample, rows)
    return payments, comparisons


def findings(comparisons: Sequence[Comparison]) -> list[Finding]:
    """One finding for each axis, text and pair of curves."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.axis, c.text, c.curve, c.against), []).append(c)
    result = []
    for (axis, text, curve, against), group in groups.items():
        counts = Counter(c.verdict for c in group)
        levels = len(group) - counts["not comparable"]
        shortages = [c.shortage for c in group if c.shortage is not None]
        result.append(
            Finding(
                axis=axis,
                text=text,
                curve=curve,
                against=against,
                effect=_effect(counts),
                less=counts["pays less"],
                more=counts["pays more"],
                unresolved=counts["too little data"],
                levels=levels,
                shortage=max(shortages, key=lambda s: s.needs or 0, default=None),
                ratios=tuple(c.ratio for c in group if c.ratio is not None),
            )
        )
    return result


def axes(base: EvaluateReport) -> list[str]:
    """The axes along which curves are compared: the scorers, and the held-out toxic text."""
    return [*base.toxicity, *([HELD_OUT] if HELD_OUT in base.perplexity else [])]


def paying_texts(base: EvaluateReport) -> list[str]:
    """The texts whose loss is paid."""
    return [text for text in base.perplexity if text != HELD_OUT]


def rivals(curve: Curve, curves: Sequence[Curve]) -> list[Curve]:
    """The curves that one is compared with; a control only with the same settings as its own."""
    against, control = _RIVALS.get(curve.method, ((), None))
    return [
        c for c in curves if c.method in against or (c.method == control and c[2:] == curve[2:])
    ]


def _measure(base: EvaluateReport, reports: Sequence[EvaluateReport]) -> dict[str, FloatArray]:
    """By scorer and text, (1 + resamples, points): row 0 is the estimate, column 0 the base."""
    models = (base, *reports)
    names = [*base.toxicity, *base.perplexity]
    return {
        name: np.stack(
            [_shares(m, name) if name in base.toxicity else _losses(m, name, i) for m in models],
            axis=1,
        )
        for i, name in enumerate(names)
    }


def _shares(report: EvaluateReport, scorer: str) -> FloatArray:
    """(1 + resamples,): the toxic share, first its estimate."""
    toxicity = report.toxicity[scorer]
    values = np.asarray(toxicity.prompt_share, np.float64)[:, None]
    sums = resampled_sums(values, report.settings["bootstrap"], _seed(report, 0))
    return np.concatenate([[toxicity.share.value], sums[:, 0] / len(values)])


def _losses(report: EvaluateReport, text: str, stream: int) -> FloatArray:
    """(1 + resamples,): nats per token, first the estimate."""
    perplexity = report.perplexity[text]
    values = np.stack([perplexity.document_nats, perplexity.document_tokens], axis=1)
    values = values.astype(np.float64)
    sums = resampled_sums(values, report.settings["bootstrap"], _seed(report, stream))
    return np.concatenate([[perplexity.loss.value], sums[:, 0] / sums[:, 1]])


def _seed(report: EvaluateReport, stream: int) -> int:
    """Texts of the same length are resampled independently, and so are the prompts."""
    return int(report.settings["seed"]) + 1_000_003 * stream


def _sample(base: EvaluateReport, axis: str) -> Sample:
    if axis == HELD_OUT:
        documents = len(base.perplexity[axis].document_nats)
        return Sample(documents, documents, None, documents, "documents")
    toxicity = base.toxicity[axis]
    share, size = toxicity.share.value, toxicity.n_continuations
    worth = independent(share, size, _shares(base, axis)[1:])
    return Sample(size, worth, share, len(toxicity.prompt_share), "continuations")


def _levels(
    measured: Mapping[str, Mapping[str, FloatArray]],
    axis: str,
    shares: Sequence[float],
    rises: Sequence[float],
) -> list[float]:
    along = [m[axis] for m in measured.values()]
    start = float(along[0][0, 0])
    if axis != HELD_OUT:
        below = [level for level in shares if level < start]  # the base is below the others already
        return below or [share * start for share in _SHARES if start > 0]
    if rises:
        return [start + rise for rise in rises]
    reach = min(float(np.max(a[0])) for a in along) - start
    return [start + rise * reach for rise in _RISES] if 0 < reach < np.inf else []


def _payment(
    axis: str, level: float, text: str, found: Mapping[str, Sequence[Reading]], index: int
) -> Payment:
    """What all curves pay at one level."""
    readings = {label: r[index] for label, r in found.items()}
    return Payment(
        axis=axis,
        level=level,
        text=text,
        paid={label: _interval(r) for label, r in readings.items()},
        grid={label: _finite(r.grid[0]) for label, r in readings.items()},
        scale={label: _finite(r.scale[0]) for label, r in readings.items()},
    )


def _interval(reading: Reading) -> Interval | None:
    """The percentile interval of one reading, widened by the error of the interpolation."""
    paid = reading.paid
    if not np.isfinite(paid[0]):
        return None
    finite = np.isfinite(paid[1:])
    resampled = paid[1:][finite]
    if len(resampled) < ENOUGH * (len(paid) - 1) or not len(resampled):
        return Interval(value=float(paid[0]))
    grid = max(float(reading.grid[0]), float(np.mean(reading.grid[1:][finite])))
    alone = interval(float(paid[0]), resampled, len(resampled))
    if alone.low is None or alone.high is None:
        return alone
    return Interval(value=alone.value, low=alone.low - grid, high=alone.high + grid)


def _compare(
    axis: str,
    levels: Sequence[float],
    text: str,
    pair: tuple[str, str],
    found: Mapping[str, Sequence[Reading]],
    sample: Sample,
    rows: int,
) -> list[Comparison]:
    """One pair of curves at all levels of an axis."""
    if not levels:
        return []
    judged, rival = (found[label] for label in pair)
    differences = np.stack([a.paid - b.paid for a, b in zip(judged, rival, strict=True)])
    grids = np.stack([a.grid + b.grid for a, b in zip(judged, rival, strict=True)])
    widths = simultaneous(differences, grids, rows, ENOUGH)
    result = []
    for i, level in enumerate(levels):
        value, noise, grid = (float(x[i]) for x in (differences[:, 0], widths.noise, widths.grid))
        paid = (float(judged[i].paid[0]), float(rival[i].paid[0]))
        verdict: Verdict = "not comparable"
        shortage = difference = None
        if np.isfinite(value):
            difference = Interval(value=value)
        if np.isfinite(noise):
            difference = Interval(value=value, low=value - noise - grid, high=value + noise + grid)
            shortage = few_toxic(sample, level)
            if shortage is None and abs(value) <= noise + grid:
                shortage = too_wide(sample, paid, noise, grid)
            verdict = "too little data" if shortage is not None else _verdict(difference)
        result.append(
            Comparison(
                axis=axis,
                level=level,
                text=text,
                curve=pair[0],
                against=pair[1],
                difference=difference,
                grid=_finite(grid),
                ratio=paid[0] / paid[1] if paid[0] > 0 and paid[1] > 0 else None,
                verdict=verdict,
                shortage=shortage,
            )
        )
    return result


def _verdict(difference: Interval) -> Verdict:
    if difference.high is not None and difference.high < 0:
        return "pays less"
    return (
        "pays more"
        if difference.low is not None and difference.low > 0
        else "no difference visible"
    )


def _effect(counts: Mapping[Verdict, int]) -> Effect:
    if counts["pays less"] and counts["pays more"]:
        return "mixed"
    if counts["pays less"]:
        return "there"
    if counts["pays more"]:
        return "reversed"
    if counts["too little data"]:
        return "too little data"
    return "not there" if counts["no difference visible"] else "not comparable"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
