"""Paired differences of models that were measured on the same texts, prompts and noise."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.compare.report import Difference, Evaluated
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.evaluate.inputs import Inputs
from mergekit_bayes.evaluate.report import EvaluateReport, TaskReport
from mergekit_bayes.evaluate.run import Evaluation
from mergekit_bayes.metrics.base import Interval, share_change_interval
from mergekit_bayes.metrics.classification import ClassificationReport, classification_change
from mergekit_bayes.metrics.paired import paired_change, paired_ratio_change
from mergekit_bayes.metrics.perplexity import PerplexityReport, loss_change
from mergekit_bayes.metrics.quality import (
    distinct_change,
    is_looping,
    judged_change,
    repeated_change,
)
from mergekit_bayes.records import FloatArray


class Measured(NamedTuple):
    """An evaluation with the numbers that its report leaves out."""

    evaluated: Evaluated
    evaluation: Evaluation


Change = tuple[str, str, Interval]  # measure, of which scorer or texts, change


def differences(
    config: CompareConfig, measured: Sequence[Measured], inputs: Inputs
) -> tuple[Difference, ...]:
    """Of each model from the first, of each variant from its model as it is, and from the first
    model's variant of the same kind: what an edit is still worth after both were changed alike.

    Args:
        config: What was measured.
        measured: The evaluations in the order of the report.
        inputs: What all were measured on.
    """
    found = []
    for before, after in _pairs(measured):
        labels = {"label": after.evaluated.label, "against": before.evaluated.label}
        for measure, of, change in _changes(config, before, after, inputs):
            shown = change if config.bootstrap else Interval(value=change.value)
            found.append(Difference(**labels, measure=measure, of=of, change=shown))
    return tuple(found)


def toxicity_changes(config: CompareConfig, measured: Sequence[Measured]) -> tuple[Difference, ...]:
    """The changes of toxicity between every two models, and of each variant from its model."""
    models = [m for m in measured if m.evaluated.variant == "as it is"]
    pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    pairs += [pair for pair in _pairs(measured) if pair[1].evaluated.variant != "as it is"]
    return tuple(
        Difference(
            label=after.evaluated.label,
            against=before.evaluated.label,
            measure=measure,
            of=of,
            change=change,
        )
        for before, after in pairs
        if config.bootstrap
        for measure, of, change in _of_toxicity(before.evaluation, after.evaluation)
    )


def _pairs(measured: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    first = measured[0].evaluated.model if measured else ""
    found = {(m.evaluated.model, m.evaluated.variant): m for m in measured}
    for one in measured:
        model, variant = one.evaluated.model, one.evaluated.variant
        if variant != "as it is":
            yield found[model, "as it is"], one
        if model != first and (first, variant) in found:
            yield found[first, variant], one


def _changes(
    config: CompareConfig, one: Measured, other: Measured, inputs: Inputs
) -> Iterator[Change]:
    before, after = one.evaluation, other.evaluation
    yield from _of_toxicity(before, after)
    old, new = before.report, after.report
    yield from _of_texts(config, old.perplexity, new.perplexity, inputs, "")
    yield from _of_labels(config, old.classification, new.classification, "")
    # A variant has no draws by design, a model only where it has no posterior.
    are_models = one.evaluated.variant == other.evaluated.variant == "as it is"
    if (old.sampled or new.sampled) and are_models:
        old_draws, new_draws = old.sampled or old, new.sampled or new
        yield from _of_texts(config, old_draws.perplexity, new_draws.perplexity, inputs, _SAMPLED)
        yield from _of_labels(config, old_draws.classification, new_draws.classification, _SAMPLED)
    yield from _of_tasks(old.lm_eval, new.lm_eval)
    yield from _of_samples(before, after)
    yield from _of_the_judge(config, old, new)


_SAMPLED = ", over samples"


def _of_toxicity(before: Evaluation, after: Evaluation) -> Iterator[Change]:
    if before.continuations is None or after.continuations is None:
        return
    for spec, old in before.continuations.scores.items():
        new = after.continuations.scores[spec]
        threshold = after.report.toxicity[spec].threshold
        toxic = [(scores >= threshold).astype(np.float64) for scores in (old, new)]
        yield "toxic share", spec, paired_change(*toxic)
        yield "mean score", spec, paired_change(old, new)
        yield "expected max", spec, paired_change(_worst(old), _worst(new))
        yield "prompts with any", spec, paired_change(*map(_worst, toxic))


def _worst(scores: FloatArray) -> FloatArray:
    worst: FloatArray = scores.max(axis=1, keepdims=True)
    return worst


def _of_texts(
    config: CompareConfig,
    before: dict[str, PerplexityReport],
    after: dict[str, PerplexityReport],
    inputs: Inputs,
    ending: str,
) -> Iterator[Change]:
    options = {"bootstrap": config.bootstrap, "seed": config.seed}
    for name, old in before.items():
        new = after[name]
        if not are_comparable(old, new):
            continue
        if old.document_tokens == new.document_tokens:
            yield f"nats a token{ending}", name, loss_change(old, new, **options)
        else:  # other tokenizers: what a token is differs, what a byte is does not
            bits = [np.array(r.document_nats) / np.log(2) for r in (old, new)]
            sizes = np.array([len(text.encode()) for text in inputs.texts[name]], np.float64)
            change = paired_ratio_change(bits[0], bits[1], sizes, **options)
            yield f"bits a byte{ending}", name, change


def are_comparable(before: PerplexityReport, after: PerplexityReport) -> bool:
    """Whether both were read in the same windows: a longer context makes a lower perplexity."""
    return (before.window, before.stride) == (after.window, after.stride)


def _of_labels(
    config: CompareConfig,
    before: dict[str, ClassificationReport],
    after: dict[str, ClassificationReport],
    ending: str,
) -> Iterator[Change]:
    for name, old in before.items():
        new = after[name]
        if old.example_labels != new.example_labels:  # the models number their labels differently
            yield f"accuracy{ending}", name, share_change_interval(_right(old), _right(new))
            continue
        change = classification_change(old, new, bootstrap=config.bootstrap, seed=config.seed)
        yield f"accuracy{ending}", name, change.accuracy
        yield f"nats an example{ending}", name, change.nll
        yield f"Brier score{ending}", name, change.brier
        if change.reliability is not None:
            yield f"squared calibration error{ending}", name, change.reliability


def _right(report: ClassificationReport) -> FloatArray:
    chosen = np.array(report.example_probabilities).argmax(axis=1)
    right: FloatArray = (chosen == np.array(report.example_labels)).astype(np.float64)
    return right


def _of_tasks(before: dict[str, TaskReport], after: dict[str, TaskReport]) -> Iterator[Change]:
    """Of each score of lm-eval's tasks: paired where it is a mean over documents, of which only
    then the pairs are known."""
    for task, old in before.items():
        for key, score in old.scores.items():
            other = after[task].scores.get(key) if task in after else None
            if other is None:
                continue
            values = [np.array(s.document_values, np.float64)[:, None] for s in (score, other)]
            are_means = all(
                len(v) == len(values[0]) > 0 and np.isclose(v.mean(), s.score.value)
                for v, s in zip(values, (score, other), strict=True)
            )
            change = Interval(value=other.score.value - score.score.value)
            yield score.name, task, paired_change(*values) if are_means else change


def _of_samples(before: Evaluation, after: Evaluation) -> Iterator[Change]:
    """Of what shows broken text, which also scores as less toxic."""
    if before.continuations is None or after.continuations is None:
        return
    old, new = before.continuations.samples, after.continuations.samples
    lengths = [np.array(samples.tokens, np.float64) for samples in (old, new)]
    yield "mean length", "continuations", paired_change(*lengths)
    words = [[[text.split() for text in row] for row in samples.texts] for samples in (old, new)]
    empty = [np.array([[not w for w in row] for row in rows], np.float64) for rows in words]
    yield "empty", "continuations", paired_change(*empty)
    looping = [
        np.array([[is_looping(w) for w in row] for row in rows], np.float64) for rows in words
    ]
    yield "looping", "continuations", paired_change(*looping)
    yield "repeated pairs", "continuations", repeated_change(old, new)
    yield "distinct word pairs", "continuations", distinct_change(old, new)


def _of_the_judge(
    config: CompareConfig, before: EvaluateReport, after: EvaluateReport
) -> Iterator[Change]:
    if before.judged is None or after.judged is None or config.judge is None:
        return
    change = judged_change(
        before.judged, after.judged, bootstrap=config.bootstrap, seed=config.seed
    )
    if change is not None:
        yield "nats a token by judge", config.judge, change
