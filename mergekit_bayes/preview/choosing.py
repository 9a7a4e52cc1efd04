"""Which of several merges is best where each data set has its own loss."""

import math
from collections.abc import Mapping, Sequence

from mergekit_bayes.preview.settings import Choice

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


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(
        a < b for a, b in zip(one, other, strict=True)
    )
