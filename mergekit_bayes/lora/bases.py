"""Orthonormal bases of stacks of factors, which have many rows and few columns.

A basis of a stack X, (d, k), is known as `U = X W` with a small W and never formed: `U' Y` and
`U Y` of a thin Y then cost no more than the product of X and Y. W comes from `X' X`, which squares
the condition number, so that it is used only where U is orthonormal to 1e-9, far below the float32
in which factors are stored; else, as where adapters share a factor, X itself is decomposed.
"""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.methods.matrices import singular

_CONDITION = 1e3  # of a stack, up to which its products of columns tell its directions


class Basis(NamedTuple):
    """Orthonormal columns U, (d, l), of a matrix of few columns.

    Attributes:
        stack: X, (d, k), float64.
        mix: W, (k, l), with U = X W; None where U is X itself.
    """

    stack: Array
    mix: Array | None = None

    @property
    def size(self) -> int:
        """The number of its columns."""
        return int((self.stack if self.mix is None else self.mix).shape[1])

    def times(self, inner: Array) -> Array:
        """`U inner`, (d, n), of an inner matrix (l, n)."""
        return self.stack @ (inner if self.mix is None else self.mix @ inner)

    def inside(self, columns: Array) -> Array:
        """`U' columns`, (l, n), of a matrix (d, n): its part in the span of U."""
        inner = self.stack.T @ columns
        return inner if self.mix is None else self.mix.T @ inner


class Spanned(NamedTuple):
    """A stack in a basis of its own columns: `X = U inner`.

    Attributes:
        basis: U, (d, l); directions that the stack lacks are left out.
        inner: (l, k).
    """

    basis: Basis
    inner: Array


def orthonormal(stack: Array) -> Spanned:
    """Write a stack in some orthonormal basis of its columns.

    Args:
        stack: (d, k), float64, finite.
    """
    products = _products(stack)
    if products is None:
        return _decomposed(stack)
    try:
        root = np.linalg.cholesky(products).T
    except np.linalg.LinAlgError:
        return _decomposed(stack)
    inverse = np.linalg.inv(root)
    if not np.linalg.norm(root) * np.linalg.norm(inverse) < _CONDITION:
        return _decomposed(stack)
    return Spanned(Basis(stack, inverse), root)


def principal(stack: Array) -> Spanned:
    """Write a stack in its left singular vectors, the largest singular value first.

    Args:
        stack: (d, k), float64, finite.
    """
    products = _products(stack)
    if products is None:
        return _decomposed(stack)
    squares, vectors = (array[..., ::-1] for array in np.linalg.eigh(products))
    if not squares[-1] * _CONDITION**2 > squares[0]:
        return _decomposed(stack)
    sizes = np.sqrt(squares)
    return Spanned(Basis(stack, vectors / sizes), sizes[:, None] * vectors.T)


def _products(stack: Array) -> Array | None:
    """The products of the columns; None where they are not the way to a basis."""
    rows, columns = stack.shape
    if not rows > columns > 0:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        products = stack.T @ stack
    return products if np.isfinite(products).all() else None


def _decomposed(stack: Array) -> Spanned:
    left, sizes, right = singular(stack)
    return Spanned(Basis(left), sizes[:, None] * right)
