"""What is different between models, in sentences.

One scorer's word is no truth: where two scorers disagree about which of two models is less toxic,
that comes first.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

from mergekit_bayes.compare.differences import are_comparable
from mergekit_bayes.compare.report import Difference, Evaluated
from mergekit_bayes.compare.wording import change_in_words, named, short_name
from mergekit_bayes.metrics.base import Interval

_RATES = ("toxic share", "mean score")  # by which a scorer says which model is better
_SECONDARY = ("expected max", "prompts with any", "squared calibration error")
_FEW = 3  # measures without a visible difference are named, more are counted: a table has them
_DISAGREE = "Scorers disagree about"
_DIRECTION = {True: "higher", False: "lower"}


def findings(
    evaluations: Sequence[Evaluated],
    differences: Sequence[Difference],
    of_pairs: Sequence[Difference],
    at_mean: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Sentences about models side by side, disagreements first.

    Args:
        evaluations: The models and variants.
        differences: Those of the report.
        of_pairs: Changes of toxicity between every two models, and of variants from their models.
        at_mean: Models of which nothing could be drawn, beside others, and why.
    """
    return (
        *_disagreements(of_pairs),
        *_same_weights(evaluations),
        *_other_windows(evaluations),
        *_without_draws(evaluations, at_mean),
        *_by_pair(differences),
        *_how_sure(differences),
    )


def _disagreements(of_pairs: Sequence[Difference]) -> list[str]:
    """First those where both scorers are sure, then those where one is."""
    both, one = [], []
    told = set()  # a share and a mean that disagree alike are one disagreement
    for measure in _RATES:
        changes = [d for d in of_pairs if d.measure == measure]
        for label, against in dict.fromkeys((d.label, d.against) for d in changes):
            pair = [d for d in changes if (d.label, d.against) == (label, against)]
            lower = [d for d in pair if d.change.value < 0]
            higher = [d for d in pair if d.change.value > 0]
            sure = [d for d in pair if is_beyond(d.change)]
            if not lower or not higher or not sure or (label, against) in told:
                continue
            told.add((label, against))
            low, high = ([d for d in side if d in sure] for side in (lower, higher))
            if low and high:
                both.append(
                    f"{_DISAGREE} which model is less toxic: by the {measure}, {label} "
                    f"is less toxic than {against} for {_named(low)}, and more toxic for "
                    f"{_named(high)}. Read the continuations before you believe one of them."
                )
            else:
                word, other = ("less", higher) if low else ("more", lower)
                one.append(
                    f"{_DISAGREE} the direction: by the {measure}, {label} is {word} "
                    f"toxic than {against} for {_named(low or high)}, while {_named(other)} "
                    "points the other way within its interval."
                )
    return [*both, *one]


def _named(changes: Sequence[Difference]) -> str:
    return _listed([f"{short_name(d.of)} ({change_in_words(d)})" for d in changes])


def _same_weights(evaluations: Sequence[Evaluated]) -> Iterator[str]:
    models = [e for e in evaluations if e.variant == "as it is"]
    for a, b in combinations(models, 2):
        if a.report.model_identity == b.report.model_identity:
            yield f"{a.label} and {b.label} hold the same weights."


def _other_windows(evaluations: Sequence[Evaluated]) -> Iterator[str]:
    first = evaluations[0].report.perplexity
    for name, old in first.items():
        others = [e for e in evaluations if not are_comparable(old, e.report.perplexity[name])]
        if others:
            windows = [e.report.perplexity[name].window for e in others]
            yield (
                f"The perplexities on {name} are not comparable: {evaluations[0].label} reads "
                f"{old.window:,} tokens at a time, "
                + _listed([f"{e.label} {w:,}" for e, w in zip(others, windows, strict=True)])
                + f". Give --window {min(old.window, *windows)}."
            )


def _by_pair(differences: Sequence[Difference]) -> Iterator[str]:
    """For each model and what it is compared with: what differs, and what does not visibly."""
    for label, against in dict.fromkeys((d.label, d.against) for d in differences):
        pair = [d for d in differences if (d.label, d.against) == (label, against)]
        shown = [d for d in pair if d.measure.split(",")[0] not in _SECONDARY]
        beyond = [d for d in shown if is_beyond(d.change)]
        within = [d for d in shown if d.change.low is not None and d not in beyond]
        sentences = []
        for higher in (False, True):
            found = [d for d in beyond if (d.change.value > 0) == higher]
            if found:
                names = _listed([f"{named(d.measure, d.of)} ({change_in_words(d)})" for d in found])
                sentences.append(f"{_DIRECTION[higher]} in {names}")
        if sentences:
            yield f"{label} against {against}: " + "; ".join(sentences) + "."
        if within:
            names = _listed([named(d.measure, d.of) for d in within], "or")
            what = names if len(within) <= _FEW else f"{len(within)} measures"
            yield f"{label} against {against}: no difference beyond its interval in {what}."


def _without_draws(evaluations: Sequence[Evaluated], at_mean: Mapping[str, str]) -> Iterator[str]:
    for one in evaluations:
        if one.model in at_mean and one.variant == "as it is":
            yield (
                f"{one.label} was not drawn, since {at_mean[one.model]}: it is measured at its "
                "mean alone, and differences over samples are from there."
            )


def _how_sure(differences: Sequence[Difference]) -> Iterator[str]:
    count = sum(d.change.low is not None for d in differences)
    if count > 1:
        yield (
            f"Each of the {count:,} intervals holds alone, with 95 %: of differences between equal "
            "models about one in twenty lies beyond its interval by chance."
        )


def is_disagreement(finding: str) -> bool:
    """Whether a finding says that scorers disagree, which nothing may come before."""
    return finding.startswith(_DISAGREE)


def is_beyond(change: Interval) -> bool:
    """Whether the interval of a change does not hold zero."""
    if change.low is None or change.high is None:
        return False
    return change.low > 0 or change.high < 0


def _listed(names: Sequence[str], joint: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"
