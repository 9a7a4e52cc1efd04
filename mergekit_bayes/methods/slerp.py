"""Spherical interpolation of two models (Shoemake, SIGGRAPH 1985)."""

import math
from typing import NamedTuple

from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Reduction, Scales, Tasks

_PARALLEL = 0.9995  # above this cosine the arc is a line, and its sine too small to divide by


class Arc(NamedTuple):
    """A point on the arc between two models.

    Attributes:
        first: Coefficient of the first model.
        second: Coefficient of the second model.
    """

    first: float
    second: float


def slerp(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: Arc) -> Gaussian:
    """Go along the arc from the first model to the second.

        cos a = <m_1, m_2> / (|m_1| |m_2|)
        mean  = (sin((1 - t) a) m_1 + sin(t a) m_2) / sin a

    Almost parallel models are interpolated along the line.

    Args:
        base: Not needed.
        tasks: Two; floats or arrays of one shape.
        scales: Not needed; the setting `t` says how far to go.
        facts: The two coefficients.
    """
    mean = facts.first * tasks[0].mean + facts.second * tasks[1].mean
    return Gaussian(mean, tasks[0].precision)


def _product(base: Gaussian | None, tasks: Tasks, k: int) -> Number:
    # 0: <m_1, m_1>, 1: <m_1, m_2>, 2: <m_2, m_2>
    return tasks[k // 2].mean * tasks[(k + 1) // 2].mean


def _arc(inputs: FactInputs) -> Arc:
    t, (first, both, second) = float(inputs.settings["t"]), (float(x) for x in inputs.totals)
    norm = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, both / norm)) if norm > 0 else 1.0
    angle = math.acos(cosine)
    if abs(cosine) > _PARALLEL:
        return Arc(1 - t, t)
    return Arc(math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))


SLERP = Method(
    "slerp",
    slerp,
    needs_base=False,
    needs_precision=False,
    summary="Along the arc from one model to another (Shoemake, SIGGRAPH 1985).",
    example="bmerge merge A B --method slerp --param t=0.3",
    parameters=(
        Parameter("t", 0.5, "how far from the first model to the second, of the whole way", 0, 1),
        Parameter(
            "scope",
            "tensor",
            "over what the angle is taken: each tensor, or the whole model",
            choices=("tensor", "model"),
        ),
    ),
    reduction=Reduction("sum", _product, lambda tasks: 3, "tensor"),
    facts=_arc,
    tasks=2,
    takes_scales=False,
    reads_weights=True,
    turns=True,
)
