"""Fisher merging with its normalisation and floor (Matena & Raffel, NeurIPS 2022)."""

import math
from typing import NamedTuple

import numpy as np

from mergekit_bayes.gaussian import Gaussian, Number, constant
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Reduction, Scales, Tasks


class Sizes(NamedTuple):
    """What brings Fishers to one size.

    Attributes:
        floor: Least Fisher of the first model, in the units of its precision.
        norms: Norm of each task's Fisher over the whole model, before the floor.
    """

    floor: float
    norms: tuple[float, ...]


def fisher(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: Sizes) -> Gaussian:
    """Average by Fishers of one size, with a floor under the first model's.

        w_t  = scale_t F_t / |F_t|,  with F_1 = max(F_1, floor)
        mean = sum_t w_t m_t / sum_t w_t

    The first model is the target: where every Fisher is tiny, its weights win.

    Args:
        base: Not needed.
        tasks: Floats or arrays of one shape; precision is the Fisher of all observations.
        scales: One per task, dimensionless, >= 0 and of positive sum.
        facts: The floor and the norms.
    """
    weight = (scales[0] / facts.norms[0]) * np.maximum(tasks[0].precision, facts.floor)
    total, weighted = weight, constant(0, weight)
    for t in range(1, len(tasks)):
        weight = (scales[t] / facts.norms[t]) * tasks[t].precision
        total = total + weight
        weighted = weighted + weight * (tasks[t].mean - tasks[0].mean)
    return Gaussian(tasks[0].mean + weighted / total, total)


def _square(base: Gaussian | None, tasks: Tasks, k: int) -> Number:
    return tasks[k].precision * tasks[k].precision


def _sizes(inputs: FactInputs) -> Sizes:
    floor = float(inputs.settings["floor"]) * inputs.counts[0]
    return Sizes(floor, tuple(math.sqrt(float(x)) or 1.0 for x in inputs.totals))


FISHER = Method(
    "fisher",
    fisher,
    needs_base=False,
    needs_precision=True,
    summary="The mean of the weights by normalised Fishers, the first model's floored "
    "(Matena & Raffel, NeurIPS 2022).",
    example="bmerge merge TARGET A --method fisher",
    parameters=(
        Parameter(
            "floor",
            1e-6,
            "least Fisher of the first model, per observation, in 1/weight^2; 0 for none",
            0,
        ),
    ),
    reduction=Reduction("sum", _square, lambda tasks: tasks, "model"),
    facts=_sizes,
)
