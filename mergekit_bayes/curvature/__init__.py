"""Curvature of a trained model, from data: one estimator a file, listed in one table."""

from mergekit_bayes.curvature.base import Curvature, Estimator
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.sums import ENTRIES, Keeping
from mergekit_bayes.curvature.table import ESTIMATORS

__all__ = [
    "ENTRIES",
    "ESTIMATORS",
    "Curvature",
    "Estimator",
    "Keeping",
    "ggn_diagonal",
    "precision_health",
]
