"""IVON inside `transformers.Trainer`: a mixin that opens the sampling context where the Trainer
cannot.

    class Trainer(IvonTrainerMixin, transformers.Trainer): ...
    Trainer(..., optimizer_cls_and_kwargs=(IVON, {"lr": 0.1, "ess": 1e7}))

Micro-batches of a step are kept until the last one has come; then each weight sample sees all of
them. So several samples, antithetic pairs, gradient accumulation and DDP are right, and a callback
that stops in the middle of a step finds nothing perturbed. With `curvature="ggn"` every k-th step
has one more backward, on the logits of the step; that is for causal language models and classifiers
with one label, other losses are refused. A classifier's loss is the mean over the whole step
(`classification_loss`), which transformers' own is not. After `load_best_model_at_end` weights and
posterior are those of the same, best checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.curvature.ggn import random_root
from mergekit_bayes.curvature.outputs import likelihood, scored_logits
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.noise import mix


def unwrap(optimizer: Any) -> IVON:
    """The IVON inside accelerate's wrapper, which hides `sampled_params`."""
    while not isinstance(optimizer, IVON):
        if not hasattr(optimizer, "optimizer"):
            raise ConfigError(f"the trainer's optimizer is {type(optimizer).__name__}, not IVON.")
        optimizer = optimizer.optimizer
    return optimizer


