"""How well, and how honestly, a classifier predicts: accuracy, log loss, Brier score and
calibration error.

Over several draws of the weights the probabilities are averaged, so the mean of a posterior and the
posterior itself can be compared. The calibration error is that of Guo et al. (*On calibration of
modern neural networks*, ICML 2017): equal-width bins of confidence, whose number is part of the
result.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.metrics.base import PRESENT, Draws, Interval, interval, resampled_sums
from mergekit_bayes.records import Array, Progress, Record

Labels = NDArray[np.int64]


class Bin(Record):
    """Examples whose confidence is in [low, high), the last bin closed; None where there is no
    example.
    """

    low: float
    high: float
    examples: int
    confidence: float | None
    accuracy: float | None


class ClassificationReport(Record):
    """How well a classifier predicts a set of labelled texts; intervals come from resampling
    examples.

        nll   = -1/n sum_i log p_i(y_i)                               nats per example
        brier = 1/n sum_i sum_c (p_i(c) - [c = y_i])^2                0 to 2
        ece   = 1/n sum_bins | sum_{i in bin} ([argmax p_i = y_i] - max p_i) |

    The calibration error of a finite sample is above zero even for a calibrated model, and a
    resample adds to that, so its interval may lie above its value; the intervals of two models
    shift alike.

    Attributes:
        confidence: Mean of the largest probability; above the accuracy the model is overconfident.
        bins: What the calibration error was summed over.
        example_labels, example_nats, example_probabilities: By example, for paired comparisons; not
            in the JSON.
    """

    examples: int
    classes: int
    accuracy: Interval
    nll: Interval
    brier: Interval
    ece: Interval
    confidence: float
    bins: tuple[Bin, ...]
    example_labels: tuple[int, ...] = Field(default=(), exclude=True, repr=False)
    example_nats: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    example_probabilities: tuple[tuple[float, ...], ...] = Field(
        default=(), exclude=True, repr=False
    )


class ClassificationChange(Record):
    """What one prediction scores minus what another does on the same examples, resampled in pairs."""

    accuracy: Interval
    nll: Interval
    brier: Interval
    ece: Interval


def measure_classification(
    model: Any,
    tokenizer: Any,
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
    """Classify labelled texts: `class_probabilities`, then `score_classification`."""
    found = class_probabilities(
        model,
        tokenizer,
        texts,
        max_length=max_length,
        batch_size=batch_size,
        draws=draws,
        progress=progress,
    )
    return score_classification(found, labels, bins=bins, bootstrap=bootstrap, seed=seed)


def class_probabilities(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 8,
    draws: Draws = PRESENT,
    progress: Progress | None = None,
) -> Array:
    """Log-probabilities of the classes, (texts, classes), float64; over K draws of the weights

        log p_i(c) = logsumexp_k log_softmax(z_ik)(c) - log K

    Args:
        model: A softmax classifier in eval mode: `model(input_ids, attention_mask).logits`.
        max_length: Tokens of a text; longer ones lose their end.
        draws: Put other weights into `model` as they are gone through.
        progress: Called with (texts classified, texts in all), over all draws.

    Raises:
        ConfigError: No text, or one without any token.
        CheckpointError: The model's log-probabilities are not numbers.
    """
    if not texts:
        raise ConfigError("there is no text to classify.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)[
        "input_ids"
    ]
    for i, ids in enumerate(encoded):
        if not ids:
            raise ConfigError(f"text {i + 1} of {len(encoded)} holds no token to classify.")
    total: Array | None = None
    done = 0
    for _ in draws:
        for rows in _batches(encoded, batch_size):
            found = _log_softmax(
                model, [encoded[i] for i in rows], int(tokenizer.pad_token_id or 0)
            )
            if total is None:
                total = np.full((len(encoded), found.shape[1]), -np.inf)
            with np.errstate(invalid="ignore"):  # NaN is refused below, by text
                total[rows] = np.logaddexp(total[rows], found)
            done += len(rows)
            if progress is not None:
                progress(done, len(encoded) * len(draws))
    assert total is not None
    bad = np.flatnonzero(~np.isfinite(total).all(axis=1))
    if bad.size:
        raise CheckpointError(
            f"the model's log-probabilities of text {bad[0] + 1} are {total[bad[0]].tolist()}. Its "
            "weights hold NaN or "
            "infinity, or are too large for their dtype."
        )
    total -= np.log(len(draws))
    return total


def score_classification(
    log_probabilities: Array,
    labels: Sequence[int],
    *,
    bins: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
) -> ClassificationReport:
    """Summarise predictions.

    Args:
        log_probabilities: (examples, classes), nats.
        labels: The true class of each example, 0 to classes - 1.
        bins: Of confidence, equally wide from 0 to 1.
        bootstrap: Resamples of the examples; 0 for no intervals.

    Raises:
        ConfigError: No bin.
        MismatchError: A label that is no class.
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
    columns = _columns(p, nats, y, bins)
    values, draws = (
        _summary(columns.sum(axis=0), n),
        _summary(resampled_sums(columns, bootstrap, seed), n),
    )
    accuracy, nll, brier, ece = (interval(float(v), draws[..., i], n) for i, v in enumerate(values))
    return ClassificationReport(
        examples=n,
        classes=classes,
        accuracy=accuracy,
        nll=nll,
        brier=brier,
        ece=ece,
        confidence=float(p.max(axis=1).mean()),
        bins=_bins(p, y, bins),
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
    """`after` minus `before` on the same examples, with examples resampled in pairs."""
    if before.example_labels != after.example_labels or len(before.bins) != len(after.bins):
        raise MismatchError("the two reports are not about the same examples and bins.")
    n = before.examples
    columns = np.concatenate([_columns_of(before), _columns_of(after)], axis=1)
    half = columns.shape[1] // 2
    total, sums = columns.sum(axis=0), resampled_sums(columns, bootstrap, seed)
    values = _summary(total[half:], n) - _summary(total[:half], n)
    replicates = _summary(sums[:, half:], n) - _summary(sums[:, :half], n)
    accuracy, nll, brier, ece = (
        interval(float(v), replicates[:, i], n) for i, v in enumerate(values)
    )
    return ClassificationChange(accuracy=accuracy, nll=nll, brier=brier, ece=ece)


def _batches(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts of like length, so that little is padded."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.inference_mode()
def _log_softmax(model: Any, batch: Sequence[Sequence[int]], pad: int) -> Array:
    device = next(model.parameters()).device
    ids = torch.full((len(batch), max(len(row) for row in batch)), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return logits.double().log_softmax(-1).cpu().numpy()  # type: ignore[no-any-return]


def _columns_of(report: ClassificationReport) -> Array:
    p = np.array(report.example_probabilities, np.float64)
    return _columns(
        p,
        np.array(report.example_nats),
        np.array(report.example_labels, np.int64),
        len(report.bins),
    )


def _columns(p: Array, nats: Array, y: Labels, bins: int) -> Array:
    """(examples, 3 + bins): right, nats, squared error, and `right - confidence` in the column of
    the example's bin.

    All four scores are functions of their sums, so one resampling serves them all.
    """
    n = len(y)
    right = (p.argmax(axis=1) == y).astype(np.float64)
    truth = np.zeros_like(p)
    truth[np.arange(n), y] = 1
    columns = np.zeros((n, 3 + bins))
    columns[:, 0], columns[:, 1], columns[:, 2] = right, nats, ((p - truth) ** 2).sum(axis=1)
    columns[np.arange(n), 3 + _bin_of(p, bins)] = right - p.max(axis=1)
    return columns


def _summary(sums: Array, n: int) -> Array:
    """Accuracy, nll, brier, ece along the last axis, from the sums of `_columns`."""
    ece = np.abs(sums[..., 3:]).sum(axis=-1, keepdims=True)
    summary: Array = np.concatenate([sums[..., :3], ece], axis=-1) / n
    return summary


def _bin_of(p: Array, bins: int) -> Labels:
    which: Labels = np.minimum((p.max(axis=1) * bins).astype(np.int64), bins - 1)
    return which


def _bins(p: Array, y: Labels, bins: int) -> tuple[Bin, ...]:
    which, confidence, right = _bin_of(p, bins), p.max(axis=1), p.argmax(axis=1) == y
    found = []
    for b in range(bins):
        here = which == b
        some = bool(here.any())
        found.append(
            Bin(
                low=b / bins,
                high=(b + 1) / bins,
                examples=int(here.sum()),
                confidence=float(confidence[here].mean()) if some else None,
                accuracy=float(right[here].mean()) if some else None,
            )
        )
    return tuple(found)
