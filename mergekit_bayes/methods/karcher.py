"""The mean of models on the sphere (Karcher, 1977)."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import cosines_of, norm_of_sum, norms_of, weighted_sum
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor

_SMALL = 1e-6  # of a sine, below which two models are alike or opposite up to rounding
_CANCELLED = 1e-7  # of the mean of unit vectors, below which its direction is rounding


def karcher(tensors: Tensors) -> Array:
    """Take the direction that is nearest to all models' on the sphere, at their mean length.

        u_t  = m_t / |m_t|
        u    = argmin_{|u| = 1} sum_t w_t angle(u, u_t)^2
        mean = u sum_t w_t |m_t| / sum_t w_t

    It is found by `u <- exp_u(sum_t w_t log_u(u_t))`, from the mean of the u_t on, until such a
    step is shorter than `tol` (an angle in radians) or `max_iter` of them are made:

        log_u(v) = (v - cos(a) u) a / sin(a),  cos(a) = <u, v>
        exp_u(d) = cos(|d|) u + sin(|d|) d / |d|

    All u are sums of the models, so that the steps are made in coefficients and need nothing but
    the models' products.

    Source: Karcher, "Riemannian center of mass", 1977; for models Wang, Ye and Yin, 2026
    (2603.04972) and mergekit's documentation, which have equal weights. Which length the mean gets
    is mergekit's choice. Where the mean of the u_t is shorter than `tol` the first is the start; a
    model opposite to u, to which no arc is the shortest, makes no step. A model of zeros has no
    direction, and counts in the length alone. mergekit takes any tensor of a norm below `tol` for
    zeros, and writes zeros where all are; here each has its direction.

    Args:
        tensors: Any number of tasks, without a base; weights >= 0, of positive sum.

    Raises:
        ArithmeticError: A negative weight, or no positive one.
    """
    assert tensors.products is not None
    weights = np.array(tensors.weights, np.float64)
    if (weights < 0).any() or not weights.any():
        raise ArithmeticError(
            "a mean on the sphere has weights of zero or more, and one above zero at least"
        )
    weights = weights / weights.sum()
    norms = norms_of(tensors.products)
    voting = (norms > 0) & (weights > 0)
    coefficients = np.zeros_like(norms)
    if voting.any():
        shares = weights[voting] / weights[voting].sum()
        cosines = cosines_of(tensors.products)[np.ix_(voting, voting)]
        steps, tolerance = int(tensors.number("max_iter")), tensors.number("tol")
        mean = _mean(cosines, shares, steps, tolerance)
        coefficients[voting] = mean * (weights @ norms) / norms[voting]
    return weighted_sum(tensors.tasks, list(coefficients))


def _mean(cosines: Array, weights: Array, steps: int, tolerance: float) -> Array:
    """The coefficients, over unit vectors, of their mean on the sphere."""
    mean = weights
    if norm_of_sum(cosines, mean) < max(tolerance, _CANCELLED):
        mean = np.eye(len(weights))[0]
    mean = mean / norm_of_sum(cosines, mean)
    for _ in range(steps):
        projected = np.clip(cosines @ mean, -1.0, 1.0)
        sines = np.sqrt(1 - projected**2)
        is_on_line = sines <= _SMALL
        ratios = np.arccos(projected) / np.where(is_on_line, 1.0, sines)
        pulls = weights * np.where(is_on_line, projected > 0, ratios)
        step = pulls - (pulls @ projected) * mean
        size = norm_of_sum(cosines, step)
        if size < tolerance or size == 0:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / norm_of_sum(cosines, mean)
    return np.asarray(mean)


KARCHER = Method(
    "karcher",
    by_tensor,
    needs_base=False,
    needs_precision=False,
    summary="The mean of models on the sphere, at their mean length "
    "(Karcher, 1977; for models Wang et al., 2026).",
    example="bmerge merge A B C --method karcher",
    formula="m = u sum_t w_t |m_t| / sum_t w_t,  u = argmin sum_t w_t angle(u, m_t)^2, |u| = 1",
    parameters=(
        Parameter("max_iter", 10, "the most steps that are made", 0, 1_000_000),
        Parameter("tol", 1e-5, "the step at which no further one is made, in radians", 0),
    ),
    reads_weights=True,
    tensor=TensorRule(karcher, "products"),
)
