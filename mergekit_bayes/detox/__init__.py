"""Scripted detoxification: fine-tune on the toxic text, subtract it by several methods, measure,
compare, draw.
"""

from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.report import DetoxReport
from mergekit_bayes.detox.settings import DetoxConfig

__all__ = ["DetoxConfig", "DetoxReport", "run_detox"]
