"""Merging with whole matrices, in float64: what the diagonal, streamed merge must agree with."""

import numpy as np


def minimiser(curvatures, centres):
    """argmin of sum_k 0.5 (x - c_k)' A_k (x - c_k)."""
    total = sum(np.asarray(a, float) for a in curvatures)
    pairs = zip(curvatures, centres, strict=True)
    return np.linalg.solve(
        total, sum(np.asarray(a, float) @ np.asarray(c, float) for a, c in pairs)
    )


def gradient_matching(h0, m0, tasks, scales):
    """theta0 + Hbar^-1 sum_t scale_t H_{0+t} (theta_t - theta0); tasks are (H_t, theta_t)."""
    h0, m0 = np.asarray(h0, float), np.asarray(m0, float)
    hbar = h0 + sum(s * np.asarray(h, float) for s, (h, _) in zip(scales, tasks, strict=True))
    moved = sum(
        s * (h0 + np.asarray(h, float)) @ (np.asarray(m, float) - m0)
        for s, (h, m) in zip(scales, tasks, strict=True)
    )
    return m0 + np.linalg.solve(hbar, moved), hbar


def natural_sum(base, tasks, scales):
    """The same merge in natural parameters, (S, S m) per posterior, for diagonal precisions."""
    s0, m0 = (np.asarray(x, np.float64) for x in base)
    precision, product = s0.copy(), s0 * m0
    for scale, (s, m) in zip(scales, tasks, strict=True):
        s, m = np.asarray(s, np.float64), np.asarray(m, np.float64)
        precision = precision + scale * (s - s0)
        product = product + scale * (s * m - s0 * m0)
    return product / precision, precision
