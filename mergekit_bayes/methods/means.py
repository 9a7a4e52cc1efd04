"""Means over the tasks, entry by entry: what rules for matrices take of all other tensors, too."""

from mergekit_bayes.gaussian import Gaussian, constant, select
from mergekit_bayes.methods.base import Facts, Scales, Tasks


def weighted_mean(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: Facts) -> Gaussian:
    """Average the means; all precisions count as equal.

        mean = sum_t scale_t m_t / sum_t scale_t

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless, of positive sum.
        facts: Not needed.
    """
    total = scales[0]
    for i in range(1, len(scales)):
        total = total + scales[i]
    mean = tasks[0].mean
    for i in range(1, len(tasks)):
        mean = mean + (scales[i] / total) * (tasks[i].mean - tasks[0].mean)
    return Gaussian(mean, tasks[0].precision)


def mean_change(base: Gaussian, tasks: Tasks, scales: Scales, facts: Facts) -> Gaussian:
    """Add the mean of the scaled task vectors.

        mean = m0 + sum_t scale_t (m_t - m0) / #(scales other than zero)

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless; a task of scale zero does not count.
        facts: Not needed.
    """
    zero, one = constant(0, base.mean), constant(1, base.mean)
    total, count = zero, zero
    for t in range(len(tasks)):
        total = total + scales[t] * (tasks[t].mean - base.mean)
        count = count + select(scales[t] != 0, one, zero)
    return Gaussian(base.mean + total / select(count > zero, count, one), base.precision)
