"""Settings that a fine-tune chooses itself: learning rate, steps, ess, decay of the Hessian.

What was left out of the settings is chosen from the model, the data and the length of the run.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mergekit_bayes.finetune.rates import learning_rate, optimizer_rate
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.lora import INITIAL_A
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.trainer.choices import IvonChoices, choose_ivon, initial_a


@dataclass(frozen=True)
class Choices:
    """How a run trains, after every default is filled in.

    Attributes:
        optimizer: `ivon` or `adamw`.
        learning_rate: At the start: the largest change of a weight in a step with IVON.
        lr: The same as the optimizer takes it: for IVON in the published unit.
        weight_decay: Prior precision over `ess` for IVON; decoupled weight decay for AdamW.
        scheduler: Learning-rate schedule, by its name in transformers.
        steps: Optimizer steps of the whole run; the last step of an epoch may be smaller.
        batch_size: Mean number of observations in a step, over micro-batches and ranks.
        processes: Number of ranks.
        loss_reduction: How the loss of a step averages, in words.
        initial_a: Hash of the A factors that an adapter starts from; None without an adapter.
        ivon: Arguments of IVON; None for AdamW.
    """

    optimizer: Literal["ivon", "adamw"]
    learning_rate: float
    lr: float
    weight_decay: float
    scheduler: str
    steps: int
    batch_size: float
    processes: int
    loss_reduction: str
    initial_a: str | None
    ivon: IvonChoices | None

    def record(self) -> dict[str, str | float]:
        """The choices under the names by which posteriors and checkpoints store them."""
        fields: dict[str, str | float] = {
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "scheduler": self.scheduler,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "processes": self.processes,
            "loss_reduction": self.loss_reduction,
        }
        if self.initial_a is not None:
            fields[INITIAL_A] = self.initial_a
        if self.ivon is not None:
            fields |= dataclasses.asdict(self.ivon)
        return fields

    def ivon_arguments(self, seed: int) -> dict[str, str | float]:
        """Keyword arguments of `IVON`. Only for a run that trains with it."""
        assert self.ivon is not None
        return {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "seed": seed,
            **dataclasses.asdict(self.ivon),
        }

    def summary(self, unit: str) -> str:
        """One line for the user, including what was chosen for them.

        Args:
            unit: Name of one observation, `token` or `example`.
        """
        steps = f"{self.steps:,} step{'s' * (self.steps != 1)}"
        ivon = self.ivon
        meaning = f" (bound of a weight's change a step; lr {self.lr:g})" if ivon else ""
        line = (
            f"{steps} of {self.batch_size:,.0f} {unit}s, {self.optimizer}: learning_rate "
            f"{self.learning_rate:g}{meaning}, weight_decay {self.weight_decay:g}"
        )
        if ivon is None:
            return line
        line += f", clip_radius {ivon.clip_radius:g}, ess {ivon.ess:.3g}, beta2 {ivon.beta2:.6g}"
        if ivon.curvature == "ggn":
            damping = f", damping {ivon.damping:.3g}" if ivon.damping else ""
            return f"{line}{damping}, curvature ggn every {ivon.curvature_every} steps"
        samples = f", {ivon.mc_samples} samples" if ivon.mc_samples > 1 else ""
        return f"{line}, curvature price, hess_init {ivon.hess_init:g}{samples}"


def choose(
    config: FinetuneConfig, loaded: Loaded, examples: Sequence[Mapping[str, object]], processes: int
) -> Choices:
    """Fill in what the settings leave open.

    Args:
        config: Settings of the run.
        loaded: The model that is trained, with its adapter if there is one.
        examples: Encoded training data.
        processes: Number of ranks that train.
    """
    micro_batches = math.ceil(len(examples) / (config.batch_size * processes))
    per_epoch = math.ceil(micro_batches / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    examples_per_step = config.batch_size * config.gradient_accumulation * processes
    total = observations(examples, loaded.task)
    rate = learning_rate(config, steps, loaded.task)
    return Choices(
        optimizer=config.optimizer,
        learning_rate=rate,
        lr=optimizer_rate(config, rate),
        weight_decay=config.weight_decay,
        scheduler=config.scheduler,
        steps=steps,
        batch_size=total / len(examples) * examples_per_step,
        processes=processes,
        loss_reduction=f"mean over {UNIT[loaded.task]}s of a step",
        initial_a=None if config.lora is None else initial_a(loaded.model),
        ivon=ivon_choices(config, loaded.model, total, steps)
        if config.optimizer == "ivon"
        else None,
    )


def ivon_choices(
    config: FinetuneConfig, model: torch.nn.Module, total: int, steps: int
) -> IvonChoices:
    """Arguments of IVON for a model, of which some follow from the data and the run's length.

    Args:
        config: Settings of the run.
        model: The model that is trained, with its adapter if there is one.
        total: Observations of the data.
        steps: Optimizer steps of the whole run.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(IvonChoices)}
    return choose_ivon(model, total, steps, weight_decay=config.weight_decay, **given)
