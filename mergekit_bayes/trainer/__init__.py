"""IVON inside `transformers.Trainer`."""

from mergekit_bayes.trainer.losses import classification_loss
from mergekit_bayes.trainer.mixin import IvonTrainerMixin, unwrap

__all__ = ["IvonTrainerMixin", "classification_loss", "unwrap"]
