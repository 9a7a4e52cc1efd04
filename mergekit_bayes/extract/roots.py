"""Square roots of the precisions of an axis, by which a weighted error becomes an ordinary one.

A precision S of the last axis of a matrix D weighs its rows as `tr(D S D')`. With `S = T T'` that
is the squared Frobenius norm of `D T`, and `D T ~ F G` gives `D ~ F (G T^-1)`.
"""

from typing import Protocol

import numpy as np

from mergekit_bayes.checkpoint.specs import Array

# Smallest precision, relative to the mean of the axis or tensor: where an estimate saw no curvature
# there may be some, and a change must not grow there without bound.
FLOOR = 1e-2


class Root(Protocol):
    """A square root T of a precision of one axis, of n entries."""

    def times(self, matrix: Array) -> Array:
        """`M T`, for M of shape (m, n)."""
        ...

    def over(self, matrix: Array) -> Array:
        """`M T^-1`, likewise."""
        ...


class DiagonalRoot:
    """The root of a precision with one number for each place of the axis."""

    def __init__(self, precision: Array) -> None:
        """Take the root of a precision.

        Args:
            precision: Shape (n,), not negative and not zero everywhere. What is below `FLOOR` times
                its mean is set to that.
        """
        self._root = np.sqrt(floored(precision.astype(np.float64)))

    def times(self, matrix: Array) -> Array:
        """`M T`, for M of shape (m, n)."""
        return _kept_dtype(matrix, matrix * self._root.astype(matrix.dtype))

    def over(self, matrix: Array) -> Array:
        """`M T^-1`, likewise."""
        return _kept_dtype(matrix, matrix / self._root)


class BlockRoot:
    """The root of a precision whose blocks on the diagonal are matrices.

    With `S = V diag(l) V'` it is `T = V diag(sqrt(l))`.
    """

    def __init__(self, blocks: Array) -> None:
        """Take the root of a precision.

        Args:
            blocks: Shape (k, n / k, n / k), symmetric. Eigenvalues below `FLOOR` times their mean
                are set to that.
        """
        halves = (blocks + np.swapaxes(blocks, -1, -2)).astype(np.float64) / 2
        values, self._vectors = np.linalg.eigh(halves)
        self._roots = np.sqrt(floored(values.clip(min=0.0)))

    def times(self, matrix: Array) -> Array:
        """`M T`, for M of shape (m, n)."""
        return self._by_block(matrix, self._vectors * self._roots[:, None, :])

    def over(self, matrix: Array) -> Array:
        """`M T^-1`, likewise."""
        inverse = np.swapaxes(self._vectors / self._roots[:, None, :], -1, -2)
        return self._by_block(matrix, inverse)

    def _by_block(self, matrix: Array, blocks: Array) -> Array:
        count, width, _ = blocks.shape
        parts = matrix.reshape(len(matrix), count, width)
        products = [parts[:, i] @ blocks[i] for i in range(count)]
        return _kept_dtype(matrix, np.concatenate(products, 1))


class LowRankRoot:
    """The root of a diagonal with a factor of low rank, `S = diag(d) + U' U`.

    With `U diag(d)^-1/2 = P diag(s) Q'` it is `T = diag(d)^1/2 (I + Q (sqrt(1 + s^2) - 1) Q')`, so
    that no n x n matrix is made.
    """

    def __init__(self, diagonal: Array, factor: Array) -> None:
        """Take the root of a precision.

        Args:
            diagonal: d, shape (n,), not negative. What is below `FLOOR` times the mean of the
                diagonal of S is set to that.
            factor: U, shape (k, n).
        """
        d, u = diagonal.astype(np.float64), factor.astype(np.float64)
        whole = d + np.square(u).sum(0)
        d = np.maximum(d, FLOOR * whole.mean())
        self._root = np.sqrt(d)
        _, s, self._q = np.linalg.svd(u / self._root, full_matrices=False)
        self._stretch = np.sqrt(1 + s**2)

    def times(self, matrix: Array) -> Array:
        """`M T`, for M of shape (m, n)."""
        scaled = matrix * self._root
        return _kept_dtype(matrix, scaled + (scaled @ self._q.T * (self._stretch - 1)) @ self._q)

    def over(self, matrix: Array) -> Array:
        """`M T^-1`, likewise."""
        shrunk = matrix + (matrix @ self._q.T * (1 / self._stretch - 1)) @ self._q
        return _kept_dtype(matrix, shrunk / self._root)


def floored(precision: Array) -> Array:
    """A precision in which nothing is below `FLOOR` times the mean of all of it."""
    floor = FLOOR * precision.mean(dtype=np.float64)
    if precision.min() >= floor:
        return precision  # a large one is not copied
    result: Array = np.maximum(precision, precision.dtype.type(floor))
    return result


def _kept_dtype(matrix: Array, result: Array) -> Array:
    """A result in the number format of what it was made of."""
    return result.astype(matrix.dtype, copy=False)
