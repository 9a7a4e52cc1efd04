"""transformers' Trainer with the objective of an adaptation in place of a model's own loss.

Dropout stays off: with it the divergence from the start would not be zero at the start.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mergekit_bayes.adapt.data import CollateParts, Mixture, Run
from mergekit_bayes.adapt.objective import Terms
from mergekit_bayes.adapt.teacher import Batch
from mergekit_bayes.finetune.hooks import CheckpointMarker
from mergekit_bayes.finetune.refusals import refuse_accelerator
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.finetune.training import training_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

Loss: TypeAlias = Callable[[torch.nn.Module, Batch], Terms]


class AdaptTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of an adaptation with AdamW.

    Args:
        run: What is adapted, and how.
        objective: J / N, of a model and a batch.
        arguments: Arguments of transformers' Trainer.
    """

    # The loss is an estimate of the whole objective on one micro-batch, so their mean is taken.
    loss_is_scaled_for_ga = False

    def __init__(self, run: Run, objective: Loss, **arguments: object) -> None:
        self._objective = objective
        self._terms: list[Terms] = []  # since the last line of the log
        super().__init__(
            model=run.loaded.model, data_collator=CollateParts(run.loaded.pad), **arguments
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective on one micro-batch."""
        model.eval()
        with self.accelerator.autocast():  # the teacher computes as the model does
            terms = self._objective(model, inputs)
        self._terms.append(terms._replace(total=terms.total.detach()))
        return terms.total

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Add the mean of each term since the last line to the log."""
        if "loss" in logs and self._terms:
            names = {name for terms in self._terms for name in terms.means}
            for name in sorted(names):
                values = [terms.means[name] for terms in self._terms if name in terms.means]
                logs[name] = float(torch.stack(values).mean())
            logs["penalty"] = float(torch.stack([terms.penalty for terms in self._terms]).mean())
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, *args: object) -> Sampler[int]:
        """The items in their own order, which is random already."""
        return SequentialSampler(self.train_dataset)


def adapt_arguments(config: FinetuneConfig, folder: Path, *, quiet: bool) -> "TrainingArguments":
    """The Trainer's arguments, as of a fine-tune. Making them joins the process group.

    The learning rate is told when the model is there (`make_trainer`).
    """
    arguments = training_arguments(config, folder, quiet=quiet)
    arguments.adam_beta2 = 0.99  # a run has some hundred steps
    return arguments


def make_trainer(
    run: Run,
    objective: Loss,
    arguments: "TrainingArguments",
    callbacks: list[TrainerCallback],
    *,
    loss_before: float = 0.0,
) -> AdaptTrainer:
    """Make the Trainer of an adaptation.

    Args:
        run: What is adapted, and how.
        objective: J / N.
        arguments: From `adapt_arguments`.
        callbacks: What acts after a step.
        loss_before: Sum of the training loss over the steps of the checkpoint that is resumed.

    Raises:
        ConfigError: An accelerator with which the optimizer does not work.
    """
    items = (
        run.units.steps
        * run.config.batch_size
        * run.config.gradient_accumulation
        * arguments.world_size
    )
    arguments.learning_rate = run.units.learning_rate
    trainer = AdaptTrainer(
        run,
        objective,
        args=arguments,
        train_dataset=Mixture(run.parts, items, run.config.seed),
    )
    refuse_accelerator(trainer.accelerator, ivon=False)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    # The last one: it vouches for what the others have written.
    trainer.add_callback(CheckpointMarker(trainer, run.identity, loss_before))
    return trainer
