"""The change of a fine-tune or an edit as a LoRA adapter, weighed by the precision.

`run_extract` and what it needs are imported on first use, so that the settings can be read without.
"""

from typing import TYPE_CHECKING

from mergekit_bayes.extract.settings import ExtractConfig

if TYPE_CHECKING:
    from mergekit_bayes.extract.report import ExtractedLayer, ExtractReport, Losses, OtherChange
    from mergekit_bayes.extract.run import run_extract

__all__ = [
    "ExtractConfig",
    "ExtractReport",
    "ExtractedLayer",
    "Losses",
    "OtherChange",
    "run_extract",
]


def __getattr__(name: str) -> object:
    if name == "run_extract":
        from mergekit_bayes.extract.run import run_extract

        return run_extract
    if name in ("ExtractReport", "ExtractedLayer", "Losses", "OtherChange"):
        from mergekit_bayes.extract import report

        return getattr(report, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
