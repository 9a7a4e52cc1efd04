"""What all metrics share: draws of the weights, and intervals.

An interval counts the things that were drawn independently: documents, prompts or examples, never
the tokens and continuations in them, which depend on each other. Losses are resampled with
replacement (Efron's percentile interval, 95 %). A share is not, since resamples of a sample without
a single hit have none either: it has Wilson's interval.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from mergekit_bayes.records import FloatArray, Record

Score = Callable[[list[str]], list[float]]  # of each text, in [0, 1]
Z = 1.959963984540054  # of the normal distribution, for 95 %
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
    """A number and its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end; None without an interval: for a single document, prompt or example, where
            no interval was asked for (0 resamples), or for a number that has none.
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


def share_interval(
    values: FloatArray, size: int = 1, ends: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Mean of numbers between 0 and 1 over groups, with an interval that does not collapse.

        value = mean,    D = Var(mean) n size / (mean (1 - mean)), at most `size`
        D'    = (c D + 2 A) / (c + 2),    c = (sum x)^2 / sum x^2, of x or of 1 - x, the smaller
        A     = size (high - mean) (mean - low) / (mean (1 - mean)),    low, high = ends

    and Wilson's interval (1927) for `n size / D'` independent observations. D is the design effect
    (Kish, 1965): 1 for independent observations that are 0 or 1, `size` where those of a group all
    agree. It cannot be measured from few hits, so that it counts for the c groups that have hits,
    beside two groups at the ends, whose variance is the largest of any with this mean (Bhatia and
    Davis, 2000): A = `size` for ends of 0 and 1. With groups of one and numbers that are 0 or 1
    this is Wilson's interval itself.

    Args:
        values: (n,), the mean of each group of observations in [0, 1].
        size: Observations in a group.
        ends: Between which the mean of a group lies, as far as is known: 0 and 1 for observations
            that are 0 or 1, since a group may agree on either.

    Returns:
        The mean with its 95 % interval; for fewer than two groups without one.
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(value=mean)
    bernoulli = mean * (1 - mean)
    design = values.var(ddof=1) * size / bernoulli if bernoulli > 0 else size
    informative = min(participating(values), participating(1 - values))
    low, high = ends
    agreeing = size * (high - mean) * (mean - low) / bernoulli if bernoulli > 0 else size
    design = (informative * min(design, size) + 2 * agreeing) / (informative + 2)
    count = n * size / design
    scale = 1 + Z * Z / count
    centre = (mean + Z * Z / (2 * count)) / scale
    half = Z / scale * np.sqrt(bernoulli / count + (Z / (2 * count)) ** 2)
    # Rounding may put an end that is 0 or 1 on the wrong side of it, or of the mean.
    low, high = max(float(centre - half), 0.0), min(float(centre + half), 1.0)
    return Interval(value=mean, low=min(low, mean), high=max(high, mean))


def score_interval(scores: FloatArray) -> Interval:
    """Mean of scores between 0 and 1 over groups, by `share_interval`.

    Scores that are 0 or 1 are a share. Of other scores a group's mean is taken to stay between the
    smallest and the largest that was found, unless these are equal and tell nothing: a group of
    faint scores is not feared to agree on 1. (A loss that a rare error makes large, such as the
    Brier score, is for `share_interval`.)

    Args:
        scores: (n, size), the scores of each group.
    """
    means, size = scores.mean(axis=1), scores.shape[1]
    low, high = float(means.min()), float(means.max())
    if np.isclose(low, high, rtol=1e-9, atol=0) or np.isin(scores, (0, 1)).all():
        low, high = 0.0, 1.0
    return share_interval(means, size, (low, high))


def share_change_interval(before: FloatArray, after: FloatArray) -> Interval:
    """Change of a share between two answers to the same questions, with its 95 % interval.

    Half a pair is added to each of the four kinds of pairs (Agresti and Min, *Simple improved
    confidence intervals for comparing matched proportions*, Statistics in Medicine 2005), so that
    answers which agree everywhere do not claim to agree on all other questions.

    Args:
        before: (n,), 0 or 1.
        after: (n,), 0 or 1.
    """
    n, change = len(before), float((after - before).mean())
    if n < 2:
        return Interval(value=change)
    gained, lost = float((after > before).sum()) + 0.5, float((after < before).sum()) + 0.5
    centre = (gained - lost) / (n + 2)
    half = Z * np.sqrt(gained + lost - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = max(float(centre - half), -1.0), min(float(centre + half), 1.0)
    return Interval(value=change, low=low, high=high)


def participating(values: FloatArray) -> float:
    """The number of groups that the sum comes from: k for k equal values among zeros."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / squares if squares > 0 else 0.0
