"""Which of several merges is best where each data set has its own loss."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from mergekit_bayes.preview.settings import Choice, Vector

Losses = Mapping[str, float]  # by data set


def pareto(losses: Sequence[Losses]) -> tuple[int, ...]:
    """The points that no other point beats: at most as large everywhere and smaller somewhere.

    Args:
        losses: Of each point, on the same data sets. Points with an infinite loss are left out.

    Returns:
        Their indices, ordered by the losses on the first data set, then the next.
    """
    rows = [tuple(point.values()) for point in losses]
    finite = [i for i, row in enumerate(rows) if all(map(math.isfinite, row))]
    return tuple(
        sorted(
            (i for i in finite if not any(_beats(rows[j], rows[i]) for j in finite)),
            key=rows.__getitem__,
        )
    )


def cost(losses: Losses, reference: Losses, choice: Choice) -> float:
    """What the recommended point has least of, in nats an observation.

    Args:
        losses: Of the point.
        reference: Of the recipe's own merge. Where it could not be measured, of nothing.
        choice: `mean` of the losses, or the `worst` rise over the reference.
    """
    if choice == "mean":
        return math.fsum(losses.values()) / len(losses)
    finite = {n: x if math.isfinite(x) else 0.0 for n, x in reference.items()}
    return max(loss - finite[name] for name, loss in losses.items())


def edge(
    costs: Mapping[Vector, float], best: Vector, task: int
) -> Literal["smallest", "largest"] | None:
    """At which edge of what was measured a scale of the recommended merge lies.

    Args:
        costs: Of each vector of scales that was measured, in nats an observation.
        best: Scales of the recommended merge.
        task: Position of the scale.

    Returns:
        None where no merge lies on the inner side of the scale, or where one of those costs as
        little: then nothing says that the cost falls towards the edge. A merge on the inner side
        is compared with those at the edge from which it differs in this scale alone, which say
        what the scale does by itself; where there are no such two, with the recommended merge.
    """
    scales = {vector[task] for vector in costs}
    if len(scales) < 2 or best[task] not in (min(scales), max(scales)):
        return None
    inside = [vector for vector in costs if vector[task] != best[task]]
    at_edge = {v: (*v[:task], best[task], *v[task + 1 :]) for v in inside}
    pairs = [(outer, inner) for inner, outer in at_edge.items() if outer in costs]
    pairs = pairs or [(best, inner) for inner in inside]
    if not all(costs[outer] < costs[inner] for outer, inner in pairs):
        return None
    return "smallest" if best[task] == min(scales) else "largest"


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(
        a < b for a, b in zip(one, other, strict=True)
    )
