"""Perplexity, toxicity and calibration of a model in one report.

All but the settings needs torch and is imported on first use, so that the settings can be read
without.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mergekit_bayes.evaluate.settings import EvaluateConfig

if TYPE_CHECKING:
    from mergekit_bayes.evaluate.files import read_report
    from mergekit_bayes.evaluate.report import EvaluateReport, SampledReport, ScorerInfo
    from mergekit_bayes.evaluate.run import run_evaluate
    from mergekit_bayes.evaluate.scorers import Scorer, open_scorer

__all__ = [
    "EvaluateConfig",
    "EvaluateReport",
    "SampledReport",
    "Scorer",
    "ScorerInfo",
    "open_scorer",
    "read_report",
    "run_evaluate",
]

_MODULES = {
    "EvaluateReport": "report",
    "SampledReport": "report",
    "Scorer": "scorers",
    "ScorerInfo": "report",
    "open_scorer": "scorers",
    "read_report": "files",
    "run_evaluate": "run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
