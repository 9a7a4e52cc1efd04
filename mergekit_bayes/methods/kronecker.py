"""Precisions that are sums of Kronecker products, with the arithmetic that a rule asks of matrices.

    S = sum_k L_k (x) R_k,    <w, S w> = sum_k tr(w' L_k w R_k)    for a weight w (outputs, inputs)

L_k are for the outputs and R_k for the inputs, symmetric; R_k is positive and has the mean diagonal
1, so that all of a term's size and sign are in L_k. A model's own curvature is one term: the second
moments of a layer's output gradients and of its inputs (Martens and Grosse, ICML 2015). Merging
adds terms up; two with one R are one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[Any]  # of float64

SAME = 1e-5  # relative difference up to which two factors are one, rounded to float32 or not
ROUNDED = 1e-7  # share of a matrix's norm that rounding to float32 may take from its eigenvalues
NOTHING = 1e-6  # share of what cancelled below which a term is what rounding left of it
EXACT = 1e-5  # relative residual at which a solution is taken, where its diagonal is one
MOST_STEPS = 400  # of conjugate gradients


@dataclass(frozen=True, eq=False)
class Factors:
    """One term.

    Attributes:
        left: L, (outputs, outputs), 1/weight^2.
        right: R, (inputs, inputs), of mean diagonal 1.
    """

    left: Matrix
    right: Matrix

    def __iter__(self) -> Iterator[Matrix]:
        return iter((self.left, self.right))

    @cached_property
    def is_positive(self) -> bool:
        """Whether it has no negative eigenvalue, up to rounding."""
        return _is_positive(self.left)

    def magnitude(self) -> "Factors":
        """The term with the eigenvalues of its left factor replaced by their magnitudes."""
        return self if self.is_positive else Factors(with_magnitudes(self.left), self.right)


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """A precision as a sum of Kronecker products.

    Attributes:
        terms: The terms, no two with the same right factor.
    """

    terms: tuple[Factors, ...]

    @classmethod
    def of(cls, pairs: Sequence[Factors | tuple[Matrix, Matrix]]) -> "KroneckerSum":
        """The sum of products of these (left, right), those with one right factor added up.

        Where these cancel up to rounding there is no term. A small term beside large ones stays.
        """
        terms: list[Factors] = []
        sizes: list[float] = []  # of what each was added up from
        for pair in pairs:
            left, right = pair
            size = float(np.trace(right)) / max(len(right), 1)
            if size == 0 or not left.any():
                continue
            if abs(size - 1) > 1e-12:
                factors = Factors(left * size, right / size)
            else:  # a term already, of which nothing need be copied or found again
                factors = pair if isinstance(pair, Factors) else Factors(left, right)
            largest = float(abs(factors.left).max())
            for i, other in enumerate(terms):
                if _is_same(other.right, factors.right):
                    terms[i] = Factors(other.left + factors.left, other.right)
                    sizes[i] = max(sizes[i], largest)
                    break
            else:
                terms.append(factors)
                sizes.append(largest)
        found = zip(terms, sizes, strict=True)
        return cls(tuple(t for t, size in found if float(abs(t.left).max()) > NOTHING * size))

    def __add__(self, other: "KroneckerSum") -> "KroneckerSum":
        return KroneckerSum.of([*self.terms, *other.terms])

    def __sub__(self, other: "KroneckerSum") -> "KroneckerSum":
        return self + (-1.0) * other

    def __rmul__(self, factor: float) -> "KroneckerSum":
        if factor == 1:  # what is known of the terms stays known
            return self
        return KroneckerSum(tuple(Factors(factor * left, right) for left, right in self.terms))

    __mul__ = __rmul__
    # numpy would take `array @ self` apart entry by entry.
    __array_ufunc__ = None

    def __rmatmul__(self, weight: Matrix) -> Matrix:
        """S applied to a weight, `sum_k L_k w R_k`: what `w S` is where S is one matrix."""
        result = np.zeros_like(weight)
        for left, right in self.terms:
            result += left @ weight @ right
        return result

    def energy(self, weight: Matrix) -> float:
        """`<w, S w>` from products in float32."""
        w = weight.astype(np.float32)
        rows = 0.0
        for left, right in self.terms:
            one, other = left.astype(np.float32) @ w, w @ right.astype(np.float32)
            rows = rows + np.einsum("ij,ij->i", one, other).astype(np.float64)
        return float(np.sum(rows))

    def magnitude(self) -> "KroneckerSum":
        """The sum of the terms' magnitudes."""
        return KroneckerSum(tuple(term.magnitude() for term in self.terms))

    def is_positive(self) -> bool:
        """Whether no direction has a negative precision.

        Of two terms the first must be positive definite; of more, all must be positive.
        """
        if all(term.is_positive for term in self.terms):
            return True
        if len(self.terms) > 2:
            return False
        try:
            basis = Basis.of(self.terms[0], self.terms[-1])
        except np.linalg.LinAlgError:
            return False
        return bool(basis.values(self).min() > 0)

    def bounded_below(self, bound: "KroneckerSum", share: float) -> "KroneckerSum | Spectrum":
        """A precision whose eigenvalues are at least a share of those of a bound.

        Raises:
            ArithmeticError: More than two terms are there and one is negative, for which there is
                no common basis.
        """
        if self.terms and all(term.is_positive for term in self.terms):
            return self
        if len(self.terms) > 2 or len(bound.terms) > 2:
            raise ArithmeticError(
                "a removal by Kronecker factors has a basis of its own for one removed task and a "
                "base only. Remove one task at a time, or by other precisions"
            )
        basis = Basis.of(bound.terms[0], bound.terms[-1])
        values = np.maximum(basis.values(self), share * basis.values(bound))
        return Spectrum(basis, values, self)

    def divide(self, weighted: Matrix) -> Matrix:
        """The weight to which S is applied to give this one: `S^-1 weighted`.

        One or two terms have a common basis; more are solved by conjugate gradients, in the basis
        of their sums and scaled by their diagonal there. The steps are in float32, where that has
        made the eigenvalues alike; what they leave is found, and solved again, in float64.

        Raises:
            ArithmeticError: They do not come near the solution.
        """
        if not self.terms:
            return np.zeros_like(weighted)
        if len(self.terms) <= 2:
            basis = Basis.of(self.terms[0], self.terms[-1])
            return basis.divide(weighted, basis.values(self))
        system = _System.of(self)
        size = left = float(np.linalg.norm(system.into(weighted)))
        solution, missing, steps = np.zeros_like(weighted), weighted, 0
        while left > EXACT * size and steps < MOST_STEPS:
            found, taken = system.steps(system.into(missing), EXACT / 2 * size, MOST_STEPS - steps)
            solution, steps = solution + system.back(found), steps + taken
            missing = weighted - solution @ self
            before, left = left, float(np.linalg.norm(system.into(missing)))
            if not left < before / 2:
                break
        if not left <= EXACT * size:
            raise ArithmeticError(
                f"{steps} steps of conjugate gradients leave a relative residual of "
                f"{left / size:.2g}, since the precisions differ too much in size. Merge fewer "
                "tasks at a time, or by precisions of --estimator inputs"
            )
        return solution


