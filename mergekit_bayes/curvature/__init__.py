"""Curvature of a trained model, from data: one estimator a file."""

from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.health import precision_health

__all__ = ["ggn_diagonal", "precision_health"]
