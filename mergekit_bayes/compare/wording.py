"""How numbers, differences and names are written on the screen and in the report."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.compare.report import Difference, Evaluated
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.identity_terms import IdentityBias

_SHARES = ("toxic share", "prompts with any", "accuracy", "empty", "looping", "repeated pairs")

PANELS = 40  # of a picture at most: one of hundreds would be larger than a file may hold

# What tells text from garble, which also scores as less toxic, by its field in a `SamplesReport`.
_SAMPLES = {
    "mean length": "mean_tokens",
    "empty": "empty",
    "looping": "looping",
    "repeated pairs": "repeated",
    "distinct word pairs": "distinct_2",
}
_BY_SCORER = ("toxic share", "mean score", "expected max", "prompts with any")
_BY_JUDGE = ("nats a token by judge", "perplexity by judge")
_OF_CONTINUATIONS = {
    "mean length": "mean length of the continuations",
    "empty": "share of empty continuations",
    "looping": "share of looping continuations",
    "repeated pairs": "repeated word pairs",
}


def named(measure: str, of: str) -> str:
    """A measure with its scorer, texts or judge: `toxic share by words:list.txt`.

    Args:
        measure: What is compared, as a `Difference` or a `Column` calls it.
        of: The scorer, the texts or the judge; `continuations`, or empty, for their own measures.
    """
    if of in ("", "continuations"):
        return _OF_CONTINUATIONS.get(measure, measure)
    return f"{measure.replace(', over', ' over')} {joint(measure)}{of_in_short(measure, of)}"


def joint(measure: str) -> str:
    """What stands between a measure and its scorer, texts or judge."""
    return "by " if measure in _BY_SCORER else "" if measure in _BY_JUDGE else "on "


def of_in_short(measure: str, of: str) -> str:
    """The scorer, the texts or the judge of a measure, without most of its folders."""
    return Path(of).name or of if measure in _BY_JUDGE else short_name(of)


def short_name(of: str) -> str:
    """A scorer or texts; of a long path the last two parts, as a Hub id has them."""
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
            of_in_short(measure, of),
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


class Changes(NamedTuple):
    """The differences from one model: a row for each measure, a column for each other model.

    Attributes:
        against: The model that the others are compared with.
        names: What changed: the measure with its scorer, texts or judge.
        columns: By label, the change of each name in short; empty where there is none.
    """

    against: str
    names: list[str]
    columns: dict[str, list[str]]


def changes_of(differences: Sequence[Difference]) -> Iterator[Changes]:
    """All differences, in one table for each model that others are compared with."""
    for against in dict.fromkeys(d.against for d in differences):
        cells = {
            (d.label, named(d.measure, d.of)): change_in_short(d)
            for d in differences
            if d.against == against
        }
        names = list(dict.fromkeys(name for _, name in cells))
        columns = {
            label: [cells.get((label, name), "") for name in names]
            for label in dict.fromkeys(label for label, _ in cells)
        }
        yield Changes(against, names, columns)


def panels_of(evaluations: Sequence[Evaluated]) -> list[Column]:
    """The numbers that have a panel: not the mean length, which is neither better nor worse."""
    return [c for c in columns_of(evaluations) if c.measure != "mean length"]


def cell(column: Column, label: str) -> str:
    """A number of the table, with its interval."""
    value = column.values[label]
    if value is None:
        return ""
    return with_ends(value, f" {column.unit}" if column.unit else "")


def with_ends(x: Interval | None, unit: str = "") -> str:
    """A number with both ends of its interval, which may lie at unequal distances."""
    if x is None:
        return ""
    if x.low is None or x.high is None or not math.isfinite(x.value):
        return f"{x.value:.4g}{unit}"
    low, high = (end + 0.0 for end in (x.low, x.high))  # of -0, too
    return f"{x.value:.4g}{unit} [{low:.3g}, {high:.3g}]"


AGREEMENT = ("scorers", "same verdict", "kappa", "rank correlation")


def agreement_rows(report: EvaluateReport) -> list[list[str]]:
    """How far every two scorers agree on what a model wrote, in the columns of `AGREEMENT`."""
    return [
        [
            f"{short_name(pair.first)}, {short_name(pair.second)}",
            *map(with_ends, (pair.same, pair.kappa, pair.spearman)),
        ]
        for pair in report.agreement
    ]


def agreement_title(on: str = "") -> str:
    """The title of a table of scorers' agreement; `on` names the model, where there are several."""
    return f"do the scorers agree{on}? [95 % interval]"


def bias_in_words(spec: str, bias: IdentityBias) -> str:
    """What a classifier says of civil sentences that name a group."""
    furthest = ", ".join(f"{term} {bias.groups[term].mean:.3f}" for term in bias.furthest)
    alarms = sum(group.false_alarms for group in bias.groups.values()) / len(bias.groups)
    neutral = bias.neutral
    return (
        f"{short_name(spec)} on civil sentences that name a group: furthest {furthest} (neutral "
        f"nouns {neutral.mean:.3f}); spread {bias.spread:.3f} (neutral {bias.neutral_spread:.3f}); "
        f"false alarms {alarms:.1%} (neutral {neutral.false_alarms:.1%})"
    )


def readings(report: EvaluateReport) -> Iterator[str]:
    """How the labels of each classifier among the scorers are read, and from where on is toxic."""
    for spec, info in report.scorers.items():
        if info.reading is not None:
            own = "" if info.threshold is None else f"; toxic from {info.threshold:g} on"
            yield f"{short_name(spec)}: {info.reading} of the label, since {info.reason}{own}"


def cuts(report: EvaluateReport) -> Iterator[str]:
    """What of a model's prompts and continuations was not read whole."""
    for spec, toxicity in report.toxicity.items():
        if toxicity.cut:
            yield (
                f"{short_name(spec)} reads the beginning of a long text only, here of "
                f"{toxicity.cut:,} continuations"
            )
    if report.samples is not None and report.samples.shortened:
        yield (
            f"prompts that lost their beginning, since the model's context is too short for them: "
            f"{report.samples.shortened:,}"
        )
    if report.judged is not None and report.judged.shortened:
        yield (
            f"continuations that were judged without the beginning of their prompt, since the "
            f"judge's context is too short for it: {report.judged.shortened:,}"
        )


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
            yield f"nats an example{ending}", name, classification.nll
            yield f"Brier score{ending}", name, classification.brier
            yield f"ECE{ending}", name, classification.ece
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
