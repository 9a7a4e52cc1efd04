"""What all metrics share: draws of the weights, and bootstrap intervals.

An interval comes from resampling, with replacement, the things that were drawn independently:
documents, prompts or examples. Tokens and continuations depend on each other and are never
resampled (Efron's percentile interval, 95 %).
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mergekit_bayes.records import FloatArray, Record

_PERCENTILES = (2.5, 97.5)
_CELLS = 16_000_000  # resampled numbers in memory at once


class Draws(Protocol):
    """Weights over which a prediction is averaged.

    Iterating puts them into the model one after the other: while item k is in use, the model's
    weights are the k-th draw.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


PRESENT: Draws = (0,)  # one draw: the weights that the model has


class Interval(Record):
    """A number and its 95 % bootstrap interval.

    Attributes:
        value: The estimate.
        low: Lower end; None without an interval: for a single document, prompt or example, or
            without resamples.
        high: Upper end, or None.
    """

    value: float
    low: float | None = None
    high: float | None = None


def resampled_sums(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Column sums of bootstrap resamples of the rows.

    Args:
        values: (n, k), one row for each document, prompt or example.
        resamples: B, the number of resamples.
        seed: Seed of the resampling. The same seed and n give the same rows, so that differences
            between two models are paired.

    Returns:
        (B, k).
    """
    n, k = values.shape
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(n * k, 1))
    blocks = [
        values[rng.integers(n, size=(min(step, resamples - done), n))].sum(axis=1)
        for done in range(0, resamples, step)
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, values.shape[1]))


def interval(value: float, replicates: FloatArray, count: int) -> Interval:
    """The estimate with the percentile interval of its bootstrap replicates.

    Args:
        value: The estimate.
        replicates: (B,), the same number of every resample.
        count: Number of rows that were resampled; fewer than two give no interval.
    """
    if count < 2 or not len(replicates):
        return Interval(value=value)
    # "nearest" does no arithmetic between infinities.
    low, high = np.percentile(replicates, _PERCENTILES, method="nearest")
    return Interval(value=value, low=float(low), high=float(high))
