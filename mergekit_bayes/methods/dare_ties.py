"""DARE: drop and rescale, then TIES' election of signs (Yu et al., ICML 2024)."""

from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.methods.base import Draws, Method, Scales, Tasks
from mergekit_bayes.methods.dropping import DROP_PARAMETERS, Drop, drop_facts
from mergekit_bayes.methods.election import elect


def dare_ties(base: Gaussian, tasks: Tasks, scales: Scales, facts: Drop, draws: Draws) -> Gaussian:
    """Drop entries of the task vectors at random, rescale the others, and elect signs.

        d_t  = (m_t - m0) [draw_t < density] / density
        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    The random drop takes the place of TIES' trim.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless.
        facts: The density.
        draws: Uniform numbers in [0, 1), one per task.
    """
    return elect(base, tasks, scales, _rescaled, (facts.density, draws))


def _rescaled(
    base: Gaussian, tasks: Tasks, facts: tuple[Number, Draws], t: int
) -> tuple[Number, Number]:
    density, draws = facts
    return (tasks[t].mean - base.mean) / density, draws[t] < density


DARE_TIES = Method(
    "dare_ties",
    dare_ties,
    needs_base=True,
    needs_precision=False,
    summary="A random share of each change, rescaled, where tasks agree in sign "
    "(DARE, Yu et al., ICML 2024).",
    example="bmerge merge A B --base BASE --method dare_ties --param density=0.1 --param seed=1",
    parameters=DROP_PARAMETERS,
    facts=drop_facts,
    random=True,
)
