"""Optimizers that leave a posterior, one file each."""

from mergekit_bayes.optim.ivon import IVON, ivon_update

__all__ = ["IVON", "ivon_update"]
