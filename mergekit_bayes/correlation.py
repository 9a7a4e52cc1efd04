"""Rank correlation, in numpy."""

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


def rank_correlation(one: _Array, other: _Array) -> float | None:
    """Spearman's correlation of two arrays of one shape; None where one of them is constant."""
    ranks = np.stack([mean_ranks(one.ravel()), mean_ranks(other.ravel())])
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(1))
    return None if not norms.all() else float(ranks[0] @ ranks[1] / norms.prod())


def mean_ranks(values: _Array) -> _Array:
    """Ranks from 0 on, in the shape of the values; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: _Array = (last - (counts + 1) / 2)[inverse].reshape(values.shape)
    return ranks
