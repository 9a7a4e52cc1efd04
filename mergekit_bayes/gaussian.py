"""Diagonal-Gaussian arithmetic in plain operators.

Everything here is elementwise and works alike on floats, numpy arrays and torch tensors. Units:
a mean is a weight, a precision is 1/weight^2 on the scale of the summed loss. The equations are those
of uncertainty-based gradient matching (Daheim et al., ICLR 2024), written for one entry.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Added once to the base's precision (without a base: to every precision), so that an entry whose
# curvature is zero everywhere falls back to task arithmetic instead of 0/0. Underflows in float16.
DELTA_0 = 1e-12


class Gaussian(NamedTuple):
    """A diagonal Gaussian: floats or arrays of one shape."""

    mean: Any  # weight
    precision: Any  # 1/weight^2, >= 0


def select(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`: a branch for floats, arrays and the compiled pass alike."""
    return np.where(condition, yes, no)


def constant(value: float, like: Any) -> Any:
    """A number of the kind of `like`: a bare literal would be float64 in the compiled pass, whatever the entries."""
    return value + (like - like)


def to_natural(g: Gaussian) -> tuple[Any, Any]:
    """Natural parameters `(S m, -S/2)`, in which Bayes' rule is a sum."""
    return g.precision * g.mean, -0.5 * g.precision


def from_natural(natural: tuple[Any, Any]) -> Gaussian:
    """The Gaussian with natural parameters `(S m, -S/2)`; the inverse of `to_natural`."""
    precision = -2.0 * natural[1]
    return Gaussian(natural[0] / precision, precision)


def rebase(base: Gaussian, mean: Any, likelihood: Any, anchor: Any, decay: Any) -> Gaussian:
    """The posterior that a task's data would give with the base posterior as prior.

        precision = S0 + H
        mean      = m0 + ((H + P) (m - m0) + d m) / (S0 + H)

    This puts the general anchor of the derivation into the published form, whose numerator is
    `S_t (m_t - m0)`: stationarity of the task's own training says what its gradient was.

    Args:
        base: The base posterior, precision > 0.
        mean: Where the task's training ended.
        likelihood: H, what the task's data added, 1/weight^2.
        anchor: P, the precision of the pull to the base in that training. The published choice
            P = S0 gives back `mean` itself; callers then skip this function's arithmetic.
        decay: d, the precision of a pull to zero; 0 if none.
    """
    precision = base.precision + likelihood
    pull = (likelihood + anchor) * (mean - base.mean) + decay * mean
    return Gaussian(base.mean + pull / precision, precision)


def is_bad_mean(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries are no mean: infinite, or not a number."""
    bad: NDArray[np.bool_] = ~np.isfinite(values)
    return bad


def is_bad_precision(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which entries are no precision: negative, infinite, or not a number. Zero is a precision."""
    bad: NDArray[np.bool_] = ~(np.isfinite(values) & (values >= 0))
    return bad
