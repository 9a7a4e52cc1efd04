"""Uncertainty-based gradient matching (Daheim et al., ICLR 2024): task arithmetic in natural parameters."""

import numpy as np

from mergekit_bayes.gaussian import Gaussian, constant
from mergekit_bayes.methods.base import Method


def gradient_matching(
    base: Gaussian, tasks: tuple[Gaussian, ...], scales: tuple[float, ...], facts: tuple[float, ...]
) -> Gaussian:
    """Add each task's change in natural parameters to the base.

        precision = S0 + sum_t scale_t (S_t - S0),  guarded from below on removal
        mean      = m0 + sum_t scale_t S_t (m_t - m0) / precision

    Exact for quadratic losses. Removal can make the exact precision small or negative, which would amplify
    the edit without bound or flip its sign; the guard bounds how far one task moves the mean by
    `max(scale, 1 / guard)` times its task vector, for |scale| <= 1.

    Args:
        base: Shared prior; floats or arrays of one shape, precision in 1/weight^2, > 0.
        tasks: Posteriors trained from `base` or re-based to it, same shape.
        scales: One per task, dimensionless; negative removes the task.
        facts: The guard alone: keeps precision >= guard * (S0 + sum_t |scale_t (S_t - S0)|), 0 < guard <= 1.
    """
    precision, bound = base.precision, base.precision
    pull = constant(0, base.mean)
    for i in range(len(tasks)):
        gain = tasks[i].precision - base.precision
        precision = precision + scales[i] * gain
        bound = bound + abs(scales[i] * gain)
        pull = pull + scales[i] * tasks[i].precision * (tasks[i].mean - base.mean)
    precision = np.maximum(precision, facts[0] * bound)
    return Gaussian(base.mean + pull / precision, precision)


GRADIENT_MATCHING = Method(
    "gradient_matching",
    gradient_matching,
    needs_base=True,
    needs_precision=True,
    summary="Task arithmetic in natural parameters: each change by its precision (Daheim et al., ICLR 2024).",
    example="bmerge merge A B --base BASE --weights precision",
    is_posterior=True,
)
