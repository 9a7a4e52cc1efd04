"""`transformers.Trainer` with IVON in the place of AdamW."""

from transformers import Trainer

from mergekit_bayes.trainer.chosen import ChosenIvonMixin


class IvonTrainer(ChosenIvonMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` that trains with IVON, and stores the posterior with the model.

        trainer = IvonTrainer(model, TrainingArguments("out", learning_rate=1e-4), ...)
        trainer.train()
        trainer.save_model("tuned")

    The arguments are those of `transformers.Trainer`, and `ivon` of `ChosenIvonMixin`.
    """
