"""trl's `SFTTrainer` with IVON in the place of AdamW. trl is an extra: `mergekit-bayes[sft]`."""

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        "IvonSFTTrainer needs trl, which cannot be imported. Install it by "
        "pip install 'mergekit-bayes[sft]'."
    ) from error

from mergekit_bayes.trainer.chosen import ChosenIvonMixin


class IvonSFTTrainer(ChosenIvonMixin, SFTTrainer):  # type: ignore[misc]
    """trl's `SFTTrainer` that trains with IVON, and stores the posterior with the model.

        trainer = IvonSFTTrainer("Qwen/Qwen3-0.6B", SFTConfig("out", learning_rate=1e-4), ...)
        trainer.train()
        trainer.save_model("tuned")

    The arguments are those of `SFTTrainer`, and `ivon` of `ChosenIvonMixin`.
    """
