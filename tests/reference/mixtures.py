"""Merges of mixtures by expectation-maximisation, written from its equations in float64.

A mixture is a list of `(weight, mean, precision)` of one tensor, and a task that is one Gaussian is
a mixture of one. The weights of a mixture sum to one.
"""

import math

import numpy as np


def log_density(theta, mean, precision):
    """Of a Gaussian with this precision, by entry, but for the constant of its dimension."""
    total = 0.0
    for x, m, s in zip(theta.ravel(), mean.ravel(), precision.ravel(), strict=True):
        total += 0.5 * math.log(s) - 0.5 * s * (x - m) ** 2
    return total


def responsibilities(theta, mixture):
    """The share of each component in the density of the mixture at theta."""
    logs = [math.log(w) + log_density(theta, m, s) for w, m, s in mixture]
    total = max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs))
    return [math.exp(x - total) for x in logs]


def objective(theta, base, mixtures, scales):
    """`(1 - sum_t a_t) log q_0(theta) + sum_t a_t log q_t(theta)`, which the iteration raises."""
    total = (1 - sum(scales)) * log_density(theta, *base)
    for scale, mixture in zip(scales, mixtures, strict=True):
        logs = [math.log(w) + log_density(theta, m, s) for w, m, s in mixture]
        total += scale * (max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs)))
    return total


def merged(base, mixtures, scales, shares):
    """Gradient matching of all components, each with its share of the scale of its task."""
    m0, s0 = base
    precision, pull = s0.copy(), np.zeros_like(m0)
    for scale, mixture, share in zip(scales, mixtures, shares, strict=True):
        for r, (_, mean, s) in zip(share, mixture, strict=True):
            precision += scale * r * (s - s0)
            pull += scale * r * s * (mean - m0)
    return m0 + pull / precision, precision


def iterated(base, mixtures, scales, rounds):
    """Mean, precision and responsibilities after each round, that of shares pi first."""
    shares = [[w for w, _, _ in mixture] for mixture in mixtures]
    found = [(*merged(base, mixtures, scales, shares), shares)]
    for _ in range(rounds):
        theta = found[-1][0]
        shares = [responsibilities(theta, mixture) for mixture in mixtures]
        found.append((*merged(base, mixtures, scales, shares), shares))
    return found
