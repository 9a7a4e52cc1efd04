"""DARE: drop and rescale, then TIES' election of signs (Yu et al., ICML 2024)."""

from mergekit_bayes.gaussian import Gaussian, constant, select
from mergekit_bayes.methods.base import Method, Parameter


def dare_ties(
    base: Gaussian,
    tasks: tuple[Gaussian, ...],
    scales: tuple[float, ...],
    facts: tuple[float, ...],
    draws: tuple[float, ...],
) -> Gaussian:
    """Drop entries of the task vectors at random, rescale the others, and add the mean of those that agree in sign.

        d_t  = (m_t - m0) [draw_t < density] / density
        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    The random drop takes the place of TIES' trim.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless.
        facts: The density first.
        draws: Uniform numbers in [0, 1), one per task.
    """
    zero, one = constant(0, base.mean), constant(1, base.mean)
    total, merged, count = zero, zero, zero
    for t in range(len(tasks)):
        votes = (draws[t] < facts[0]) & (scales[t] != 0)
        total = total + select(votes, (tasks[t].mean - base.mean) / facts[0], zero)
    for t in range(len(tasks)):
        delta = (tasks[t].mean - base.mean) / facts[0]
        # No product of the two: it would underflow where both are tiny.
        votes = (draws[t] < facts[0]) & (scales[t] != 0)
        agrees = votes & (((delta > zero) & (total > zero)) | ((delta < zero) & (total < zero)))
        merged = merged + select(agrees, scales[t] * delta, zero)
        count = count + select(agrees, one, zero)
    return Gaussian(base.mean + merged / select(count > zero, count, one), base.precision)


DARE_TIES = Method(
    "dare_ties",
    dare_ties,
    needs_base=True,
    needs_precision=False,
    summary="A random share of each change, rescaled, where tasks agree in sign (DARE, Yu et al., ICML 2024).",
    example="bmerge merge A B --base BASE --method dare_ties --param density=0.1 --param seed=1",
    parameters=(
        Parameter("density", 0.1, "share of each task vector that is kept; the paper drops 90 %", 1e-6, 1),
        Parameter("seed", 0, "of the random numbers, a whole number", 0, 2**53),
    ),
    random=True,
)
