"""The weighted average of checkpoints, also known as model soup (Wortsman et al., ICML 2022)."""

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method


def average(base: Gaussian | None, tasks: tuple[Gaussian, ...], scales: tuple[float, ...], guard: float) -> Gaussian:
    """Average the means; all precisions count as equal.

        mean = sum_t scale_t m_t / sum_t scale_t

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless, of positive sum.
        guard: Not needed.
    """
    total = 0.0
    for scale in scales:
        total = total + scale
    mean = tasks[0].mean
    for i in range(1, len(tasks)):
        mean = mean + (scales[i] / total) * (tasks[i].mean - tasks[0].mean)
    return Gaussian(mean, tasks[0].precision)


AVERAGE = Method("average", average, needs_base=False, needs_precision=False)
