"""Metrics, one file each: (model, tokenizer, texts) to a report of numbers with intervals."""

from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.classification import ClassificationReport, measure_classification
from mergekit_bayes.metrics.perplexity import PerplexityReport, measure_perplexity
from mergekit_bayes.metrics.toxicity import ToxicityReport, score_toxicity

__all__ = [
    "ClassificationReport",
    "Interval",
    "PerplexityReport",
    "ToxicityReport",
    "measure_classification",
    "measure_perplexity",
    "score_toxicity",
]
