"""Improve a weighted low-rank approximation by alternating least squares.

With one precision for each entry, `min 1/2 sum_ij S_ij (D - F G)_ij^2` has no closed solution
(Srebro and Jaakkola, *Weighted low-rank approximations*, ICML 2003). With G fixed, each row of F is
the solution of a k x k system, and with F fixed each column of G:

    (G diag(S_i) G') f_i = G (S_i * D_i)

Each half of a sweep solves its problem exactly, so that the loss cannot rise but for rounding; it
is measured all the same, and a sweep that does not lower it is not kept.
"""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.extract.weighting import entry_loss

_GAIN = 1e-3  # relative decrease of the loss below which sweeping ends
_RIDGE = 1e-7  # of the mean diagonal, so that rows without a precision have a solution
_LEAST = 1e-15  # of a mean precision times a change, with which float32 sums are safe
_NUMBERS = 1 << 22  # of a block of systems, or of products of factors


class Swept(NamedTuple):
    """An improved approximation.

    Attributes:
        left: F, shape (p, k).
        right: G, shape (k, q).
        loss: Its loss.
        sweeps: How many sweeps were kept.
    """

    left: Array
    right: Array
    loss: float
    sweeps: int


def sweep(change: Array, precision: Array, left: Array, right: Array, most: int) -> Swept:
    """Improve an approximation until it stops getting better.

    Args:
        change: D, shape (p, q).
        precision: S, shape (p, q), above zero.
        left: F, shape (p, k).
        right: G, shape (k, q).
        most: Largest number of sweeps.

    Returns:
        An approximation whose loss is not above that of the given one.
    """
    best = Swept(left, right, entry_loss(precision, change - left @ right), 0)
    mean = float(precision.mean(dtype=np.float64))
    size = float(np.abs(change).max(initial=0.0)) or 1.0
    weights = precision
    if not _LEAST < mean * size < 1 / _LEAST:  # sums in float32 shall not overflow or vanish
        weights = precision / precision.dtype.type(mean)
    for number in range(1, most + 1):
        basis = _orthonormal(best.right)
        rows = _solve_rows(change, weights, basis)
        basis = _orthonormal(rows.T)
        columns = _solve_rows(change.T, weights.T, basis)
        new_left, new_right = basis.T, np.ascontiguousarray(columns.T)
        loss = entry_loss(precision, change - new_left @ new_right)
        if not loss < best.loss:
            break
        gained = best.loss - loss > _GAIN * best.loss
        best = Swept(new_left, new_right, loss, number)
        if not gained:
            break
    return best


def _orthonormal(rows: Array) -> Array:
    """An orthonormal basis of the space of some rows, (k, q), which keeps systems well-posed."""
    basis: Array = np.linalg.qr(rows.T.astype(np.float64))[0].T
    return np.ascontiguousarray(basis, rows.dtype)


def _solve_rows(change: Array, precision: Array, basis: Array) -> Array:
    """The weighted least-squares fit of each row of D by rows of a basis: (p, k)."""
    k, q = basis.shape
    upper = np.triu_indices(k)
    rows_at_once = max(1, _NUMBERS // max(k * k, q))
    columns_at_once = max(1, _NUMBERS // len(upper[0]))
    result = np.empty((len(change), k), basis.dtype)
    for start in range(0, len(change), rows_at_once):
        rows = slice(start, start + rows_at_once)
        weighed = np.asarray(precision[rows] * change[rows])
        sides = (weighed @ basis.T).astype(np.float64)
        packed = np.zeros((len(sides), len(upper[0])))
        for first in range(0, q, columns_at_once):
            columns = slice(first, first + columns_at_once)
            products = basis[upper[0], columns] * basis[upper[1], columns]
            packed += precision[rows, columns] @ products.T
        systems = np.empty((len(sides), k, k))
        systems[:, upper[0], upper[1]] = systems[:, upper[1], upper[0]] = packed
        diagonal = np.arange(k)
        ridge = _RIDGE * np.trace(systems, axis1=1, axis2=2) / k
        systems[:, diagonal, diagonal] += ridge[:, None]
        result[rows] = np.linalg.solve(systems, sides[:, :, None])[:, :, 0]
    return result
