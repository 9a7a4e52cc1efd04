"""TIES-merging: trim, elect signs, merge (Yadav et al., NeurIPS 2023)."""

from typing import NamedTuple

from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Reduction, Scales, Tasks
from mergekit_bayes.methods.election import elect
from mergekit_bayes.methods.histogram import threshold


class Trim(NamedTuple):
    """Which changes are kept.

    Attributes:
        thresholds: Least magnitude of a change that is kept, one per task, in units of the weights.
    """

    thresholds: tuple[float, ...]


def ties(base: Gaussian, tasks: Tasks, scales: Scales, facts: Trim) -> Gaussian:
    """Add the mean of those trimmed task vectors that agree with the majority's sign.

        d_t  = m_t - m0 where |m_t - m0| >= threshold_t, else 0
        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    Equal scales are the published lambda. A task of scale zero has no vote.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless.
        facts: The thresholds.
    """
    return elect(base, tasks, scales, _trimmed, facts)


def _trimmed(base: Gaussian, tasks: Tasks, facts: Trim, t: int) -> tuple[Number, Number]:
    delta = tasks[t].mean - base.mean
    return delta, abs(delta) >= facts.thresholds[t]


def _magnitude(base: Gaussian, tasks: Tasks, k: int) -> Number:
    return abs(tasks[k].mean - base.mean)


def _trim(inputs: FactInputs) -> Trim:
    density = float(inputs.settings["density"])
    return Trim(tuple(threshold(histogram, density) for histogram in inputs.totals))


TIES = Method(
    "ties",
    ties,
    needs_base=True,
    needs_precision=False,
    summary="The largest changes only, where tasks agree in sign "
    "(TIES, Yadav et al., NeurIPS 2023).",
    example="bmerge merge A B --base BASE --method ties --param density=0.2",
    parameters=(
        Parameter(
            "density",
            0.2,
            "share of each task vector that is kept, the largest first (and their ties)",
            0,
            1,
        ),
        Parameter(
            "scope",
            "model",
            "over what: the whole task vector, as published, or each tensor",
            choices=("model", "tensor"),
        ),
    ),
    reduction=Reduction("histogram", _magnitude, lambda tasks: tasks, "model"),
    facts=_trim,
)