class _System(NamedTuple):
    """A sum of products in the basis of its sums, scaled so that its diagonal is one.

    Attributes:
        left: The basis for the outputs, in which the sum of the left factors is the identity.
        right: For the inputs.
        scale: Of each entry there, (outputs, inputs).
        terms: The factors there, in float32.
    """

    left: Matrix
    right: Matrix
    scale: Matrix
    terms: tuple[Factors, ...]

    @classmethod
    def of(cls, precision: KroneckerSum) -> "_System":
        lefts, rights = zip(*precision.terms, strict=True)
        u, v = _whitening(reduce(np.add, lefts)), _whitening(reduce(np.add, rights))
        u32, v32 = u.astype(np.float32), v.astype(np.float32)
        terms = tuple(
            Factors(u32.T @ left.astype(np.float32) @ u32, v32.T @ right.astype(np.float32) @ v32)
            for left, right in precision.terms
        )
        diagonal = sum(np.outer(left.diagonal(), right.diagonal()) for left, right in terms)
        return cls(u, v, 1 / np.sqrt(np.float64(diagonal)), terms)

    def into(self, weight: Matrix) -> Matrix:
        """A weight to which the precision was applied, in this basis."""
        there: Matrix = self.scale * (self.left.T @ weight @ self.right)
        return there

    def back(self, solution: Matrix) -> Matrix:
        """A solution in this basis, as a weight."""
        weight: Matrix = self.left @ (self.scale * solution) @ self.right.T
        return weight

    def steps(self, given: Matrix, goal: float, most: int) -> tuple[Matrix, int]:
        """Conjugate gradients in float32, until a residual is reached or the steps are taken.

        Returns:
            What they found, in float64, and how many there were.
        """
        size = float(np.linalg.norm(given))
        residual = (given / size).astype(np.float32)
        direction, found, product = residual.copy(), np.zeros_like(residual), 1.0
        scale = self.scale.astype(np.float32)
        for step in range(most):
            if product**0.5 * size <= goal:
                return size * found.astype(np.float64), step
            scaled, applied = scale * direction, np.zeros_like(direction)
            for left, right in self.terms:
                applied += left @ (scaled @ right)
            applied *= scale
            curvature = float(np.vdot(direction, applied))
            if not curvature > 0:
                break
            along = np.float32(product / curvature)
            found += along * direction
            residual -= along * applied
            following = float(np.vdot(residual, residual))
            direction = residual + np.float32(following / product) * direction
            product = following
        return size * found.astype(np.float64), most


