"""Remove and add knowledge in a few steps, the rest held by a K-prior."""

from mergekit_bayes.adapt.settings import AdaptConfig, AdaptReport, Check, Rows, Until

__all__ = ["AdaptConfig", "AdaptReport", "Check", "Rows", "Until"]
