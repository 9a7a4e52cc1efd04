"""How the entries of a change are weighed: the loss that a deviation D from the tuned weight costs.

    1/2 sum_ij S_ij D_ij^2       one number an entry
    1/2 ||L' D R||^2             one for each row and column, or matrices: S = (L L') x (R R')

It is the second-order change of the summed loss at the tuned weights, in nats, where S is its
precision. The second form has a closed solution: the SVD of `L' D R` (see `roots`).
"""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.extract.roots import DiagonalRoot, Root, floored

_BLOCK = 1 << 20  # entries of a block of rows


class Weighting(NamedTuple):
    """The weights of a matrix of shape (p, q), as it is stored.

    Attributes:
        left: Root of the precision of the rows' axis.
        right: Root of the precision of the columns' axis.
        entries: One precision for each entry, which `left` and `right` then only approximate;
            None where these are all.
        terms: L_k and R_k of a sum of Kronecker products, likewise; empty where there is none.
    """

    left: Root
    right: Root
    entries: Array | None = None
    terms: tuple[tuple[Array, Array], ...] = ()

    def transform(self, matrix: Array) -> Array:
        """`L' M R`, whose squared norm is twice the loss, or near it."""
        return self.left.times(np.ascontiguousarray(self.right.times(matrix).T)).T

    def restore(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Factors of `L' M R`, (p, k) and (k, q), as factors of M."""
        return self.left.over(left.T).T, self.right.over(right)

    def loss(self, deviation: Array) -> float:
        """The loss of a deviation of shape (p, q)."""
        if self.entries is not None:
            return entry_loss(self.entries, deviation)
        if self.terms:
            wide = deviation.astype(np.float64)
            return 0.5 * sum(float(np.sum((wide.T @ a @ wide) * b)) for a, b in self.terms)
        return half_square(self.transform(deviation))


def uniform(shape: tuple[int, int]) -> Weighting:
    """Weights of one: the loss is half the squared Frobenius norm."""
    return Weighting(DiagonalRoot(np.ones(shape[0])), DiagonalRoot(np.ones(shape[1])))


def by_entry(precision: Array) -> Weighting:
    """Weights of one number an entry, and the means of rows and columns as what is near them.

    Args:
        precision: Shape (p, q), not negative and not zero everywhere.
    """
    rows = precision.mean(1, dtype=np.float64)
    columns = precision.mean(0, dtype=np.float64) / rows.mean()
    return Weighting(DiagonalRoot(rows), DiagonalRoot(columns), floored(precision))


def entry_loss(precision: Array, deviation: Array) -> float:
    """`1/2 sum_ij S_ij D_ij^2`, summed in float64 block by block."""
    rows = max(1, _BLOCK // max(1, deviation.shape[1]))
    total = 0.0
    for start in range(0, len(deviation), rows):
        part = deviation[start : start + rows].astype(np.float64)
        total += float(np.sum(np.square(part) * precision[start : start + rows]))
    return 0.5 * total


def half_square(matrix: Array) -> float:
    """`1/2 ||M||^2`, summed in float64."""
    flat = matrix.reshape(-1)
    blocks = (flat[i : i + _BLOCK].astype(np.float64) for i in range(0, flat.size, _BLOCK))
    return 0.5 * sum(float(block @ block) for block in blocks)
