"""Linear algebra that rules over whole matrices share.

A weight W has the shape (outputs, inputs), and its precision S, (inputs, inputs), is that of every
row: the density of a row w is that of a Gaussian with precision matrix S, 1/weight^2. Or it is a
sum of Kronecker products (`kronecker.py`) or a matrix of low rank beside a diagonal
(`low_rank.py`), which add, scale and multiply a weight in the same way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.methods.kronecker import Spectrum, with_magnitudes
from mergekit_bayes.methods.low_rank import ROUNDING, LowRankSum

Matrix: TypeAlias = NDArray[Any]  # of float64
Precision: TypeAlias = Any  # a Matrix, a KroneckerSum or a LowRankSum, all of one merge


class Singular(NamedTuple):
    """A singular value decomposition, `(left * values) @ right`, the largest value first.

    Attributes:
        left: (outputs, rank), with orthonormal columns.
        values: (rank,), positive.
        right: (rank, inputs), with orthonormal rows.
    """

    left: Matrix
    values: Matrix
    right: Matrix

    def top(self, count: int) -> "Singular":
        """Its largest components, at most `count`."""
        return Singular(self.left[:, :count], self.values[:count], self.right[:count])


def singular(matrix: Matrix, noise: float = 0.0) -> Singular:
    """Decompose a matrix; directions whose value is zero up to rounding are left out.

    The linear algebra library would choose them at will.

    Args:
        matrix: The matrix.
        noise: The largest singular value that the rounding of its entries may have made.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    least = max(matrix.shape) * np.finfo(values.dtype).eps * values.max(initial=0.0)
    return Singular(left, values, right).top(int(np.count_nonzero(values > max(least, noise))))


def rounding_noise(weight: Matrix) -> float:
    """About the largest singular value that rounding to float32 gives to a change of a weight.

        2^-23 rms(W) (sqrt(outputs) + sqrt(inputs))

    The last two factors are those of independent entries. Changes of low rank, as of adapters on
    their base, have no other direction, and a rule that counts directions would count these.
    """
    rows, columns = weight.shape
    rms = float(np.sqrt(np.mean(np.square(weight))))
    return float(np.finfo(np.float32).eps * rms * (rows**0.5 + columns**0.5))


def orthonormal(matrix: Matrix) -> Matrix:
    """The nearest matrix whose singular values are all one (Procrustes); zero ones stay zero."""
    left, _, right = singular(matrix)
    result: Matrix = left @ right
    return result


def divided(weighted: Matrix, precision: Precision | Spectrum) -> Matrix:
    """What a precision takes to `weighted`, (outputs, inputs): `weighted @ inverse(S)`."""
    if not isinstance(precision, np.ndarray):
        of_its_form: Matrix = precision.divide(weighted)
        return of_its_form
    quotient: Matrix = np.linalg.solve(precision, weighted.T).T
    return quotient


def weighted_mean(
    means: Sequence[Matrix], precisions: Sequence[Precision]
) -> tuple[Matrix, Precision]:
    """`(sum_t m_t S_t) (sum_t S_t)^-1` and `sum_t S_t`, written around the first mean."""
    total = precisions[0]
    weighted = np.zeros_like(means[0])  # sum_t (m_t - m_1) S_t
    for mean, precision in zip(means[1:], precisions[1:], strict=True):
        total = total + precision
        weighted += (mean - means[0]) @ precision
    return means[0] + divided(weighted, total), total


def one_like(precision: Matrix | LowRankSum) -> Matrix | LowRankSum:
    """The identity, in the form and size of a precision of inputs."""
    return precision.one() if isinstance(precision, LowRankSum) else np.eye(len(precision))


def diagonal_of(precision: Matrix | LowRankSum) -> Matrix | LowRankSum:
    """A precision of inputs without its entries off the diagonal."""
    if isinstance(precision, LowRankSum):
        return LowRankSum(precision.entries(), made_of=precision.size)
    return np.diag(np.diag(precision))


def norm(precision: Matrix | LowRankSum) -> float:
    """The Frobenius norm of a precision of inputs."""
    return (
        precision.norm() if isinstance(precision, LowRankSum) else float(np.linalg.norm(precision))
    )


def is_positive(matrix: Matrix, size: float) -> bool:
    """Whether a symmetric matrix has no negative eigenvalue, up to rounding.

    Args:
        matrix: The matrix.
        size: Norm of the matrices that it was made of.
    """
    try:
        np.linalg.cholesky(matrix + ROUNDING * size * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return False
    return True


def magnitude(matrix: Precision) -> Precision:
    """A precision with its eigenvalues replaced by their magnitudes."""
    if not isinstance(matrix, np.ndarray):
        return matrix.magnitude()
    size = float(np.linalg.norm(matrix))
    if is_positive(matrix, size):
        return matrix
    if is_positive(-matrix, size):
        return -matrix
    return with_magnitudes(matrix)


def bounded_below(exact: Precision, bound: Precision, share: float) -> Precision | Spectrum:
    """A precision whose eigenvalues are at least a share of those of a bound.

    In the basis where the bound is the identity and the precision diagonal, `max(value, share)`:
    what the guard on removal does entry by entry, for directions.

    Args:
        exact: The precision, symmetric, perhaps with negative eigenvalues.
        bound: Positive definite.
        share: rho, in (0, 1].

    Raises:
        ArithmeticError: As `bounded_below` of `KroneckerSum` and `LowRankSum`.
    """
    if not isinstance(exact, np.ndarray):
        return exact.bounded_below(bound, share)
    if is_positive(exact - share * bound, float(np.linalg.norm(bound))):
        return exact
    root = np.linalg.cholesky(bound)
    values, vectors = np.linalg.eigh(_between(root, exact))
    factors = root @ vectors
    result: Matrix = (factors * np.maximum(values, share)) @ factors.T
    return result


def ratios(matrix: Matrix, precision: Matrix) -> Matrix:
    """The eigenvalues of a symmetric matrix where a precision is the identity, ascending."""
    values: Matrix = np.linalg.eigvalsh(_between(np.linalg.cholesky(precision), matrix))
    return values


def _between(root: Matrix, matrix: Matrix) -> Matrix:
    """`root^-1 matrix root^-T`."""
    half = np.linalg.solve(root, matrix)
    result: Matrix = np.linalg.solve(root, half.T)
    return (result + result.T) / 2
