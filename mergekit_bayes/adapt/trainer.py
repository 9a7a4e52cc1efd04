"""transformers' Trainer with the objective of an adaptation in place of a model's own loss.

Dropout stays off: with it the divergence from the start would not be zero at the start.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mergekit_bayes.adapt.data import CollateParts, Mixture, Run
from mergekit_bayes.adapt.objective import Objective, Terms
from mergekit_bayes.adapt.teacher import Batch
from mergekit_bayes.adapt.weights import WeightPart
from mergekit_bayes.finetune.choices import ivon_choices
from mergekit_bayes.finetune.hooks import CheckpointMarker
from mergekit_bayes.finetune.refusals import refuse_accelerator
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.finetune.training import training_arguments
from mergekit_bayes.heads import Likelihood
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap

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
        """Add the mean of each term over this rank's batches since the last line to the log."""
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


class ForIvon(NamedTuple):
    """What IVON needs besides a loss to call.

    Attributes:
        objective: J / N, which knows how much each observation's curvature counts.
        weights: The weight-space part that becomes the prior and is not in the loss; None where it
            is in the loss or there is none.
    """

    objective: Objective
    weights: WeightPart | None


class IvonAdaptTrainer(IvonTrainerMixin, AdaptTrainer):
    """The Trainer of an adaptation with IVON.

    Its curvature is that of the added, contrast and memory terms of J / N by their weights. A
    removed row has none: the curvature of its loss is negative.

    Args:
        run: What is adapted, and how.
        objective: J / N, of a model and a batch.
        ivon: What IVON needs besides.
        arguments: Arguments of transformers' Trainer.
    """

    _logs_step_bound = True
    _inputs: dict[str, Tensor]  # of the micro-batch whose loss is computed

    def __init__(self, run: Run, objective: Loss, ivon: ForIvon, **arguments: object) -> None:
        self._ivon = ivon
        settings = IVON, ivon_arguments(run, ivon.weights)
        super().__init__(run, objective, optimizer_cls_and_kwargs=settings, **arguments)

    def compute_loss(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        *args: object,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, object]:
        """The objective on one micro-batch; the curvature too, where it is due."""
        self._inputs = inputs
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)

    def _add_curvature(self, scored: Tensor, of_loss: Likelihood, index: int) -> None:
        """One root-GGN draw on the scored logits, each observation by its weight in J."""
        scored = scored.float()
        weights = self._ivon.objective.curvature_weights(self._inputs)
        root = self._root(scored, of_loss, index) * weights.sqrt()[:, None]
        unwrap(self.optimizer).add_curvature((root * scored).sum(), self._ivon.objective.edited)


def ivon_arguments(run: Run, weights: WeightPart | None) -> dict[str, Any]:
    """Keyword arguments of IVON for a run.

    The loss is J / N, with N the edited observations, so that an `ess` of N is untempered Bayes.
    It is larger where IVON's noise would be too wide, as in a fine-tune. Then the prior grows with
    it, which leaves the mean's objective as it is:

        prior = N( theta_0, 1 / (tau S_w ess / N) ),   at least ess * 1e-6 of precision

    Args:
        run: The run, whose model is at its start.
        weights: The weight-space part that becomes the prior; None where it is in the loss or
            there is none.
    """
    units, model = run.units, run.loaded.model
    choices = ivon_choices(run.training, model, units.edited, units.steps)
    floor = choices.ess * run.training.weight_decay
    prior: dict[Tensor, tuple[Tensor, Tensor | float]] = {
        p: (p.detach().clone(), floor) for p in model.parameters() if p.requires_grad
    }
    for term in weights.terms if weights is not None else ():
        assert term.parameter is not None
        precision = (term.precision * (units.tau * choices.ess / units.edited)).clamp(min=floor)
        prior[term.parameter] = term.centre, precision.expand_as(term.parameter)
    return {
        "lr": units.lr,
        "weight_decay": run.training.weight_decay,
        "seed": run.config.seed,
        "prior": prior,
        **asdict(choices),
    }


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
    ivon: ForIvon | None = None,
    loss_before: float = 0.0,
) -> AdaptTrainer:
    """Make the Trainer of an adaptation.

    Args:
        run: What is adapted, and how.
        objective: J / N.
        arguments: From `adapt_arguments`.
        callbacks: What acts after a step.
        ivon: What IVON needs besides; None for AdamW.
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
    options: dict[str, object] = {
        "args": arguments,
        "train_dataset": Mixture(run.parts, items, run.config.seed),
    }
    if ivon is None:
        trainer = AdaptTrainer(run, objective, **options)
    else:
        trainer = IvonAdaptTrainer(run, objective, ivon, **options)
    refuse_accelerator(trainer.accelerator, ivon=ivon is not None)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    # The last one: it vouches for what the others have written.
    trainer.add_callback(CheckpointMarker(trainer, run.identity, loss_before))
    return trainer
