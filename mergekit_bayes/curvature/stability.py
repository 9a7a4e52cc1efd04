"""How far an estimate of curvature would move with other examples, from the pass that made it.

A pass adds up squared gradients batch by batch. Now and then the sums of its rows are copied, so
that their differences are the sums over disjoint subsamples of the batches:

    F_k = (sum of a row over subsample k) / n_k        n_k observations, N in all
    F   = sum_k n_k F_k / N
    s^2 = sum_k n_k (F_k - F)^2 / (K - 1) / N          squared standard error of F

A copy has one number a row, and copies are thinned out as their number grows, so that a pass of any
length keeps at most 16 of them and spends nothing on most batches.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bayes.correlation import rank_correlation

K = 4  # subsamples
_COPIES = 4 * K  # at which every other copy is dropped
_RANKED = 8  # rows that a tensor must have for a rank correlation

_Array = NDArray[np.float64]


class Part(NamedTuple):
    """What one subsample adds to the curvature.

    Attributes:
        rows: By parameter name: float32, (rows,), summed loss/weight^2 of each slice of the first
            axis; one number where there is no axis.
        observations: Number of observations in the subsample.
    """

    rows: dict[str, Tensor]
    observations: int


class Subsamples:
    """Copies of the row sums of a pass, taken at batches that are evenly spaced.

    Attributes:
        copies: What the first batches had added up to, the earliest first.
        stride: Number of batches between copies.
        batches: Number of batches so far.
    """

    def __init__(self) -> None:
        self.copies: list[Part] = []
        self.stride, self.batches = 1, 0

    def after_batch(self, totals: Mapping[str, Tensor], observations: int) -> None:
        """Take note of the totals after one more batch.

        Args:
            totals: Sums over all batches so far, by parameter name.
            observations: Number of observations so far.
        """
        self.batches += 1
        if self.batches % self.stride:
            return
        self.copies.append(Part({n: row_sums(t) for n, t in totals.items()}, observations))
        if len(self.copies) == _COPIES:
            self.copies = self.copies[1::2]
            self.stride *= 2

    def parts(self) -> tuple[Part, ...]:
        """K subsamples of nearly equal size, of consecutive batches each.

        Batches after the last copy are in none of them: fewer than one in eight of all.

        Returns:
            Nothing where there were fewer than K batches with observations.
        """
        ends = list({copy.observations: copy for copy in self.copies if copy.observations}.values())
        if len(ends) < K:
            return ()
        cuts = [round(len(ends) * k / K) - 1 for k in range(1, K + 1)]
        chosen = [ends[cut] for cut in cuts]
        empty = Part({n: torch.zeros_like(rows) for n, rows in chosen[0].rows.items()}, 0)
        return tuple(
            Part(
                {name: rows - before.rows[name] for name, rows in after.rows.items()},
                after.observations - before.observations,
            )
            for before, after in zip([empty, *chosen], chosen, strict=False)
        )


def row_sums(total: Tensor) -> Tensor:
    """Sums over all but the first axis, (rows,), on the CPU."""
    rows = total.flatten(1) if total.ndim > 1 else total.reshape(-1, 1)  # there may be none
    return rows.sum(1).cpu()


class Stability(NamedTuple):
    """How far the rows' curvature would move with other examples.

    Attributes:
        relative_error: Standard error of a row's curvature over the curvature: the root mean
            square over the rows of a tensor that have any, and over tensors by their entries.
        rank_correlation: Spearman's, of the rows of each tensor between two halves of the examples;
            the mean over entries. None where no tensor has eight rows.
    """

    relative_error: float
    rank_correlation: float | None


def stability(
    parts: Sequence[Part], sizes: Mapping[str, int], layers: Mapping[str, Sequence[str]]
) -> dict[str, Stability]:
    """The stability of some layers; one without curvature is left out.

    Args:
        parts: The subsamples, at least two.
        sizes: Number of entries by parameter name, by which tensors are weighted.
        layers: Parameter names by layer.
    """
    found: dict[str, Stability] = {}
    counts = np.array([part.observations for part in parts], np.float64)
    for layer, names in layers.items():
        errors, ranks = [], []
        for name in names:
            sums = np.stack([part.rows[name].double().numpy() for part in parts])
            if (error := _squared_errors(sums, counts)) is not None:
                errors.append((error, sizes[name]))
            if (rank := _halves(sums)) is not None:
                ranks.append((rank, sizes[name]))
        if errors:
            found[layer] = Stability(_weighted(errors) ** 0.5, _weighted(ranks) if ranks else None)
    return found


def _squared_errors(sums: _Array, counts: _Array) -> float | None:
    """Mean over rows of the squared relative standard error; None where all rows are zero."""
    sums = sums[:, sums.sum(0) > 0]
    if not sums.size:
        return None
    mean = sums.sum(0) / counts.sum()
    spread = (counts[:, None] * (sums / counts[:, None] - mean) ** 2).sum(0) / (len(counts) - 1)
    return float((spread / counts.sum() / mean**2).mean())


def _halves(sums: _Array) -> float | None:
    """Rank correlation of the rows between every other part and the rest; None for few rows."""
    if sums.shape[1] < _RANKED:
        return None
    return rank_correlation(sums[::2].sum(0), sums[1::2].sum(0))


def _weighted(values: Sequence[tuple[float, int]]) -> float:
    numbers, weights = zip(*values, strict=True)
    return float(np.average(numbers, weights=weights))
