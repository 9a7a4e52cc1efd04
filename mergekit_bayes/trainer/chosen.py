"""What `IvonTrainer` and `IvonSFTTrainer` do where nothing is said of IVON: they choose, and store.

The settings follow from the arguments of the Trainer, the data and the number of steps, by the
rules of `bmerge finetune` (`choices`). `save_model` stores the posterior beside the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import INITIAL_A
from mergekit_bayes.optim import IVON
from mergekit_bayes.ranks import on_main
from mergekit_bayes.trainer.choices import WEIGHT_DECAY, initial_a, ivon_settings
from mergekit_bayes.trainer.mixin import IvonTrainerMixin, unwrap
from mergekit_bayes.trainer.saving import Unit, gathered, store, stored_precision

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments
    from transformers.trainer_utils import TrainOutput

_IGNORED = -100  # the label that transformers' losses leave out
_COUNTED = 10_000  # rows of which all are counted; of more rows, as many evenly spaced ones
# Arguments of the Trainer that IVON does not take, and what takes their place.
_OF_ADAMW = {
    "optim": "to train with another optimizer, use the Trainer that this one is made from",
    "adam_beta1": "give ivon={'beta1': ...}",
    "adam_beta2": "beta2 is the memory of the Hessian, and follows from the number of steps",
    "adam_epsilon": "the prior bounds the Hessian from below",
    "weight_decay": "that of IVON is the prior precision over ess, ivon={'weight_decay': 1e-6}",
    "max_grad_norm": "gradients are taken before they are clipped, and clip_radius bounds a step",
}


class ChosenIvonMixin(IvonTrainerMixin):
    """Base to put in front of a Trainer that trains with IVON without being told how.

    `args.learning_rate` bounds the change of a weight in one step, as about with AdamW. Gradients
    are not clipped by norm, because `clip_radius` takes its place.

    Args:
        *args: Arguments of the Trainer.
        ivon: Settings of IVON that should not be chosen, such as `{"curvature": "price"}`.
        **kwargs: Arguments of the Trainer. With `optimizer_cls_and_kwargs` nothing is chosen.

    Raises:
        ConfigError: A setting that means something else to IVON, or has no meaning to it.
    """

    _steps: int | None = None  # of the whole run
    _loader: "DataLoader[Any]"
    _start: dict[str, str]  # what is recorded of the adapter that training starts from
    _seen: tuple[float, Unit] | None = None  # observations of the data, and their unit

    def __init__(
        self, *args: object, ivon: Mapping[str, Any] | None = None, **kwargs: object
    ) -> None:
        self._given = dict(ivon or {})
        super().__init__(*args, **kwargs)
        has_adapter = hasattr(self.model, "peft_config")
        self._start = {INITIAL_A: initial_a(self.model)} if has_adapter else {}
        self._chooses = self._logs_step_bound = self.optimizer_cls_and_kwargs is None
        if self._chooses:
            _refuse(self.args)
            self.args.max_grad_norm = 0.0
        elif ivon is not None:
            raise ConfigError("ivon and optimizer_cls_and_kwargs: give one of them.")

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object
    ) -> "TrainOutput":
        """Train. The adapter that a resumed run began with is not known, so none is recorded."""
        if resume_from_checkpoint:
            self._start = {}
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(
        self, args: "TrainingArguments", dataloader: "DataLoader[Any]"
    ) -> tuple[Any, ...]:
        """The Trainer's own values, of which IVON's settings need the number of steps."""
        values: tuple[Any, ...] = super().set_initial_training_values(args, dataloader)  # type: ignore[misc]
        self._steps, self._loader = int(values[-1]), dataloader
        return values

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Choose IVON's settings where none were given, and make it.

        Raises:
            ConfigError: Settings with which IVON does not work, or data without a length.
        """
        if self.optimizer is None and self._chooses:
            if self._steps is None:
                loader = self.get_train_dataloader()  # type: ignore[attr-defined]
                self.set_initial_training_values(self.args, loader)
            assert self._steps is not None
            settings = {"weight_decay": WEIGHT_DECAY, "seed": self.args.seed} | self._given
            self.optimizer_cls_and_kwargs = (
                IVON,
                ivon_settings(
                    self.model if model is None else model,
                    # With an ess of their own, users need no count before the model is stored.
                    0.0 if "ess" in self._given else self.observations[0],
                    self._steps,
                    **({"learning_rate": self.args.learning_rate} | settings),
                ),
            )
        return super().create_optimizer(model)

    @property
    def observations(self) -> tuple[float, Unit]:
        """Number of observations in the training data, and what one is.

        A scored token, where labels have the shape of the tokens, else an example. Of more than
        10,000 rows, 10,000 evenly spaced ones are counted.

        Raises:
            ConfigError: The data have no length.
        """
        if self._seen is None:
            self._seen = _count(self._loader, self.args.train_batch_size)
        return self._seen

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, and the posterior beside it.

        A checkpoint during training holds no posterior, but the optimizer from which it follows.

        Raises:
            ConfigError: A posterior that no record describes.
        """
        super().save_model(output_dir, _internal_call=_internal_call)  # type: ignore[misc]
        if _internal_call or self.optimizer is None:
            return
        optimizer = unwrap(self.optimizer)
        model = self.accelerator.unwrap_model(self.model)
        precision = gathered(stored_precision(model, optimizer))
        observations, unit = self.observations
        start = getattr(model, "name_or_path", None)
        on_main(
            lambda: store(
                Path(output_dir or str(self.args.output_dir)),
                model,
                optimizer,
                precision,
                observations=observations,
                unit=unit,
                base=start if start and Path(start).is_dir() else None,
                training=self._start,
                force=True,  # the Trainer has replaced the model
            )
        )


def _refuse(args: "TrainingArguments") -> None:
    """Refuse arguments of another optimizer, whose numbers mean something else to IVON."""
    fields = type(args).__dataclass_fields__
    for name, advice in _OF_ADAMW.items():
        value = getattr(args, name, None)
        if value not in (fields[name].default, 0, None):
            found = getattr(value, "value", value)
            raise ConfigError(f"{name}: {found} has no effect on IVON. Leave it out; {advice}.")


def _count(loader: "DataLoader[Any]", batch_size: int) -> tuple[float, Unit]:
    data: Any = loader.dataset
    try:
        rows = len(data)
    except TypeError:
        raise ConfigError(
            "the training data have no length, so their observations cannot be counted. Give a "
            "data set with one, or store the model by save_trained(..., observations=)."
        ) from None
    collate: Any = loader.collate_fn
    indices = [i * rows // _COUNTED for i in range(_COUNTED)] if rows > _COUNTED else range(rows)
    total, unit = 0, "token"
    with torch.random.fork_rng(devices=[]):  # a collator may draw
        for first in range(0, len(indices), batch_size):
            batch = collate([data[i] for i in indices[first : first + batch_size]])
            count, unit = _observations(batch)
            total += count
    return round(total * rows / max(1, len(indices))), unit  # type: ignore[return-value]


def _observations(batch: Mapping[str, Any]) -> tuple[int, Unit]:
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    if isinstance(labels, Tensor) and isinstance(tokens, Tensor) and labels.shape == tokens.shape:
        return int((labels[..., 1:] != _IGNORED).sum()), "token"
    return len(next(iter(batch.values()))), "example"
