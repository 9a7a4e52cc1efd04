"""Fisher merging with its normalisation and floor (Matena & Raffel, NeurIPS 2022)."""

import math

import numpy as np

from mergekit_bayes.gaussian import Gaussian, constant
from mergekit_bayes.methods.base import Method, Parameter, Reduction, Settings, Totals


def fisher(
    base: Gaussian | None, tasks: tuple[Gaussian, ...], scales: tuple[float, ...], facts: tuple[float, ...]
) -> Gaussian:
    """Average by Fishers of one size, with a floor under the first model's.

        w_t  = scale_t F_t / |F_t|,  F_1 = max(F_1, floor) on top
        mean = sum_t w_t m_t / sum_t w_t

    `|F|` is the norm over the whole model, before the floor. The first model is the target: where every Fisher is tiny,
    its weights win.

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape; precision is the Fisher of all observations.
        scales: One per task, dimensionless, >= 0 and of positive sum.
        facts: The floor in the units of the first precision, then one norm per task.
    """
    weight = (scales[0] / facts[1]) * np.maximum(tasks[0].precision, facts[0])
    total, pull = weight, constant(0, weight)
    for t in range(1, len(tasks)):
        weight = (scales[t] / facts[t + 1]) * tasks[t].precision
        total = total + weight
        pull = pull + weight * (tasks[t].mean - tasks[0].mean)
    return Gaussian(tasks[0].mean + pull / total, total)


def _square(base: Gaussian | None, tasks: tuple[Gaussian, ...], k: int) -> float:
    return tasks[k].precision * tasks[k].precision  # type: ignore[no-any-return]


def _floor_and_norms(totals: Totals, settings: Settings, counts: tuple[float, ...]) -> tuple[float, ...]:
    norms = (math.sqrt(float(x)) or 1.0 for x in totals)
    return (float(settings["floor"]) * counts[0], *norms)


FISHER = Method(
    "fisher",
    fisher,
    needs_base=False,
    needs_precision=True,
    summary="The mean of the weights by normalised Fishers, the first model's floored (Matena & Raffel, NeurIPS 2022).",
    example="bmerge merge TARGET A --method fisher",
    parameters=(
        Parameter("floor", 1e-6, "least Fisher of the first model, per observation, in 1/weight^2; 0 for none", 0),
    ),
    reduction=Reduction("sum", _square, lambda tasks: tasks, _floor_and_norms, "model"),
)
