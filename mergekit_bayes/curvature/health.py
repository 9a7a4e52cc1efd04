"""Numbers that show at a glance whether a precision is one."""

from collections.abc import Mapping

import torch

_VIEWED = 65536  # entries of a tensor that the median is taken of


def precision_health(precision: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return minimum, median and maximum of a precision, and the number of bad entries.

    Args:
        precision: Tensors by name, in 1/weight^2.

    Returns:
        `precision_min`, `precision_median` (of at most 65,536 entries a tensor) and
        `precision_max`; `not_positive`, the number of entries that are not positive numbers.
    """
    tensors = precision.values()
    sample = torch.cat([p.flatten()[:: max(1, p.numel() // _VIEWED)].float() for p in tensors])
    bad = sum(int((~(p > 0) | ~p.isfinite()).sum()) for p in tensors)
    return {
        "precision_min": float(min(p.min() for p in tensors)),
        "precision_median": float(sample.median()),
        "precision_max": float(max(p.max() for p in tensors)),
        "not_positive": float(bad),
    }
