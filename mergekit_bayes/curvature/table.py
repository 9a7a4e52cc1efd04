"""The table of curvature estimators, by the name that posteriors record."""

from mergekit_bayes.curvature.base import Estimator
from mergekit_bayes.curvature.ggn import ggn_diagonal

ESTIMATORS: dict[str, Estimator] = {"ggn": ggn_diagonal}
