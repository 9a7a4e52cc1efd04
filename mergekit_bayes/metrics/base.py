"""What every metric shares: intervals by the bootstrap, over the things that were drawn
independently.

Documents and prompts are resampled with replacement, never tokens or continuations, which depend on
each other (Efron's percentile interval, 95 %).
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mergekit_bayes.records import Array, Record

_LEVEL = (2.5, 97.5)  # percentiles
_CELLS = 16_000_000  # resampled numbers held at a time


class Draws(Protocol):
    """Weights to average a prediction over: while item k is being looked at, the model's weights
    are the k-th draw.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


PRESENT: Draws = (0,)  # one draw: the weights that the model has


class Interval(Record):
    """A number and its 95 % bootstrap interval; no interval for a single draw, or where none was
    asked for.
    """

    value: float
    low: float | None = None
    high: float | None = None


def resampled_sums(values: Array, resamples: int, seed: int) -> Array:
    """Column sums of bootstrap resamples of the rows.

    Args:
        values: (n, k), one row for each independent draw.
        resamples: B, how many resamples.
        seed: The same seed and n resample the same rows, so differences between two models may be
            taken.

    Returns:
        (B, k).
    """
    n, k = values.shape
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // max(n * k, 1))
    parts = [
        values[rng.integers(n, size=(min(step, resamples - done), n))].sum(axis=1)
        for done in range(0, resamples, step)
    ]
    return np.concatenate(parts) if parts else np.empty((0, values.shape[1]))


def interval(value: float, replicates: Array, draws: int) -> Interval:
    """The percentile interval of `replicates`, if there were at least two independent draws."""
    if draws < 2 or not len(replicates):
        return Interval(value=value)
    low, high = np.percentile(
        replicates, _LEVEL, method="nearest"
    )  # no arithmetic between infinities
    return Interval(value=value, low=float(low), high=float(high))