def classification_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy, mean over the examples of the whole step.

    The loss inside transformers' classifiers is the mean of one micro-batch, and since they take
    the step's count
    without using it, the Trainer adds those means up: with k micro-batches on each of R ranks the
    gradient is k R times too large.
    """
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float(), labels.view(-1), reduction="sum"
    )
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class IvonTrainerMixin:
    """Put in front of `transformers.Trainer` (or trl's `SFTTrainer`); set `max_grad_norm=0`.

    Gradient clipping by norm would act after the samples were taken, so IVON's own `clip_radius`
    does its work. A sequence classifier for which no `compute_loss_func` was given has
    `classification_loss`; one for regression or several labels has the mean of its micro-batches'
    losses.
    """

    model: Any
    optimizer: Any
    accelerator: Any
    optimizer_cls_and_kwargs: Any
    args: Any
    state: Any
    compute_loss_func: Any
    label_smoother: Any
    model_accepts_loss_kwargs: bool
    _loss_shifts_labels: bool
    _held: list[dict[str, Any]]
    _observing: int | None = None  # the micro-batch whose curvature is due

    def create_optimizer(self, model: Any = None) -> Any:
        """One parameter group: the Trainer's two would set IVON's prior precision to
        `args.weight_decay`.
        """
        if self.args.max_grad_norm:
            raise ConfigError(
                "IVON takes its gradients before the Trainer clips them: set max_grad_norm=0."
            )
        if self.accelerator.scaler is not None:
            raise ConfigError(
                "IVON does not work with the fp16 gradient scaler. Use bf16 instead of fp16."
            )
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise ConfigError(
                "load_best_model_at_end with save_only_model: the best checkpoint would have "
                "weights and no posterior. "
                "Set save_only_model=False."
            )
        if self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs
            model = self.model if model is None else model
            self.optimizer = kind([p for p in model.parameters() if p.requires_grad], **settings)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._held = []  # whatever an earlier run that stopped in the middle of a step left
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, and the optimizer's state that was saved with them."""
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint
        if not any(Path(best).glob("optimizer*")):
            raise CheckpointError(
                f"'{best}' is the best checkpoint and holds no optimizer.pt, so its posterior is "
                "lost. Train again, or "
                "store a precision of its weights with bmerge precision."
            )
        self._load_optimizer_and_scheduler(best)  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer fetches a step's micro-batches here: whatever an interrupted step left is
        dropped.
        """
        self.__dict__.setdefault("_held", []).clear()
        # transformers knows by the class name which losses do not score a row's first token, not
        # GPT2LMHeadModel's, and would divide by too many. This is the loss itself, which such
        # models fall back to.
        loss = _loss_name(self.model)
        if loss == _CAUSAL and not getattr(self.model.config, "is_encoder_decoder", False):
            self._loss_shifts_labels = True
        samples, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if samples and unwrap(self.optimizer).curvature == "ggn":
            _refuse_other_losses(self.model, loss, samples[0])
        ignores_count = (
            loss == _SEQUENCE and self.compute_loss_func is None and self.label_smoother is None
        )
        if samples and ignores_count and self.model_accepts_loss_kwargs:
            if _is_single_label(self.model, samples[0].get("labels")):
                self.compute_loss_func = classification_loss
            else:  # the Trainer then takes the mean over micro-batches and ranks
                self.model_accepts_loss_kwargs, count = False, None
        return samples, count

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Hold micro-batches back until the last one of a step, then run all of them under each
        sample.
        """
        held = self._held
        held.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        optimizer = unwrap(self.optimizer)
        samples = int(optimizer.defaults["mc_samples"])
        loss = torch.zeros((), device=self.args.device)
        try:
            for k in range(samples):
                again = optimizer.antithetic and k % 2 == 1
                with optimizer.sampled_params(train=True), _dropout(self, again):
                    model.zero_grad(set_to_none=True)
                    due = optimizer.curvature_due
                    for i, batch in enumerate(held):
                        last = i == len(held) - 1
                        self._observing = i if due else None
                        # With noise of their own the ranks' gradients are reduced by the optimizer.
                        with (
                            nullcontext()
                            if last and not optimizer.rank_noise
                            else self.accelerator.no_sync(model)
                        ):
                            loss += super().training_step(model, dict(batch), num_items_in_batch)  # type: ignore[misc]
        finally:
            self._observing = None
            held.clear()
        return loss / samples

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loss; where the curvature is due, the squares of one more backward first."""
        if self._observing is None:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)  # type: ignore[misc]
        labels, tokens = inputs.get("labels"), inputs.get("input_ids")
        bare, made = self.accelerator.unwrap_model(model), []
        handle = bare.register_forward_hook(
            lambda module, arguments, outputs: made.append(_logits(outputs))
        )
        try:
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            handle.remove()
        logits = next((found for found in made if found is not None), None)
        if (
            logits is None
        ):  # the loss of trl's SFTTrainer makes them piece by piece: one more forward
            logits = _logits(
                bare(**{name: value for name, value in inputs.items() if name != "labels"})
            )
        if logits is None:
            raise ConfigError(
                "curvature='ggn' needs a model that returns its logits. Use curvature='price'."
            )
        optimizer = unwrap(self.optimizer)
        group = optimizer.param_groups[0]
        seed = mix(
            group["seed"], group["steps"], self._observing, self.accelerator.process_index, 1
        )
        scored = scored_logits(logits, labels, tokens).float()
        signs = torch.Generator(scored.device).manual_seed(seed)
        root = random_root(scored.detach(), likelihood(bare), signs)
        optimizer.add_curvature((root * scored).sum(), len(scored))
        return result


# What transformers calls the losses, by `model.loss_function.__name__`.
_CAUSAL, _SEQUENCE = "ForCausalLMLoss", "ForSequenceClassificationLoss"


def _loss_name(model: Any) -> str | None:
    return getattr(getattr(model, "loss_function", None), "__name__", None)


def _is_single_label(model: Any, labels: Tensor | None) -> bool:
    """Whether transformers takes a sequence classifier's loss for softmax cross-entropy."""
    kind, count = (
        getattr(model.config, "problem_type", None),
        getattr(model.config, "num_labels", 0),
    )
    if kind is None and labels is not None:
        return bool(count > 1 and labels.dtype in (torch.long, torch.int))
    return bool(kind == "single_label_classification")


def _refuse_other_losses(model: Any, loss: str | None, batch: Any) -> None:
    """Raise a `ConfigError` where size or place of the scored logits would not be those of the
    loss.
    """
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    causal = loss == _CAUSAL and not getattr(model.config, "is_encoder_decoder", False)
    if causal and labels is not None and tokens is not None and labels.shape == tokens.shape:
        return
    if loss == _SEQUENCE and _is_single_label(model, labels):
        return
    raise ConfigError(
        "curvature='ggn' knows causal language models and classifiers with one label, and the "
        "loss of this "
        f"{type(model).__name__} ({loss or 'unknown'}) is neither, or its labels are of another "
        "shape. "
        "Use curvature='price'."
    )


def _logits(outputs: Any) -> Tensor | None:
    """The logits that a model has returned, with their graph."""
    found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) and found.requires_grad else None


@contextmanager
def _dropout(trainer: Any, again: bool) -> Iterator[None]:
    """The second of an antithetic pair sees the dropout masks of the first."""
    on_gpu = torch.cuda.is_available()
    if again:
        torch.set_rng_state(trainer._random[0])
        if on_gpu:
            torch.cuda.set_rng_state(trainer._random[1])
    else:
        trainer._random = (torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None)
    yield