class Basis(NamedTuple):
    """A basis in which one term is the identity and another diagonal.

    Attributes:
        left: Its vectors for the outputs, as columns: `left' L left` is diagonal.
        right: For the inputs.
    """

    left: Matrix
    right: Matrix

    @classmethod
    def of(cls, one: Factors, other: Factors) -> "Basis":
        """The basis of two terms, of which the first is positive definite."""
        return cls(_common(one.left, other.left), _common(one.right, other.right))

    def values(self, precision: KroneckerSum) -> Matrix:
        """The diagonal of a precision in this basis, (outputs, inputs)."""
        values = np.zeros((len(self.left), len(self.right)))
        for left, right in precision.terms:
            values += np.outer(_diagonal(self.left, left), _diagonal(self.right, right))
        return values

    def divide(self, weighted: Matrix, values: Matrix) -> Matrix:
        """The quotient by the precision that is diagonal here with these values."""
        inside = (self.left.T @ weighted @ self.right) / values
        quotient: Matrix = self.left @ inside @ self.right.T
        return quotient


class Spectrum(NamedTuple):
    """A precision that is diagonal in a basis, after the guard.

    Attributes:
        basis: The basis.
        values: The diagonal, (outputs, inputs).
        exact: The precision without the guard, which is a sum of products.
    """

    basis: Basis
    values: Matrix
    exact: KroneckerSum

    def divide(self, weighted: Matrix) -> Matrix:
        """`S^-1 weighted`."""
        return self.basis.divide(weighted, self.values)

    @property
    def held_up(self) -> int:
        """At how many of the directions the guard acted."""
        return int(np.count_nonzero(self.values > self.basis.values(self.exact) * (1 + 1e-9)))


def without_rounding(factor: Matrix) -> Matrix:
    """A factor without the small eigenvalues of the other sign that float32 leaves in it."""
    sign = 1.0 if np.trace(factor) >= 0 else -1.0
    size = ROUNDED * float(np.linalg.norm(factor))
    for lifted in (factor, factor + sign * size * np.eye(len(factor))):
        if _has_root(sign * lifted):
            return lifted
    values, vectors = np.linalg.eigh(factor)
    signed = sign * values
    if signed.min() >= 0 or signed.min() < -SAME * signed.max():
        return factor
    result: Matrix = (vectors * (sign * signed.clip(min=0))) @ vectors.T
    return result


def _common(one: Matrix, other: Matrix) -> Matrix:
    """Vectors u with `u' one u = 1` and `u' other u` diagonal."""
    root = np.linalg.cholesky(one)
    half = np.linalg.solve(root, other)
    inside = np.linalg.solve(root, half.T)
    _, vectors = np.linalg.eigh((inside + inside.T) / 2)
    common: Matrix = np.linalg.solve(root.T, vectors)
    return common


def _diagonal(vectors: Matrix, matrix: Matrix) -> Matrix:
    diagonal: Matrix = np.einsum("ij,ij->j", vectors, matrix @ vectors)
    return diagonal


def _whitening(matrix: Matrix) -> Matrix:
    """Vectors u with `u' matrix u = 1`, but for directions that float32 does not tell from zero."""
    values, vectors = np.linalg.eigh(matrix)
    whitening: Matrix = vectors / np.sqrt(values.clip(min=SAME * values[-1]))
    return whitening


def _is_same(one: Matrix, other: Matrix) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    size = SAME * abs(one).max()
    # The diagonal, which tells most apart, is quickly compared.
    return all(
        bool(abs(a - b).max() <= size)
        for a, b in ((one.diagonal(), other.diagonal()), (one, other))
    )


def _has_root(matrix: Matrix) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def _is_positive(matrix: Matrix) -> bool:
    """Whether a symmetric matrix has no negative eigenvalue, up to rounding."""
    return _has_root(matrix + SAME * np.linalg.norm(matrix) * np.eye(len(matrix)))


def with_magnitudes(matrix: Matrix) -> Matrix:
    """A symmetric matrix with its eigenvalues replaced by their magnitudes."""
    for signed in (matrix, -matrix):
        if _is_positive(signed):
            return signed
    values, vectors = np.linalg.eigh(matrix)
    result: Matrix = (vectors * abs(values)) @ vectors.T
    return result
