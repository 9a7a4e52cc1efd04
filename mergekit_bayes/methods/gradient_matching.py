"""Uncertainty-based gradient matching: task arithmetic in natural parameters.

Daheim et al., Model Merging by Uncertainty-Based Gradient Matching, ICLR 2024.
"""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.gaussian import Gaussian, Number, constant
from mergekit_bayes.methods.base import FactInputs, Method, Scales, Tasks
from mergekit_bayes.methods.matrices import bounded_below, divided, magnitude


class Removal(NamedTuple):
    """How a removal is bounded.

    Attributes:
        guard: rho, in (0, 1]: one task moves the mean by at most `max(scale, 1 / rho)` times its
            task vector, for |scale| <= 1.
    """

    guard: float


def gradient_matching(base: Gaussian, tasks: Tasks, scales: Scales, facts: Removal) -> Gaussian:
    """Add each task's change in natural parameters to the base.

        exact     = S0 + sum_t scale_t (S_t - S0)
        precision = max(exact, guard (S0 + sum_t |scale_t (S_t - S0)|))
        mean      = m0 + sum_t scale_t S_t (m_t - m0) / precision

    Exact for quadratic losses. Removal can make the exact precision small or negative, which would
    amplify the edit without bound or flip its sign; the guard acts there.

    Args:
        base: Shared prior; floats or arrays of one shape, precision in 1/weight^2, > 0.
        tasks: Posteriors trained from `base` or re-based to it, same shape.
        scales: One per task, dimensionless; negative removes the task.
        facts: The guard.
    """
    precision, bound = base.precision, base.precision
    weighted = constant(0, base.mean)  # sum_t scale_t S_t (m_t - m0)
    for i in range(len(tasks)):
        gain = scaled_gain(base, tasks[i], scales[i])
        precision, bound = precision + gain, bound + abs(gain)
        weighted = weighted + scales[i] * tasks[i].precision * (tasks[i].mean - base.mean)
    precision = np.maximum(precision, facts.guard * bound)
    return Gaussian(base.mean + weighted / precision, precision)


def for_matrices(base: Gaussian, tasks: Tasks, scales: Scales, facts: Removal) -> Gaussian:
    """The same with a precision matrix of a layer's inputs in place of numbers.

        exact     = S0 + sum_t scale_t (S_t - S0)
        precision = exact, its eigenvalues at least guard (S0 + sum_t |scale_t (S_t - S0)|)
        mean      = m0 + (sum_t scale_t (m_t - m0) S_t) precision^-1

    With S_t - S0 = N E[x x'] over the layer's inputs x, no base precision and scales that sum to
    one it is RegMean (Jin et al., ICLR 2023).

    Args:
        base: Shared prior: mean (outputs, inputs), precision (inputs, inputs), positive definite,
            or a sum of Kronecker products.
        tasks: Posteriors trained from `base` or re-based to it.
        scales: One per task, dimensionless; negative removes the task.
        facts: The guard.
    """
    exact, bound = base.precision, base.precision
    weighted = np.zeros_like(base.mean)
    for task, scale in zip(tasks, scales, strict=True):
        gain = scaled_gain(base, task, scale)
        exact, bound = exact + gain, bound + magnitude(gain)
        weighted += scale * (task.mean - base.mean) @ task.precision
    precision = bounded_below(exact, bound, facts.guard)
    return Gaussian(base.mean + divided(weighted, precision), precision)


def scaled_gain(base: Gaussian, task: Gaussian, scale: Number) -> Number:
    """`scale (S_t - S0)`: what one task adds to the precision."""
    return scale * (task.precision - base.precision)


def unguarded_precision(base: Gaussian, tasks: Tasks, scales: Scales) -> Number:
    """`S0 + sum_t scale_t (S_t - S0)`, which a removal can make negative."""
    precision = base.precision
    for i in range(len(tasks)):
        precision = precision + scaled_gain(base, tasks[i], scales[i])
    return precision


def _removal(inputs: FactInputs) -> Removal:
    return Removal(inputs.guard)


GRADIENT_MATCHING = Method(
    "gradient_matching",
    gradient_matching,
    needs_base=True,
    needs_precision=True,
    summary="Task arithmetic in natural parameters: each change by its precision "
    "(Daheim et al., ICLR 2024).",
    example="bmerge merge A B --base BASE --weights precision",
    formula="m = m0 + sum_t scale_t S_t (m_t - m0) / S,  S = S0 + sum_t scale_t (S_t - S0)",
    facts=_removal,
    unguarded_precision=unguarded_precision,
    is_posterior=True,
    can_be_undone=True,
    matrix=for_matrices,
)
