"""The nearest matrix of a given rank, as the two factors of an adapter (Eckart and Young, 1936).

    W ~ B A,  B = U_R sqrt(sigma_R),  A = sqrt(sigma_R) V_R'

Small matrices and sums of adapters are truncated exactly, by LAPACK's SVD. Large dense ones go
through a block Krylov method (Musco and Musco, *Randomized block Krylov methods for stronger and
faster approximate singular value decomposition*, NeurIPS 2015), with a seed. The relative error is
always measured on the factors as they are stored.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.lora.bases import Basis, orthonormal
from mergekit_bayes.lora.layers import Factors

_DENSE = 512  # rows or columns up to which LAPACK's SVD is fast
_POWERS = 4  # blocks of the Krylov space beyond the first
_OVERSAMPLING = 8  # columns of a block beyond the rank
_BEYOND = (
    "the change of a layer is beyond float32. Look at lora_alpha in adapter_config.json, at "
    "--scale, and at the values of the factors."
)


class Truncated(NamedTuple):
    """Float32 factors of some rank (zeros beyond the matrix's own), and what they lack."""

    factors: Factors
    error: float  # ||W - B A||_F / ||W||_F, 0 for a zero matrix
    norm: float  # ||W||_F


def truncate_product(left: Array, right: Array, rank: int) -> Truncated:
    """The best approximation of `left right` by factors of a given rank.

    It is the SVD of the product's k x k core, in float64; exact for `rank >= k`.
    What it costs grows with d k^2 for both sizes d, and no d x d matrix is formed.

    Args:
        left: Shape (d_out, k).
        right: Shape (k, d_in).
        rank: Rank of the result.

    Raises:
        CheckpointError: The product is beyond float32.
    """
    return truncate_core(*_in_bases(left, right), rank)


def _in_bases(left: Array, right: Array) -> tuple[Basis, Array, Basis]:
    """A product `left right` as `U core V'`.

    Raises:
        CheckpointError: An entry is not finite.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise CheckpointError(_BEYOND)
    columns, rows = orthonormal(left), orthonormal(right.T)
    return columns.basis, columns.inner @ rows.inner.T, rows.basis


def truncate_core(left: Basis, core: Array, right: Basis, rank: int) -> Truncated:
    """The best approximation of `U core V'` by factors of a given rank.

    Args:
        left: U, (d_out, k).
        core: (k, l), float64.
        right: V, (d_in, l).
        rank: Rank of the result.

    Raises:
        CheckpointError: The core is beyond float32.
    """
    u, sigma, v = _svd(core)
    used = min(rank, sigma.size)
    root = np.sqrt(sigma[:used])
    exact_b, exact_a = left.times(u[:, :used] * root), right.times(v[:used].T * root)
    a, b = np.zeros((rank, len(exact_a)), np.float32), np.zeros((len(exact_b), rank), np.float32)
    b[:, :used], a[:used] = exact_b, exact_a.T
    # What is cut off is orthogonal to what the rounding to float32 moves,
    # b a - (b + e)(a + f) = -(e (a + f) + b f).
    rounding = _thin_norm(
        np.concatenate([b[:, :used] - exact_b, exact_b], axis=1),
        np.concatenate([a[:used].T, a[:used].T - exact_a], axis=1),
    )
    norm = float(np.linalg.norm(sigma))
    lacking = math.hypot(float(np.linalg.norm(sigma[used:])), rounding)
    return Truncated(Factors(a, b), lacking / norm if norm else 0.0, norm)


def _measured(left: Basis, core: Array, right: Basis, factors: Factors, used: int) -> Truncated:
    """Factors with what they lack of `U core V'`; `used` of them are not zeros.

    The error is that of four orthogonal parts, by whether columns and rows lie in the bases, none
    of which needs more than thin products with them.
    """
    norm = float(np.linalg.norm(core))
    b, a = factors.b[:, :used].astype(np.float64), factors.a[:used].T.astype(np.float64)
    b_inside, a_inside = left.inside(b), right.inside(a)
    b_outside, a_outside = b - left.times(b_inside), a - right.times(a_inside)
    lacking = math.hypot(
        float(np.linalg.norm(core - b_inside @ a_inside.T)),
        _thin_norm(b_inside, a_outside),
        _thin_norm(b_outside, a_inside),
        _thin_norm(b_outside, a_outside),
    )
    return Truncated(factors, lacking / norm if norm else 0.0, norm)


def _svd(matrix: Array) -> tuple[Array, Array, Array]:
    """The thin SVD of a float64 matrix.

    Raises:
        CheckpointError: The matrix is beyond float32, in which its factors are stored.
    """
    if np.isfinite(matrix).all():
        u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
        if not sigma.size or sigma[0] <= np.finfo(np.float32).max:
            return u, sigma, v
    raise CheckpointError(_BEYOND)


def truncate_dense(matrix: Array, rank: int, seed: int = 0) -> Truncated:
    """The best approximation of a matrix by factors of a given rank; near the best if it is large.

    Args:
        matrix: float32, shape (d_out, d_in).
        rank: Rank of the result.
        seed: Seed of the Krylov method's first block.

    Raises:
        CheckpointError: The matrix is beyond float32.
    """
    u, sigma, v = leading_directions(matrix, rank, seed)
    return _measured_densely(_factors(u, sigma, v, rank), matrix)


def leading_directions(matrix: Array, rank: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """The largest singular values of a matrix and their directions; near them if it is large.

    Args:
        matrix: float32 or float64, shape (d_out, d_in).
        rank: How many are needed. There are more of them, which are further from the true ones.
        seed: Seed of the Krylov method's first block.

    Returns:
        U (d_out, k), the singular values (k,) in descending order, and V' (k, d_in).

    Raises:
        CheckpointError: The matrix is beyond float32.
    """
    width = (_POWERS + 1) * (rank + _OVERSAMPLING)
    if min(matrix.shape) <= max(_DENSE, width):
        return _svd(matrix.astype(np.float64))
    q = _krylov(matrix, rank + _OVERSAMPLING, np.random.default_rng(seed))
    u, sigma, v = _svd((q.T @ matrix).astype(np.float64))
    return q @ u, sigma, v


def _thin_norm(left: Array, right: Array) -> float:
    """Frobenius norm of `left right`, (d_out, k) times (k, d_in), to 1e-8 of that of each.

    |b a|^2 = tr(b' b a a') = sum_ij (b' b)_ij (a a')_ij
    """
    squared = float(np.vdot(left.T @ left, right.T @ right))
    return math.sqrt(max(squared, 0.0))


def as_stored(factors: Factors, rank: int, left: Array, right: Array) -> Truncated:
    """Factors as they are stored: float32, padded with zeros to a rank.

    Args:
        factors: float64 factors of at most that rank.
        rank: Rank of the result.
        left: With `right`, the change `left right` against which the error is measured.
        right: See `left`.
    """
    a, b = np.zeros((rank, right.shape[1]), np.float32), np.zeros((left.shape[0], rank), np.float32)
    used = len(factors.a)
    a[:used], b[:, :used] = factors.a, factors.b
    columns, core, rows = _in_bases(left, right)
    return _measured(columns, core, rows, Factors(a, b), used)


def as_stored_dense(factors: Factors, rank: int, matrix: Array) -> Truncated:
    """Factors as they are stored, as `as_stored`, with a dense matrix to measure the error against.

    Args:
        factors: Factors of at most that rank.
        rank: Rank of the result.
        matrix: float32, shape (d_out, d_in).

    Raises:
        CheckpointError: The factors or the matrix are beyond float32.
    """
    b, a = factors.b.astype(np.float32), factors.a.astype(np.float32)
    if not all(np.isfinite(values).all() for values in (b, a, matrix)):
        raise CheckpointError(_BEYOND)
    used = len(a)
    stored = Factors(np.pad(a, ((0, rank - used), (0, 0))), np.pad(b, ((0, 0), (0, rank - used))))
    return _measured_densely(stored, matrix)


def _measured_densely(factors: Factors, matrix: Array) -> Truncated:
    norm = float(np.linalg.norm(matrix))
    lacking = np.hypot.reduce(
        [np.linalg.norm(rows - b @ factors.a) for rows, b in _blocks(matrix, factors.b)]
    )
    return Truncated(factors, float(lacking) / norm if norm else 0.0, norm)


def _blocks(matrix: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Yield some rows at a time, so that a large matrix is not in memory twice."""
    for start in range(0, len(matrix), _DENSE):
        yield matrix[start : start + _DENSE], b[start : start + _DENSE]


def _krylov(matrix: Array, width: int, rng: np.random.Generator) -> Array:
    """An orthonormal basis of [M G, (M M') M G, ...], near the leading left singular vectors."""
    block = matrix @ rng.standard_normal((matrix.shape[1], width)).astype(np.float32)
    blocks = []
    for _ in range(_POWERS + 1):
        block = np.linalg.qr(block)[0]
        blocks.append(block)
        block = matrix @ (matrix.T @ block)
    return np.linalg.qr(np.concatenate(blocks, 1))[0]


def _factors(u: Array, sigma: Array, v: Array, rank: int) -> Factors:
    root, used = np.sqrt(sigma[:rank]), min(rank, sigma.size)
    a, b = np.zeros((rank, v.shape[1]), np.float32), np.zeros((u.shape[0], rank), np.float32)
    b[:, :used], a[:used] = u[:, :used] * root, root[:, None] * v[:used]
    return Factors(a, b)
