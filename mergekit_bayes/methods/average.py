"""The weighted average of checkpoints, also known as model soup (Wortsman et al., ICML 2022)."""

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method, Scales, Tasks


def average(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Average the means; all precisions count as equal.

        mean = sum_t scale_t m_t / sum_t scale_t

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless, of positive sum.
        facts: None.
    """
    total = scales[0]
    for i in range(1, len(scales)):
        total = total + scales[i]
    mean = tasks[0].mean
    for i in range(1, len(tasks)):
        mean = mean + (scales[i] / total) * (tasks[i].mean - tasks[0].mean)
    return Gaussian(mean, tasks[0].precision)


AVERAGE = Method(
    "average",
    average,
    needs_base=False,
    needs_precision=False,
    summary="The mean of the weights; scales are shares (model soup, Wortsman et al., ICML 2022).",
    example="bmerge merge A B",
    formula="m = sum_t scale_t m_t / sum_t scale_t",
    is_posterior=True,
)
