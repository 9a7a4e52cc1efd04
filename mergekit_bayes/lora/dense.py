"""The change of an adapted weight and its variance, `s B A` and `V_W`, computed as they are read.

Nothing dense is stored. Every entry is computed by the same operations in the same order (products
summed over the rank, from the first on), so that its bits depend neither on the chunk nor on the
machine's linear algebra.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.layers import Factors

# Added to every variance, weight^2, so that an entry that nothing moves has a large precision
# instead of an infinite one.
VARIANCE_FLOOR = 1e-20
_TILE = 1 << 16  # entries of a block, which stays in the second-level cache over all ranks


class Product(NamedTuple):
    """A matrix `left' right` of rank k, laid out as the stored weight is."""

    left: Array  # (k, rows)
    right: Array  # (k, columns)

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.right.shape[1])

    def with_more(self, other: "Product") -> "Product":
        """The sum of two products, in this one's number format; the other's terms come last."""
        pairs = ((self.left, other.left), (self.right, other.right))
        return Product(*(np.concatenate([a, b.astype(a.dtype)]) for a, b in pairs))

    def entries(self, start: int, stop: int) -> Array:
        """Entries `start:stop` in flat order: `sum_k left_k[row] right_k[column]`, k ascending."""
        out = np.empty(stop - start, self.left.dtype)
        scratch = np.empty(min(_TILE, stop - start), out.dtype)
        for rows, columns, at in rectangles(start, stop, self.right.shape[1]):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            size = shape[0] * shape[1]
            block, term = out[at : at + size].reshape(shape), scratch[:size].reshape(shape)
            np.multiply(self.left[0, rows, None], self.right[0, columns], out=block)
            for k in range(1, len(self.left)):
                np.multiply(self.left[k, rows, None], self.right[k, columns], out=term)
                block += term
        return out


def change(factors: Factors, scaling: float, *, transposed: bool = False) -> Product:
    """`s B A`, shape (d_out, d_in), in the factors' number format.

    Args:
        factors: A and B.
        scaling: s, which is multiplied into B.
        transposed: Return the transpose, for a weight that is stored as (d_in, d_out).
    """
    return _oriented(factors.b.dtype.type(scaling) * factors.b.T, factors.a, transposed=transposed)


def variance(
    factors: Factors, variances: Factors, scaling: float, *, transposed: bool = False
) -> Product:
    """Elementwise variance of `s B A` for independent Gaussian factors.

        V_W = s^2 [ V_B (A*A) + (B*B) V_A + V_B V_A ] = s^2 [ V_B (A*A + V_A) + (B*B) V_A ]

    with `*` elementwise and the rest ordinary matrix products. It is exact, not a first-order
    approximation. Its inverse is a marginal precision: entries of a product are strongly correlated
    (the rank of their covariance is at most r (d_in + d_out)), so that it overstates what is known.
    Use it to weigh adapters against each other, not as a likelihood.

    Args:
        factors: Means of A and B.
        variances: Variances of A and B.
        scaling: s.
        transposed: Return the transpose, for a weight that is stored as (d_in, d_out).
    """
    square = np.float32(scaling) * np.float32(scaling)
    left = np.concatenate([square * variances.b.T, square * factors.b.T**2])
    right = np.concatenate([factors.a**2 + variances.a, variances.a])
    return _oriented(left, right, transposed=transposed)


def _oriented(left: Array, right: Array, *, transposed: bool) -> Product:
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    return Product(right, left) if transposed else Product(left, right)


def rectangles(start: int, stop: int, width: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield a flat range of a matrix as blocks (rows, columns, offset in the range).

    An incomplete row is a block of its own; complete rows come many at a time.
    """
    at = start
    while at < stop:
        row, column = divmod(at, width)
        if column or stop - at < width or width > _TILE:
            end = min(width, column + stop - at, column + _TILE)
            yield slice(row, row + 1), slice(column, end), at - start
            at += end - column
        else:
            rows = min((stop - at) // width, _TILE // width)
            yield slice(row, row + rows), slice(0, width), at - start
            at += rows * width
