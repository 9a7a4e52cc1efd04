"""Accuracy, log loss, Brier score and calibration error of a classifier.

Over several draws of the weights the probabilities are averaged, so that the mean of a posterior
and the posterior itself can be compared. The expected calibration error is that of Guo et al. (*On
calibration of modern neural networks*, ICML 2017): equal-width bins of confidence, whose number is
part of the result. It is biased, so that it has no interval; `calibration` has the squared error
that has one.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.libraries import outputs_of, token_ids
from mergekit_bayes.metrics.base import (
    PRESENT,
    Draws,
    Interval,
    interval,
    resampled_sums,
    share_change_interval,
    share_interval,
)
from mergekit_bayes.metrics.calibration import (
    Bin,
    Labels,
    calibration_bins,
    expected_calibration_error,
    squared_calibration_change,
    squared_calibration_error,
)
from mergekit_bayes.ranks import spread, world
from mergekit_bayes.records import FloatArray, Progress, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassificationReport(Record):
    """How well a classifier predicts a set of labelled texts.

        nll         = -1/n sum_i log p_i(y_i)                           nats per example
        brier       = 1/n sum_i sum_c (p_i(c) - [c = y_i])^2            0 to 2
        ece         = 1/n sum_bins | sum_{i in bin} d_i |,  d_i = [argmax p_i = y_i] - max p_i
        reliability = 1/n sum_bins ((sum_{i in bin} d_i)^2 - sum_{i in bin} d_i^2) / (n_bin - 1)

    The interval of the log loss comes from resampling examples, those of accuracy and Brier score
    are Wilson's (`metrics.base.share_interval`), that of the reliability is in
    `calibration.squared_calibration_error`. The expected calibration error of a finite sample is
    above zero even for a calibrated model, by the more the fewer examples there are, and has no
    interval: judge by the reliability whether an error is there.

    Attributes:
        examples: Number of texts.
        classes: Number of labels that the model knows.
        accuracy: Share of right predictions.
        nll: Log loss, nats per example.
        brier: Brier score.
        ece: Expected calibration error of this sample; without an interval.
        reliability: Squared calibration error of the top label, without the bias of finite samples:
            about zero, of either sign, for a calibrated model. None in reports of versions that did
            not measure it.
        confidence: Mean of the largest probability; a model is overconfident if it is above the
            accuracy.
        bins: The bins that the calibration error is summed over.
        example_labels: True class of each example, for paired comparisons; not in the JSON.
        example_nats: Log loss of each example; not in the JSON.
        example_probabilities: Probabilities of each example, by class; not in the JSON.
    """

    examples: int
    classes: int
    accuracy: Interval
    nll: Interval
    brier: Interval
    ece: Interval
    reliability: Interval | None = None
    confidence: float
    bins: tuple[Bin, ...]
    example_labels: tuple[int, ...] = Field(default=(), exclude=True, repr=False)
    example_nats: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    example_probabilities: tuple[tuple[float, ...], ...] = Field(
        default=(), exclude=True, repr=False
    )


class ClassificationChange(Record):
    """The scores of one prediction minus those of another, on the same examples.

    Intervals count the examples in pairs: by resampling for log loss and Brier score, by Agresti
    and Min's for the accuracy, by `calibration.squared_calibration_change` for the reliability.

    Attributes:
        accuracy: Change of the share of right predictions.
        nll: Change of the log loss, nats per example.
        brier: Change of the Brier score.
        ece: Change of the expected calibration error of this sample; without an interval.
        reliability: Change of the squared calibration error; None in reports of versions that did
            not measure it.
    """

    accuracy: Interval
    nll: Interval
    brier: Interval
    ece: Interval
    reliability: Interval | None = None


def measure_classification(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    max_length: int,
    batch_size: int = 8,
    bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    draws: Draws = PRESENT,
    progress: Progress | None = None,
) -> ClassificationReport:
    """Classify labelled texts: `class_probabilities`, then `score_classification`.

    Args:
        model: A softmax classifier in eval mode.
        tokenizer: Its tokenizer.
        texts: The examples.
        labels: The true class of each, 0 to classes - 1.
        max_length: Tokens of a text; longer texts lose their end.
        batch_size: Texts classified together.
        bins: Number of bins of confidence.
        bootstrap: Number of resamples of the examples; 0 gives no intervals.
        seed: Seed of the bootstrap.
        draws: Weights to average over; iterating puts them into `model`.
        progress: Called with (texts classified, texts in all), over all draws.

    Raises:
        ConfigError: There is no text, a text without a token, or no bin.
        CheckpointError: The model's log-probabilities are not numbers.
        MismatchError: A label is no class of the model.
    """
    log_probabilities = class_probabilities(
        model,
        tokenizer,
        texts,
        max_length=max_length,
        batch_size=batch_size,
        draws=draws,
        progress=progress,
    )
    return score_classification(
        log_probabilities, labels, bins=bins, bootstrap=bootstrap, seed=seed
    )


def class_probabilities(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 8,
    draws: Draws = PRESENT,
    progress: Progress | None = None,
) -> FloatArray:
    """Log-probabilities of the classes.

        log p_i(c) = logsumexp_k log_softmax(z_ik)(c) - log K    over K draws of the weights

    Args:
        model: A softmax classifier in eval mode: `model(input_ids, attention_mask).logits`.
        tokenizer: Its tokenizer.
        texts: The texts to classify.
        max_length: Tokens of a text; longer texts lose their end.
        batch_size: Texts classified together.
        draws: Weights to average over; iterating puts them into `model`.
        progress: Called with (texts classified, texts in all), over all draws.

    Returns:
        (texts, classes), float64, nats.

    Raises:
        ConfigError: There is no text, or a text without a token.
        CheckpointError: The model's log-probabilities are not numbers.
    """
    if not texts:
        raise ConfigError("there is no text to classify.")
    options = {"truncation": True, "max_length": max_length, "verbose": False}
    encoded = token_ids(model, lambda: tokenizer(list(texts), **options)["input_ids"])
    for i, ids in enumerate(encoded):
        if not ids:
            raise ConfigError(f"text {i + 1} of {len(encoded)} holds no token to classify.")
    pad = int(tokenizer.pad_token_id or 0)
    total: FloatArray | None = None
    done = 0
    batches = list(_batches(encoded, batch_size))

    def classify(rows: list[int]) -> FloatArray:
        nonlocal done
        log_p = _log_softmax(model, [encoded[i] for i in rows], pad)
        done += len(rows)
        if progress is not None:
            progress(min(done * world(), len(encoded) * len(draws)), len(encoded) * len(draws))
        return log_p

    for _ in draws:
        for rows, log_p in zip(batches, spread(batches, classify), strict=True):
            if total is None:
                total = np.full((len(encoded), log_p.shape[1]), -np.inf)
            with np.errstate(invalid="ignore"):  # NaN is refused below, by text
                total[rows] = np.logaddexp(total[rows], log_p)
    assert total is not None
    bad = np.flatnonzero(~np.isfinite(total).all(axis=1))
    if bad.size:
        raise CheckpointError(
            f"the model's log-probabilities of text {bad[0] + 1} are {total[bad[0]].tolist()}. Its "
            "weights hold NaN or infinity, or are too large for their dtype."
        )
    total -= np.log(len(draws))
    return total


def score_classification(
    log_probabilities: FloatArray,
    labels: Sequence[int],
    *,
    bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ClassificationReport:
    """Summarise the predictions of labelled examples.

    Args:
        log_probabilities: (examples, classes), nats.
        labels: The true class of each example, 0 to classes - 1.
        bins: Number of bins of confidence, equally wide from 0 to 1.
        bootstrap: Number of resamples of the examples; 0 gives no intervals.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: There is no bin.
        MismatchError: A label is no class, or there is not one for each example.
    """
    if bins < 1:
        raise ConfigError(f"{bins} bins: expected at least one.")
    y = np.asarray(labels, np.int64)
    n, classes = log_probabilities.shape
    if len(y) != n or (n and not 0 <= y.min() <= y.max() < classes):
        raise MismatchError(
            f"{len(y)} labels for {n} examples: expected one in 0 to {classes - 1} for each."
        )
    p = np.exp(log_probabilities)
    nats = -log_probabilities[np.arange(n), y]
    right, brier = _right(p, y), _brier(p, y)
    found = calibration_bins(p, y, bins)
    scores = {
        "accuracy": share_interval(right),
        "nll": _resampled(nats, bootstrap, seed),
        "brier": _doubled(share_interval(brier / 2)),
        "ece": Interval(value=expected_calibration_error(found)),
        "reliability": squared_calibration_error(p, y, bins),
    }
    if not bootstrap:
        scores = {name: Interval(value=score.value) for name, score in scores.items()}
    return ClassificationReport(
        examples=n,
        classes=classes,
        **scores,
        confidence=float(p.max(axis=1).mean()),
        bins=found,
        example_labels=tuple(y.tolist()),
        example_nats=tuple(nats.tolist()),
        example_probabilities=tuple(tuple(row) for row in p.tolist()),
    )


def classification_change(
    before: ClassificationReport,
    after: ClassificationReport,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ClassificationChange:
    """The scores of `after` minus those of `before`, with examples resampled in pairs.

    Args:
        before: The report to compare with.
        after: A report on the same examples and bins.
        bootstrap: Number of resamples; 0 gives no intervals.
        seed: Seed of the bootstrap.

    Raises:
        MismatchError: The reports are about other examples or bins.
    """
    if before.example_labels != after.example_labels or len(before.bins) != len(after.bins):
        raise MismatchError("the two reports are not about the same examples and bins.")
    y = np.array(before.example_labels, np.int64)
    first, second = (np.array(r.example_probabilities, np.float64) for r in (before, after))
    nats = np.array(after.example_nats) - np.array(before.example_nats)
    changes = {
        "accuracy": share_change_interval(_right(first, y), _right(second, y)),
        "nll": _resampled(nats, bootstrap, seed),
        "brier": _resampled(_brier(second, y) - _brier(first, y), bootstrap, seed),
        "ece": Interval(value=after.ece.value - before.ece.value),
        "reliability": squared_calibration_change(first, second, y, len(before.bins)),
    }
    if not bootstrap:
        changes = {name: Interval(value=change.value) for name, change in changes.items()}
    return ClassificationChange(**changes)


def _batches(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts of similar length, so that little is padded."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.inference_mode()
def _log_softmax(
    model: torch.nn.Module, batch: Sequence[Sequence[int]], pad: int
) -> FloatArray:  # (batch, classes)
    ids = torch.full((len(batch), max(len(row) for row in batch)), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    logits = outputs_of(model, **inputs).logits
    log_p: FloatArray = logits.double().log_softmax(-1).cpu().numpy()
    return log_p


def _right(p: FloatArray, y: Labels) -> FloatArray:
    """(examples,), 1 where the likeliest class is the true one, else 0."""
    right: FloatArray = (p.argmax(axis=1) == y).astype(np.float64)
    return right


def _brier(p: FloatArray, y: Labels) -> FloatArray:
    """(examples,), the sum of squared errors over classes, 0 to 2."""
    truth = np.zeros_like(p)
    truth[np.arange(len(y)), y] = 1
    squares: FloatArray = ((p - truth) ** 2).sum(axis=1)
    return squares


def _resampled(values: FloatArray, resamples: int, seed: int) -> Interval:
    """Mean over the examples, with the interval of its resamples."""
    n = len(values)
    replicates = resampled_sums(values[:, None], resamples, seed)[:, 0] / n
    return interval(float(values.mean()), replicates, n)


def _doubled(x: Interval) -> Interval:
    ends = (None if end is None else 2 * end for end in (x.low, x.high))
    return Interval(value=2 * x.value, **dict(zip(("low", "high"), ends, strict=True)))
