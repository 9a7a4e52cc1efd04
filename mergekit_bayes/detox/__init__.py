"""Remove toxicity by a script, by subtraction and by correction, and compare the methods."""

from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.report import DetoxReport
from mergekit_bayes.detox.settings import DetoxConfig

__all__ = ["DetoxConfig", "DetoxReport", "run_detox"]
