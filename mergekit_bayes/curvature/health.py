"""Numbers that show at a glance whether a precision is one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

_VIEWED = 65536  # entries of a tensor that the median is taken of


class Glance(NamedTuple):
    """What is looked at of a precision, or of this rank's rows of one.

    Attributes:
        least: The smallest entry; infinity where there is none.
        most: The largest; minus infinity where there is none.
        bad: Number of entries that are not positive numbers.
        sample: Some entries of each tensor, float32, on the CPU.
    """

    least: float
    most: float
    bad: int
    sample: torch.Tensor


def glance(precision: Iterable[torch.Tensor], ranks: int = 1) -> Glance:
    """Look at a precision, one tensor after the other.

    Args:
        precision: Tensors in 1/weight^2.
        ranks: Number of ranks that look at rows of the same tensors.
    """
    least, most, bad, samples = math.inf, -math.inf, 0, [torch.empty(0)]
    for p in precision:
        if p.numel():
            least, most = min(least, float(p.min())), max(most, float(p.max()))
            bad += int((~(p > 0) | ~p.isfinite()).sum())
            samples.append(p.flatten()[:: max(1, ranks * p.numel() // _VIEWED)].float().cpu())
    return Glance(least, most, bad, torch.cat(samples))


def glanced_health(glances: Sequence[Glance]) -> dict[str, float]:
    """The numbers of `precision_health`, of what all ranks have looked at."""
    return {
        "precision_min": min(g.least for g in glances),
        "precision_median": float(torch.cat([g.sample for g in glances]).median()),
        "precision_max": max(g.most for g in glances),
        "not_positive": float(sum(g.bad for g in glances)),
    }


def precision_health(precision: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return minimum, median and maximum of a precision, and the number of bad entries.

    Args:
        precision: Tensors by name, in 1/weight^2.

    Returns:
        `precision_min`, `precision_median` (of at most 65,536 entries a tensor) and
        `precision_max`; `not_positive`, the number of entries that are not positive numbers.
    """
    return glanced_health([glance(precision.values())])
