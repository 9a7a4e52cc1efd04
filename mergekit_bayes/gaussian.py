"""Diagonal-Gaussian arithmetic in plain operators.

Everything here is elementwise and works alike on floats, numpy arrays and inside numba. Units: a
mean is a weight, a precision is 1/weight^2 on the scale of the summed loss. The equations are those
of uncertainty-based gradient matching (Daheim et al., ICLR 2024), written for one entry.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

# Added once to the base's precision (without a base: to every precision), so that an entry whose
# curvature is zero everywhere falls back to task arithmetic instead of 0/0. Underflows in float16.
DELTA_0 = 1e-12

Number: TypeAlias = Any  # a float, an array, or a number inside numba: all take the same operators


class Gaussian(NamedTuple):
    """A diagonal Gaussian: floats or arrays of one shape.

    Attributes:
        mean: In units of the weights.
        precision: Inverse variance, 1/weight^2, >= 0.
    """

    mean: Number
    precision: Number


def select(condition: Number, yes: Number, no: Number) -> Number:
    """`yes` where the condition holds, else `no`: a branch that arrays and numba understand."""
    return np.where(condition, yes, no)


def constant(value: float, like: Number) -> Number:
    """`value` in the dtype of `like`. In numba, a bare literal would widen float32 to float64."""
    return value + (like - like)


def to_natural(g: Gaussian) -> tuple[Number, Number]:
    """Natural parameters `(S m, -S/2)`, in which Bayes' rule is a sum."""
    return g.precision * g.mean, -0.5 * g.precision


def from_natural(natural: tuple[Number, Number]) -> Gaussian:
    """The Gaussian with natural parameters `(S m, -S/2)`; the inverse of `to_natural`."""
    precision = -2.0 * natural[1]
    return Gaussian(natural[0] / precision, precision)


def rebase(
    base: Gaussian, mean: Number, likelihood: Number, anchor: Number, decay: Number
) -> Gaussian:
    """The posterior that a task's data would give with the base posterior as prior.

        precision = S0 + H
        mean      = m0 + ((H + P) (m - m0) + d m) / (S0 + H)

    The published form has the numerator `S_t (m_t - m0)`, which assumes P = S0. The general form
    follows from the task's stationarity: at its end, the gradient of its data cancels its pulls.

    Args:
        base: The base posterior, precision > 0.
        mean: Where the task's training ended.
        likelihood: H, what the task's data added, 1/weight^2.
        anchor: P, the precision of the pull to the base in that training. The published choice
            P = S0 gives back `mean` itself; callers then skip this function's arithmetic.
        decay: d, the precision of a pull to zero; 0 if none.
    """
    precision = base.precision + likelihood
    moved = (likelihood + anchor) * (mean - base.mean) + decay * mean
    return Gaussian(base.mean + moved / precision, precision)
