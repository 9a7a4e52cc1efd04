"""Numbers that show at a glance whether a precision is one."""

from collections.abc import Mapping

import torch


def precision_health(precision: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Minimum, median and maximum of a precision, and how many entries are not positive numbers."""
    sample = torch.cat([p.flatten()[:: max(1, p.numel() // 65536)].float() for p in precision.values()])
    bad = sum(int((~(p > 0) | ~p.isfinite()).sum()) for p in precision.values())
    return {
        "precision_min": float(min(p.min() for p in precision.values())),
        "precision_median": float(sample.median()),
        "precision_max": float(max(p.max() for p in precision.values())),
        "not_positive": float(bad),
    }
