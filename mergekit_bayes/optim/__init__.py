"""Optimizers that leave a posterior, one file each."""

from mergekit_bayes.optim.bsam import BSAM, bsam_update
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.optim.shards import full_tensors
from mergekit_bayes.optim.updates import ggn_update, ivon_update
from mergekit_bayes.optim.vogn import VOGN, vogn_update

__all__ = [
    "BSAM",
    "IVON",
    "VOGN",
    "bsam_update",
    "full_tensors",
    "ggn_update",
    "ivon_update",
    "vogn_update",
]
