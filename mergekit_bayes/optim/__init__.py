"""Optimizers that leave a posterior, one file each."""

from mergekit_bayes.optim.ivon import IVON, ggn_update, ivon_update

__all__ = ["IVON", "ggn_update", "ivon_update"]
