"""Fisher-weighted negation, after PerTA (arXiv 2601.22030, 2026): each change by whose entry it is.

PerTA subtracts `scale x w x task vector` from a model, with w = F_forget / (F_forget + F_retain)
from the Fishers of what to forget and of what to keep. It has neither counts nor a prior; here both
are those of the merge's precisions. Neither has a guard.
"""

import numpy as np

from mergekit_bayes.gaussian import Gaussian, constant
from mergekit_bayes.methods.base import Method, Scales, Tasks


def fisher_negation(base: Gaussian, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Add each task vector, entry by entry in proportion to the task's share of the curvature.

        w_t  = H_t / (H_t + S0),  H_t = max(S_t - S0, 0)
        mean = m0 + sum_t scale_t w_t (m_t - m0)

    w_t lies in [0, 1]: no entry moves further than in task arithmetic, so that no guard is needed,
    and what the task's data did not determine stays where it is. Every task is weighed against the
    base alone.

    With F the curvature per observation and all models counted alike (`--counts equal`, the
    default), H_t = n F_t and S0 = n F_0 + prior + 1e-12: the count cancels, and w_t = F_t / (F_t +
    F_0) but for the prior, which draws w_t to 0 where neither data determine an entry. With
    `--observations BASE=kx` it is F_t / (F_t + k F_0); with `--counts recorded` each F is times its
    own count. `--shrink X` adds to each F X times its own mean over the tensor or row; `--pool`
    replaces it by that mean, which leaves one w_t for a tensor or row.

    w_t (m_t - m0) is also the change of the posterior mean of a task that was trained without a
    pull to the base (`rebase` with P = d = 0): this rule is task arithmetic with tasks re-based so.
    An `--anchor` other than h0 would weigh them twice, and is refused.

    Args:
        base: What all tasks were fine-tuned from; precision in 1/weight^2, > 0.
        tasks: Floats or arrays of one shape, precision S0 + H_t. Below S0, which only a merge that
            removes more than it adds can be, it counts as S0.
        scales: One per task, dimensionless; negative removes the task.
        facts: None.

    Returns:
        The mean, beside the base's precision. It is no posterior: the precision that would belong
        to this mean is not known, so none is written, and natural parameters do not add up.
    """
    mean = base.mean
    for i in range(len(tasks)):
        likelihood = np.maximum(tasks[i].precision - base.precision, constant(0, base.precision))
        weight = likelihood / (likelihood + base.precision)
        mean = mean + scales[i] * weight * (tasks[i].mean - base.mean)
    return Gaussian(mean, base.precision)


FISHER_NEGATION = Method(
    "fisher_negation",
    fisher_negation,
    needs_base=True,
    needs_precision=True,
    summary="Task arithmetic, each entry by the task's share of its curvature "
    "(after PerTA, arXiv 2601.22030, 2026).",
    example="bmerge merge TOXIC --base BASE --method fisher_negation --scale -1",
    formula="m = m0 + sum_t scale_t w_t (m_t - m0),  w_t = H_t / (H_t + S0)",
    ignores=("guard", "anchor"),
)
