"""What is in a checkpoint and its posterior, and how two models differ."""

from mergekit_bayes.inspect.report import (
    QUANTILES,
    Comparison,
    DifferenceLayer,
    InspectReport,
    LayerReport,
    MixedRun,
    PrecisionLayer,
    PrecisionSummary,
)
from mergekit_bayes.inspect.run import run_inspect

__all__ = [
    "QUANTILES",
    "Comparison",
    "DifferenceLayer",
    "InspectReport",
    "LayerReport",
    "MixedRun",
    "PrecisionLayer",
    "PrecisionSummary",
    "run_inspect",
]
