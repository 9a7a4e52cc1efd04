"""The table of curvature estimators, by the name that posteriors record."""

from mergekit_bayes.curvature.base import Estimator
from mergekit_bayes.curvature.fisher import fisher_diagonal
from mergekit_bayes.curvature.fisher_empirical import empirical_fisher_diagonal
from mergekit_bayes.curvature.fisher_exact import exact_fisher_diagonal
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.inputs import input_covariance
from mergekit_bayes.curvature.ivon import ivon_diagonal
from mergekit_bayes.curvature.kronecker import kronecker_factors

ESTIMATORS: dict[str, Estimator] = {
    "ggn": ggn_diagonal,
    "fisher": fisher_diagonal,
    "fisher-exact": exact_fisher_diagonal,
    "fisher-empirical": empirical_fisher_diagonal,
    "ivon": ivon_diagonal,
    "inputs": input_covariance,
    "kronecker": kronecker_factors,
}
# Those that look at the labels of the data; others need none.
LABELLED = frozenset({"fisher-empirical", "ivon"})
