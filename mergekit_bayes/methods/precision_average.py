"""The precision-weighted average; with Fishers for precisions, Matena & Raffel (NeurIPS 2022)."""

from mergekit_bayes.gaussian import Gaussian, constant
from mergekit_bayes.methods.base import Method, Scales, Tasks
from mergekit_bayes.methods.matrices import weighted_mean


def precision_average(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Average in natural parameters: entries that a task is sure of count more.

        c_t       = scale_t / sum_t scale_t
        precision = sum_t c_t S_t
        mean      = sum_t c_t S_t m_t / precision

    With scales that sum to one this is gradient matching: the base cancels. Written around the
    first task's mean, which has about half the rounding error of the direct form.

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape; precision in 1/weight^2, > 0.
        scales: One per task, dimensionless, >= 0 and of positive sum.
        facts: None.
    """
    total = scales[0]
    for i in range(1, len(scales)):
        total = total + scales[i]
    precision = (scales[0] / total) * tasks[0].precision
    weighted = constant(0, precision)  # sum_t c_t S_t (m_t - m_1)
    for i in range(1, len(tasks)):
        share = (scales[i] / total) * tasks[i].precision
        precision = precision + share
        weighted = weighted + share * (tasks[i].mean - tasks[0].mean)
    return Gaussian(tasks[0].mean + weighted / precision, precision)


def for_matrices(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """The same with a precision matrix of a layer's inputs in place of numbers.

        mean = (sum_t c_t m_t S_t) precision^-1,  precision = sum_t c_t S_t

    Args:
        base: Not needed.
        tasks: Means (outputs, inputs), precisions (inputs, inputs), positive definite, or sums of
            Kronecker products.
        scales: One per task, dimensionless, >= 0 and of positive sum.
        facts: None.
    """
    total = sum(scales)
    shares = [(scale / total) * task.precision for task, scale in zip(tasks, scales, strict=True)]
    return Gaussian(*weighted_mean([task.mean for task in tasks], shares))


PRECISION_AVERAGE = Method(
    "precision_average",
    precision_average,
    needs_base=False,
    needs_precision=True,
    summary="The mean of the weights, each entry by its precision; scales are shares.",
    example="bmerge merge A B --weights precision",
    formula="m = sum_t scale_t S_t m_t / sum_t scale_t S_t,  S = sum_t scale_t S_t / sum_t scale_t",
    is_posterior=True,
    matrix=for_matrices,
)
