"""A precision for a checkpoint that has none.

`run_precision` and what it needs (torch) are imported on first use, so that the settings can be
read without.
"""

from typing import TYPE_CHECKING

from mergekit_bayes.precision.settings import PrecisionConfig, PrecisionReport

if TYPE_CHECKING:
    from mergekit_bayes.precision.run import run_precision

__all__ = ["PrecisionConfig", "PrecisionReport", "run_precision"]


def __getattr__(name: str) -> object:
    if name == "run_precision":
        from mergekit_bayes.precision.run import run_precision

        return run_precision
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
