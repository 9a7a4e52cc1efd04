"""Precisions of low rank beside a diagonal, with the arithmetic that a rule asks of matrices.

    S = diag(d) + sum_k c_k U_k' U_k        for the n inputs of a layer; U_k has few rows

Nothing here has n x n numbers but `dense`. A model's own precision is one term with c = 1, and
merging adds terms up; two with one U are one, so that what is taken out again cancels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[Any]  # of float64

# Share of the norm of what was added up, below which what is negative is what float32 left of 0.
ROUNDING = 1e-6
_CANCELLED = 1e-12  # share of two weights below which their sum is zero


class Term(NamedTuple):
    """One term, `weight factor' factor`.

    Attributes:
        factor: U, (k, n), 1/weight. It is never changed, and known by its identity.
        weight: c, dimensionless.
    """

    factor: Matrix
    weight: float


class Stacked(NamedTuple):
    """All terms as one, `rows' diag(signs) rows`.

    Attributes:
        rows: (k, n).
        signs: (k,), each 1 or -1.
    """

    rows: Matrix
    signs: Matrix


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """A precision as a diagonal and terms of low rank.

    Attributes:
        diagonal: d, (n,), 1/weight^2.
        terms: The terms, no two with the same factor.
        made_of: Frobenius norm of the largest of what it was added up from; 0 where it is no sum.
    """

    diagonal: Matrix
    terms: tuple[Term, ...] = ()
    made_of: float = 0.0

    @cached_property
    def size(self) -> float:
        """Norm of the largest of what it was added up from, by which rounding is measured.

        What float32 left of two large precisions of which one was taken from the other can be far
        more than a share of their difference.
        """
        return self.made_of or self.norm()

    def __add__(self, other: "LowRankSum") -> "LowRankSum":
        terms = {id(term.factor): term for term in self.terms}
        for factor, weight in other.terms:
            before = terms[id(factor)].weight if id(factor) in terms else 0.0
            terms[id(factor)] = Term(factor, before + weight)
            if abs(before + weight) <= _CANCELLED * (abs(before) + abs(weight)):
                del terms[id(factor)]
        size = max(self.size, other.size)
        return LowRankSum(self.diagonal + other.diagonal, tuple(terms.values()), size)

    def __sub__(self, other: "LowRankSum") -> "LowRankSum":
        return self + (-1.0) * other

    def __rmul__(self, factor: float) -> "LowRankSum":
        terms = (Term(u, float(factor) * weight) for u, weight in self.terms if factor)
        return LowRankSum(factor * self.diagonal, tuple(terms), abs(float(factor)) * self.size)

    __mul__ = __rmul__
    # numpy would take `array @ self` apart entry by entry.
    __array_ufunc__ = None

    def __rmatmul__(self, weight: Matrix) -> Matrix:
        """`w S` for weights of shape (outputs, n)."""
        result: Matrix = weight * self.diagonal
        for factor, c in self.terms:
            result += (c * (weight @ factor.T)) @ factor
        return result

    def one(self) -> "LowRankSum":
        """The identity of its size."""
        return LowRankSum(np.ones_like(self.diagonal))

    def entries(self) -> Matrix:
        """The diagonal of S, (n,)."""
        result = self.diagonal.copy()
        for factor, c in self.terms:
            result += c * np.einsum("ij,ij->j", factor, factor)
        return result

    def norm(self) -> float:
        """The Frobenius norm of S."""
        rows, signs = self.stacked()
        gram = rows @ rows.T
        squared = np.sum(self.diagonal**2) + signs @ gram**2 @ signs
        squared += 2 * np.sum(self.diagonal * (signs @ rows**2))
        return float(np.sqrt(max(squared, 0.0)))

    def dense(self) -> Matrix:
        """S itself, (n, n)."""
        rows, signs = self.stacked()
        result: Matrix = np.diag(self.diagonal) + (rows.T * signs) @ rows
        return (result + result.T) / 2

    def stacked(self) -> Stacked:
        """All terms as one."""
        empty = np.zeros((0, len(self.diagonal)))
        rows = [np.sqrt(abs(c)) * factor for factor, c in self.terms]
        signs = [np.full(len(factor), np.sign(c)) for factor, c in self.terms]
        return Stacked(np.concatenate([empty, *rows]), np.concatenate([np.zeros(0), *signs]))

    def factor(self, rank: int) -> Matrix:
        """U of shape (rank, n), such that `U' U` is the sum of all terms; zero rows at its end.

        Raises:
            ArithmeticError: That sum has negative eigenvalues, or more than `rank` others.
        """
        rows, signs = self.stacked()
        if len(rows) > rank or signs.min(initial=1.0) < 0:
            rows, values = _eigen(rows, signs)
            if values.min(initial=0.0) < -ROUNDING * self.size:
                raise ArithmeticError(_NEGATIVE)
            rows = (rows * np.sqrt(values.clip(min=0.0))[:, None])[values > 0]
            if len(rows) > rank:
                raise ArithmeticError(f"a sum of rank {len(rows)} is no factor of {rank} rows")
        return np.concatenate([rows, np.zeros((rank - len(rows), len(self.diagonal)))])

    def is_positive(self) -> bool:
        """Whether neither the diagonal nor the sum of all terms is negative, up to rounding."""
        least = -ROUNDING * self.size
        if self.diagonal.min(initial=0.0) < least:
            return False
        rows, signs = self.stacked()
        if signs.min(initial=1.0) > 0:
            return True
        return bool(_eigen(rows, signs)[1].min(initial=0.0) >= least)

    def magnitude(self) -> "LowRankSum":
        """The precision itself, which must have no negative eigenvalue.

        Raises:
            ArithmeticError: It may have one.
        """
        if not self.is_positive():
            raise ArithmeticError(_NEGATIVE)
        return self

    def bounded_below(self, bound: "LowRankSum", share: float) -> "LowRankSum":
        """The precision itself, which must not be below a share of a bound.

        Raises:
            ArithmeticError: It may be.
        """
        if not (self - share * bound).is_positive():
            raise ArithmeticError(_NEGATIVE)
        return self

    def divide(self, weighted: Matrix) -> Matrix:
        """`w S^-1` for (outputs, n), by the identity of Woodbury; S is positive definite.

            S = D^1/2 (1 + Q' diag(v) Q) D^1/2        with orthonormal rows Q
            S^-1 = D^-1/2 (1 - Q' diag(v / (1 + v)) Q) D^-1/2

        Raises:
            LinAlgError: It is not.
        """
        root = np.sqrt(self.diagonal.clip(min=0.0))
        if not root.min(initial=1.0) > 0:
            raise np.linalg.LinAlgError(_NOTHING)
        rows, signs = self.stacked()
        rows, values = _eigen(rows / root, signs)
        if not values.min(initial=0.0) > -1:
            raise np.linalg.LinAlgError(_NOTHING)
        inside = values / (1 + values)

        def quotient(numerator: Matrix) -> Matrix:
            scaled = numerator / root
            return np.asarray((scaled - ((scaled @ rows.T) * inside) @ rows) / root)

        found = quotient(weighted)
        # Where terms are far larger than the diagonal, most of the first quotient cancels.
        return found + quotient(weighted - found @ self)


def _eigen(rows: Matrix, signs: Matrix) -> tuple[Matrix, Matrix]:
    """Orthonormal rows and values, of which `rows' diag(signs) rows` is the sum."""
    basis, inside = np.linalg.qr(rows.T)
    values, vectors = np.linalg.eigh((inside * signs) @ inside.T)
    return (basis @ vectors).T, values


_NOTHING = "a merge of low rank leaves a direction without precision"
_NEGATIVE = (
    "a precision of low rank is smaller in some direction than what its record says that it "
    "contains, and cannot be bounded there. Estimate the models' precisions anew, or without --rank"
)
