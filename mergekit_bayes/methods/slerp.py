"""Spherical interpolation of two models (Shoemake, SIGGRAPH 1985)."""

import math

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method, Parameter, Reduction, Settings, Totals

_PARALLEL = 0.9995  # above this cosine the arc is a line, and its sine too small to divide by


def slerp(
    base: Gaussian | None, tasks: tuple[Gaussian, ...], scales: tuple[float, ...], facts: tuple[float, ...]
) -> Gaussian:
    """Go along the arc from the first model to the second.

        cos a = <m_1, m_2> / (|m_1| |m_2|)
        mean  = (sin((1 - t) a) m_1 + sin(t a) m_2) / sin a

    Almost parallel models are interpolated along the line.

    Args:
        base: Not needed.
        tasks: Two; floats or arrays of one shape.
        scales: Not needed; `t` says how far to go.
        facts: The two coefficients.
    """
    return Gaussian(facts[0] * tasks[0].mean + facts[1] * tasks[1].mean, tasks[0].precision)


def _product(base: Gaussian | None, tasks: tuple[Gaussian, ...], k: int) -> float:
    # 0: <m_1, m_1>, 1: <m_1, m_2>, 2: <m_2, m_2>
    return tasks[k // 2].mean * tasks[(k + 1) // 2].mean  # type: ignore[no-any-return]


def _coefficients(totals: Totals, settings: Settings, counts: tuple[float, ...]) -> tuple[float, ...]:
    t, (first, both, second) = float(settings["t"]), (float(x) for x in totals)
    norm = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, both / norm)) if norm > 0 else 1.0
    angle = math.acos(cosine)
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


SLERP = Method(
    "slerp",
    slerp,
    needs_base=False,
    needs_precision=False,
    summary="Along the arc from one model to another (Shoemake, SIGGRAPH 1985).",
    example="bmerge merge A B --method slerp --param t=0.3",
    parameters=(
        Parameter("t", 0.5, "how far from the first model to the second, of the whole way", 0, 1),
        Parameter("scope", "tensor", "over what the angle is taken: each tensor, or the whole model",
                  choices=("tensor", "model")),
    ),
    reduction=Reduction("sum", _product, lambda tasks: 3, _coefficients, "tensor"),
    tasks=2,
)  # fmt: skip
