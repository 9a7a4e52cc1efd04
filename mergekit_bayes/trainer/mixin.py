"""IVON inside `transformers.Trainer`: a mixin that samples where the Trainer itself cannot.

    class Trainer(IvonTrainerMixin, transformers.Trainer): ...
    Trainer(..., optimizer_cls_and_kwargs=(IVON, {"lr": 0.1, "ess": 1e7}))

The micro-batches of a step are collected until the last one is there. Then each weight sample sees
all of them. So several samples, antithetic pairs, gradient accumulation and DDP are right, and a
callback that stops training in the middle of a step finds the weights unperturbed.

With `curvature="ggn"` every k-th step has one more backward pass, on the logits of the step. That
works for causal language models and for classifiers with one label; other losses are refused. A
classifier's loss is the mean over the whole step (`classification_loss`), unlike transformers' own.
After `load_best_model_at_end` the weights and the posterior are those of the same checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config as compiled_backward
from torch import Tensor

from mergekit_bayes.curvature.outputs import SEQUENCE, likelihood, loss_name, scored_logits
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.heads import Likelihood
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.rates import step_bound
from mergekit_bayes.trainer.logits import draw_root
from mergekit_bayes.trainer.losses import (
    classification_loss,
    is_causal,
    is_single_label,
    refuse_other_losses,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput


def unwrap(optimizer: object) -> IVON:
    """The IVON inside accelerate's wrapper, which hides `sampled_params`.

    Raises:
        ConfigError: The optimizer is another one.
    """
    while not isinstance(optimizer, IVON):
        if not hasattr(optimizer, "optimizer"):
            raise ConfigError(f"the trainer's optimizer is {type(optimizer).__name__}, not IVON.")
        optimizer = optimizer.optimizer
    return optimizer


class IvonTrainerMixin:
    """Base to put in front of `transformers.Trainer` (or trl's `SFTTrainer`).

    Set `max_grad_norm=0`: clipping by norm would act after the samples were taken, and IVON's own
    `clip_radius` takes its place. A sequence classifier without a `compute_loss_func` gets
    `classification_loss`; one for regression or for several labels gets the mean of its
    micro-batches' losses.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    accelerator: "Accelerator"
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    args: "TrainingArguments"
    state: "TrainerState"
    compute_loss_func: Callable[..., Tensor] | None
    label_smoother: object
    model_accepts_loss_kwargs: bool
    _loss_shifts_labels: bool
    _random: tuple[Tensor, Tensor | None]  # states of the generators before the last sample
    _collected: list[dict[str, Tensor]]  # micro-batches of the step that have come
    _observed: int | None = None  # index of the micro-batch whose curvature is due
    _logs_step_bound = False  # whether logs hold lr * clip_radius as the learning rate, or lr

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make IVON with one parameter group.

        With its own two groups the Trainer would set IVON's prior precision to `args.weight_decay`.

        Raises:
            ConfigError: Arguments of the Trainer with which IVON does not work.
        """
        if self.args.max_grad_norm:
            raise ConfigError(
                "IVON takes its gradients before the Trainer clips them: set max_grad_norm=0."
            )
        if self.accelerator.scaler is not None:
            raise ConfigError(
                "IVON does not work with the fp16 gradient scaler. Use bf16 instead of fp16."
            )
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs are visible to one process: the Trainer would copy the "
                "model to each, and the copies would not see IVON's samples. Start a process for "
                "each (accelerate launch, torchrun), or show one (CUDA_VISIBLE_DEVICES=0)."
            )
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise ConfigError(
                "load_best_model_at_end with save_only_model: the best checkpoint would have "
                "weights and no posterior. Set save_only_model=False."
            )
        if self.optimizer is None:
            optimizer_class, arguments = self.optimizer_cls_and_kwargs
            model = self.model if model is None else model
            trainable = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = optimizer_class(trainable, **arguments)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """The learning rate for the log, in the unit in which it was given."""
        rate: float = super()._get_learning_rate()  # type: ignore[misc]
        return (
            step_bound(unwrap(self.optimizer).param_groups[0], rate)
            if self._logs_step_bound
            else rate
        )

    def train(self, *args: object, **kwargs: object) -> "TrainOutput":
        """Train. Micro-batches that an interrupted step left are dropped first."""
        self._collected = []
        # A compiled model may give its buffers up in a backward pass, and the curvature needs two.
        with compiled_backward.patch(donated_buffer=False):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint and the optimizer state saved with them."""
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint
        if not any(Path(best).glob("optimizer*")):
            raise CheckpointError(
                f"'{best}' is the best checkpoint and holds no optimizer.pt, so its posterior is "
                "lost. Train again, or store a precision of its weights with bmerge precision."
            )
        self._load_optimizer_and_scheduler(best)  # type: ignore[attr-defined]

    def get_batch_samples(
        self, *args: object, **kwargs: object
    ) -> tuple[list[dict[str, Tensor]], Tensor | int | None]:
        """Fetch the micro-batches of a step, and correct what transformers assumes of the loss.

        Raises:
            ConfigError: `curvature="ggn"` with a loss that it does not know.
        """
        self.__dict__.setdefault("_collected", []).clear()
        if is_causal(self.model):
            # transformers tells by the class name which losses do not score a row's first token,
            # misses GPT2LMHeadModel's, and would divide by too many. This is the loss itself, which
            # such models fall back to.
            self._loss_shifts_labels = True
        samples, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if samples and unwrap(self.optimizer).curvature == "ggn":
            refuse_other_losses(self.model, samples[0])
        has_own_loss = self.compute_loss_func is None and self.label_smoother is None
        ignores_count = has_own_loss and loss_name(self.model) == SEQUENCE
        if samples and ignores_count and self.model_accepts_loss_kwargs:
            if is_single_label(self.model, samples[0].get("labels")):
                self.compute_loss_func = classification_loss
            else:  # the Trainer then takes the mean over micro-batches and ranks
                self.model_accepts_loss_kwargs, count = False, None
        return samples, count

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Collect micro-batches up to the last one of a step, then run all under each sample.

        Returns:
            The mean loss of the step over the samples; zero for a micro-batch that is collected.
        """
        collected = self._collected
        collected.append(inputs)
        loss = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return loss
        optimizer = unwrap(self.optimizer)
        samples = int(optimizer.defaults["mc_samples"])
        try:
            for k in range(samples):
                is_mirrored = optimizer.antithetic and k % 2 == 1
                with optimizer.sampled_params(train=True), _dropout(self, repeat=is_mirrored):
                    model.zero_grad(set_to_none=True)
                    is_due = optimizer.curvature_due
                    for i, batch in enumerate(collected):
                        self._observed = i if is_due else None
                        # With noise per rank the optimizer reduces the gradients itself.
                        reduces = i == len(collected) - 1 and not optimizer.rank_noise
                        with nullcontext() if reduces else self.accelerator.no_sync(model):
                            loss += super().training_step(model, dict(batch), num_items_in_batch)  # type: ignore[misc]
        finally:
            self._observed = None
            collected.clear()
        return loss / samples

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        *args: object,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, object]:
        """The Trainer's loss. Where the curvature is due, one more backward pass gives its squares.

        Raises:
            ConfigError: The curvature is due and the model returns no logits.
        """
        result: Tensor | tuple[Tensor, object]
        if self._observed is None:
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)  # type: ignore[misc]
            return result
        module = self.accelerator.unwrap_model(model)
        # The Trainer takes the labels out of the inputs where it computes the loss itself.
        labels, tokens = inputs.get("labels"), inputs.get("input_ids")
        outputs: list[Tensor | None] = []
        hook = module.register_forward_hook(lambda *call: outputs.append(_logits(call[-1])))
        try:
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()
        logits = next((tensor for tensor in outputs if tensor is not None), None)
        if logits is None:
            # The loss of trl's SFTTrainer makes the logits piece by piece: run one more forward.
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            logits = _logits(module(**unlabelled))
        if logits is None:
            raise ConfigError(
                "curvature='ggn' needs a model that returns its logits. Use curvature='price'."
            )
        scored = scored_logits(logits, labels, tokens)
        self._add_curvature(scored, likelihood(module, labels), self._observed)
        return result

    def _add_curvature(self, scored: Tensor, of_loss: Likelihood, index: int) -> None:
        """Give IVON one root-GGN draw on the scored logits of micro-batch `index`."""
        scored = scored.float()
        root = self._root(scored, of_loss, index)
        unwrap(self.optimizer).add_curvature((root * scored).sum(), len(scored))

    def _root(self, scored: Tensor, of_loss: Likelihood, index: int) -> Tensor:
        """One random root of the Hessian in the scored logits, drawn for this micro-batch."""
        optimizer, rank = unwrap(self.optimizer), self.accelerator.process_index
        return draw_root(optimizer, scored, of_loss, index, rank)


def _logits(outputs: object) -> Tensor | None:
    """The logits that a model has returned, if they have their graph."""
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.requires_grad else None


@contextmanager
def _dropout(trainer: IvonTrainerMixin, *, repeat: bool) -> Iterator[None]:
    """Keep the state of the dropout masks, or `repeat` those of the sample before.

    The second sample of an antithetic pair sees the masks of the first.
    """
    if repeat:
        on_cpu, on_gpu = trainer._random
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
    else:
        on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        trainer._random = (torch.get_rng_state(), on_gpu)
    yield
