"""TIES' election of signs (Yadav et al., NeurIPS 2023), which DARE-TIES shares."""

from collections.abc import Callable
from typing import TypeVar

from mergekit_bayes.gaussian import Gaussian, Number, constant, select
from mergekit_bayes.methods.base import Scales, Tasks

F = TypeVar("F")


def elect(
    base: Gaussian,
    tasks: Tasks,
    scales: Scales,
    change: Callable[[Gaussian, Tasks, F, int], tuple[Number, Number]],
    facts: F,
) -> Gaussian:
    """Add the mean of those changes that agree in sign with the sum of all.

        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    Signs are elected by the unweighted sum, as published. A task of scale zero has no vote.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless.
        change: `(base, tasks, facts, t) -> (d_t, whether task t votes)`; a task that does not
            vote changes nothing.
        facts: Passed on to `change`.
    """
    zero, one = constant(0, base.mean), constant(1, base.mean)
    total, merged, count = zero, zero, zero
    for t in range(len(tasks)):
        delta, votes = change(base, tasks, facts, t)
        total = total + select(votes & (scales[t] != 0), delta, zero)
    for t in range(len(tasks)):
        delta, votes = change(base, tasks, facts, t)
        # Not by the sign of a product: it would underflow where both are tiny.
        same_sign = ((delta > zero) & (total > zero)) | ((delta < zero) & (total < zero))
        agrees = votes & (scales[t] != 0) & same_sign
        merged = merged + select(agrees, scales[t] * delta, zero)
        count = count + select(agrees, one, zero)
    return Gaussian(base.mean + merged / select(count > zero, count, one), base.precision)
