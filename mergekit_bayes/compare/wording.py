"""How numbers, differences and names are written on the screen and in the report."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.compare.report import Difference, Evaluated
from mergekit_bayes.metrics.base import Interval

_SHARES = ("toxic share", "prompts with any", "accuracy", "empty", "looping", "repeated pairs")

# What tells text from garble, which also scores as less toxic, by its field in a `SamplesReport`.
_SAMPLES = {
    "mean length": "mean_tokens",
    "empty": "empty",
    "looping": "looping",
    "repeated pairs": "repeated",
    "distinct word pairs": "distinct_2",
}


def short_name(of: str) -> str:
    """A scorer, texts or a judge, of a path its last two parts, which a Hub id is already."""
    kind, colon, rest = of.partition(":")
    if kind in ("words", "model") and rest:
        return f"{kind}:{Path(rest).name}"
    if kind == "panel":
        return f"panel:{_tail(rest)}"
    return of if colon else _tail(of)


def _tail(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def is_share(measure: str) -> bool:
    """Whether a measure is a share, which is written in per cent and its change in points."""
    return measure.split(",")[0] in _SHARES


def change_in_words(difference: Difference) -> str:
    """A change with its interval: `-3.1 points, 95 % -4 to -2.2`."""
    change, unit = difference.change, ""
    if is_share(difference.measure):
        change, unit = scaled(change, 100), " points"
    if change.low is None or change.high is None:
        return f"{change.value:+.3g}{unit}"
    return f"{change.value:+.3g}{unit}, 95 % {change.low:+.3g} to {change.high:+.3g}"


def change_in_short(difference: Difference) -> str:
    """A change with its interval for a table: `-3.1 [-4, -2.2] points`."""
    change, unit = difference.change, ""
    if is_share(difference.measure):
        change, unit = scaled(change, 100), " points"
    if change.low is None or change.high is None:
        return f"{change.value:+.3g}{unit}"
    return f"{change.value:+.3g} [{change.low:+.3g}, {change.high:+.3g}]{unit}"


def scaled(x: Interval, factor: float) -> Interval:
    """The interval in another unit."""
    low, high = (None if end is None else end * factor for end in (x.low, x.high))
    return Interval(value=x.value * factor, low=low, high=high)


class Column(NamedTuple):
    """One measure of all models: a column of the table, and a panel of the picture.

    Attributes:
        measure: What it is: `toxic share`, `perplexity` or the like.
        of: The scorer or the texts, without folders; empty for the continuations.
        unit: `%` for shares, whose numbers are in per cent; else empty.
        values: By label; None where a model has no such number.
    """

    measure: str
    of: str
    unit: str
    values: dict[str, Interval | None]


def columns_of(evaluations: Sequence[Evaluated]) -> list[Column]:
    """What was measured of all models: shares by scorer, texts, labels, quality."""
    columns: dict[tuple[str, str], dict[str, Interval]] = {}
    for one in evaluations:
        for measure, of, value in _numbers(one, per_byte=_is_per_byte(evaluations)):
            columns.setdefault((measure, of), {})[one.label] = value
    labels = [one.label for one in evaluations]
    return [
        Column(
            measure,
            short_name(of),
            "%" if is_share(measure) else "",
            {
                label: None
                if label not in values
                else scaled(values[label], 100)
                if is_share(measure)
                else values[label]
                for label in labels
            },
        )
        for (measure, of), values in columns.items()
    ]


def cell(column: Column, label: str) -> str:
    """A number of the table, with its interval."""
    value = column.values[label]
    if value is None:
        return ""
    unit = f" {column.unit}" if column.unit else ""
    if value.low is None or value.high is None or not math.isfinite(value.value):
        return f"{value.value:.4g}{unit}"
    return f"{value.value:.4g}{unit} [{value.low:.3g}, {value.high:.3g}]"


class Changes(NamedTuple):
    """The differences from one model: a row for each measure, a column for each other model.

    Attributes:
        against: The model that the others are compared with.
        names: What changed: the measure, and the scorer, texts or judge.
        columns: By label, the change of each in short; empty where there is none.
    """

    against: str
    names: list[str]
    columns: dict[str, list[str]]


def changes_of(differences: Sequence[Difference]) -> Iterator[Changes]:
    """All differences, in one table for each model that others are compared with."""
    for against in dict.fromkeys(d.against for d in differences):
        cells = {
            (d.label, f"{d.measure}, {short_name(d.of)}"): change_in_short(d)
            for d in differences
            if d.against == against
        }
        names = list(dict.fromkeys(name for _, name in cells))
        columns = {
            label: [cells.get((label, name), "") for name in names]
            for label in dict.fromkeys(label for label, _ in cells)
        }
        yield Changes(against, names, columns)


def _is_per_byte(evaluations: Sequence[Evaluated]) -> bool:
    """Whether tokenizers differ, so that perplexities per token are not comparable."""
    tokens = [
        [(name, p.document_tokens or p.tokens) for name, p in e.report.perplexity.items()]
        for e in evaluations
    ]
    return any(other != tokens[0] for other in tokens)


def _numbers(one: Evaluated, *, per_byte: bool) -> Iterator[tuple[str, str, Interval]]:
    report = one.report
    for spec, toxicity in report.toxicity.items():
        yield "toxic share", spec, toxicity.share
    for draws, ending in ((report, ""), (report.sampled, ", over samples")):
        if draws is None:
            continue
        for name, perplexity in draws.perplexity.items():
            if per_byte:
                yield f"bits a byte{ending}", name, perplexity.bits_per_byte
            else:
                yield f"perplexity{ending}", name, perplexity.token
        for name, classification in draws.classification.items():
            yield f"accuracy{ending}", name, classification.accuracy
    for task, measured in report.lm_eval.items():
        for score in measured.scores.values():
            yield score.name, task, score.score
    if report.samples is not None:
        for measure, field in _SAMPLES.items():
            value = getattr(report.samples, field)
            if value is not None:
                yield measure, "", report.samples.intervals.get(field, Interval(value=value))
    if report.judge is not None and report.judged is not None and report.judged.token is not None:
        yield "perplexity by judge", report.judge.model, report.judged.token
