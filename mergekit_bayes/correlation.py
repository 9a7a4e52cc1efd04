"""Rank correlation, in numpy."""

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]


def rank_correlation(one: _Array, other: _Array) -> float | None:
    """Spearman's correlation of two arrays of one size; None where one of them is constant."""
    first, second = unit_ranks(one), unit_ranks(other)
    return None if first is None or second is None else float(first @ second)


def unit_ranks(values: _Array) -> _Array | None:
    """Ranks as a flat vector of mean 0 and norm 1, whose inner products are rank correlations.

    Returns:
        None where all values are equal.
    """
    ranks = mean_ranks(values).ravel()
    ranks -= ranks.mean()
    norm = float(ranks @ ranks) ** 0.5
    return ranks / norm if norm > 0 else None


def mean_ranks(values: _Array) -> _Array:
    """Ranks from 0 on, in the shape of the values; equal values share the mean of theirs."""
    flat = values.ravel()
    order = flat.argsort()
    ordered = flat[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) + 1
    counts = np.diff(ends, prepend=0)
    ranks = np.empty(flat.size)
    ranks[order] = np.repeat(ends - (counts + 1) / 2, counts)
    return ranks.reshape(values.shape)
