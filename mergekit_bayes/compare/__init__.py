"""Models side by side: the same texts, prompts and noise, paired differences, report, picture."""

from mergekit_bayes.compare.settings import CompareConfig, CompareReport, Difference, Evaluated

__all__ = ["CompareConfig", "CompareReport", "Difference", "Evaluated"]
