"""IVON inside `transformers.Trainer`, trl's `SFTTrainer` and loops of your own.

The two Trainers are imported on first use, because transformers and trl take seconds.
"""

from typing import TYPE_CHECKING

from mergekit_bayes.trainer.choices import ivon_settings
from mergekit_bayes.trainer.logits import add_logit_curvature
from mergekit_bayes.trainer.losses import classification_loss
from mergekit_bayes.trainer.mixin import IvonTrainerMixin, unwrap
from mergekit_bayes.trainer.saving import save_trained

if TYPE_CHECKING:
    from mergekit_bayes.trainer.ivon_sft_trainer import IvonSFTTrainer
    from mergekit_bayes.trainer.ivon_trainer import IvonTrainer

__all__ = [
    "IvonSFTTrainer",
    "IvonTrainer",
    "IvonTrainerMixin",
    "add_logit_curvature",
    "classification_loss",
    "ivon_settings",
    "save_trained",
    "unwrap",
]


def __getattr__(name: str) -> object:
    if name == "IvonTrainer":
        from mergekit_bayes.trainer.ivon_trainer import IvonTrainer

        return IvonTrainer
    if name == "IvonSFTTrainer":
        from mergekit_bayes.trainer.ivon_sft_trainer import IvonSFTTrainer

        return IvonSFTTrainer
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
