"""Perplexity, toxicity and calibration of a model in one report."""

from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.report import EvaluateReport, SampledReport, ScorerInfo
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.scorers import Scorer, open_scorer
from mergekit_bayes.evaluate.settings import EvaluateConfig

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
