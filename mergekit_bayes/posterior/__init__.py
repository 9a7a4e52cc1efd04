"""The posterior of a model: a mean, a precision of the same names, and their information."""

from mergekit_bayes.posterior.edits import Edit, EditedRows, EditMemory, Identity
from mergekit_bayes.posterior.info import (
    FORMAT,
    Anchor,
    MergeTrace,
    PosteriorInfo,
    Predictive,
    Prior,
    Term,
    identify,
    parse_info,
    read_info,
)
from mergekit_bayes.posterior.posterior import Posterior, open_posterior
from mergekit_bayes.posterior.save import save_posterior, write_info

__all__ = [
    "FORMAT",
    "Anchor",
    "Edit",
    "EditMemory",
    "EditedRows",
    "Identity",
    "MergeTrace",
    "Posterior",
    "PosteriorInfo",
    "Predictive",
    "Prior",
    "Term",
    "identify",
    "open_posterior",
    "parse_info",
    "read_info",
    "save_posterior",
    "write_info",
]
