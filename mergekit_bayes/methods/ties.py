"""TIES-merging: trim, elect signs, merge (Yadav et al., NeurIPS 2023)."""

from mergekit_bayes.gaussian import Gaussian, constant, select
from mergekit_bayes.methods.base import Method, Parameter, Reduction, Settings, Totals, threshold


def ties(base: Gaussian, tasks: tuple[Gaussian, ...], scales: tuple[float, ...], facts: tuple[float, ...]) -> Gaussian:
    """Add the mean of those trimmed task vectors that agree with the majority's sign.

        d_t  = m_t - m0 where |m_t - m0| >= threshold_t, else 0
        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    Signs are elected by the unweighted sum, as published; equal scales are the published lambda. A task of scale zero
    has no vote.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless.
        facts: One threshold per task, in units of the weights.
    """
    zero, one = constant(0, base.mean), constant(1, base.mean)
    total, merged, count = zero, zero, zero
    for t in range(len(tasks)):
        delta = tasks[t].mean - base.mean
        total = total + select((abs(delta) >= facts[t]) & (scales[t] != 0), delta, zero)
    for t in range(len(tasks)):
        delta = tasks[t].mean - base.mean
        # No product of the two: it would underflow where both are tiny.
        agrees = (abs(delta) >= facts[t]) & (scales[t] != 0)
        agrees = agrees & (((delta > zero) & (total > zero)) | ((delta < zero) & (total < zero)))
        merged = merged + select(agrees, scales[t] * delta, zero)
        count = count + select(agrees, one, zero)
    return Gaussian(base.mean + merged / select(count > zero, count, one), base.precision)


def _magnitude(base: Gaussian, tasks: tuple[Gaussian, ...], k: int) -> float:
    return abs(tasks[k].mean - base.mean)  # type: ignore[no-any-return]


def _thresholds(totals: Totals, settings: Settings, counts: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(threshold(histogram, float(settings["density"])) for histogram in totals)


TIES = Method(
    "ties",
    ties,
    needs_base=True,
    needs_precision=False,
    summary="The largest changes only, where tasks agree in sign (TIES, Yadav et al., NeurIPS 2023).",
    example="bmerge merge A B --base BASE --method ties --param density=0.2",
    parameters=(
        Parameter("density", 0.2, "share of each task vector that is kept, the largest first (and their ties)", 0, 1),
        Parameter("scope", "model", "over what: the whole task vector, as published, or each tensor",
                  choices=("model", "tensor")),
    ),
    reduction=Reduction("histogram", _magnitude, lambda tasks: tasks, _thresholds, "model"),
)  # fmt: skip
