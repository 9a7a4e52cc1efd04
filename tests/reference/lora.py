"""Products of Gaussian factors and their merges, entry by entry in float64, from moments."""

import numpy as np


def change(a, b, scaling):
    """s B A by the definition of a matrix product."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return scaling * np.einsum("ik,kj->ij", b, a)


def variance(a, b, variance_a, variance_b, scaling):
    """Var[s sum_k B_ik A_kj] = s^2 sum_k (E[B^2] E[A^2] - E[B]^2 E[A]^2), factors independent."""
    a, b, va, vb = (np.asarray(x, np.float64) for x in (a, b, variance_a, variance_b))
    moments = np.einsum("ik,kj->ij", b**2 + vb, a**2 + va)
    return scaling**2 * (moments - np.einsum("ik,kj->ij", b**2, a**2))


def weighted(changes, precisions, scales):
    """sum_t c_t S_t dW_t / sum_t c_t S_t per entry."""
    total = sum(c * s for c, s in zip(scales, precisions, strict=True))
    return sum(c * s * d for c, s, d in zip(scales, precisions, changes, strict=True)) / total


def lost(matrix, rank):
    """Relative Frobenius error of the best matrix of a rank: the singular values beyond it."""
    sigma = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))
