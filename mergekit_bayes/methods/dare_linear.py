"""DARE: drop and rescale, then task arithmetic (Yu et al., ICML 2024)."""

from mergekit_bayes.gaussian import Gaussian, constant, select
from mergekit_bayes.methods.base import Draws, Method, Scales, Tasks
from mergekit_bayes.methods.dropping import DROP_PARAMETERS, Drop, drop_facts


def dare_linear(
    base: Gaussian, tasks: Tasks, scales: Scales, facts: Drop, draws: Draws
) -> Gaussian:
    """Drop entries of the task vectors at random, rescale the others, and add them up.

        mean = m0 + sum_t scale_t (m_t - m0) [draw_t < density] / density

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless; negative removes the task.
        facts: The density.
        draws: Uniform numbers in [0, 1), one per task.
    """
    zero, mean = constant(0, base.mean), base.mean
    for t in range(len(tasks)):
        delta = select(draws[t] < facts.density, tasks[t].mean - base.mean, zero)
        mean = mean + scales[t] * (delta / facts.density)
    return Gaussian(mean, base.precision)


DARE_LINEAR = Method(
    "dare_linear",
    dare_linear,
    needs_base=True,
    needs_precision=False,
    summary="A random share of each change, rescaled, then task arithmetic "
    "(DARE, Yu et al., ICML 2024).",
    example="bmerge merge A B --base BASE --method dare_linear --param density=0.1",
    parameters=DROP_PARAMETERS,
    facts=drop_facts,
    random=True,
)
