"""Remove toxicity by a script: fine-tune on toxic text, subtract it by each method, compare."""

from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.report import DetoxReport
from mergekit_bayes.detox.settings import DetoxConfig

__all__ = ["DetoxConfig", "DetoxReport", "run_detox"]
