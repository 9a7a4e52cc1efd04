"""Curvature of a trained model, from data: one estimator a file."""

from mergekit_bayes.curvature.ggn import ggn_diagonal

__all__ = ["ggn_diagonal"]
