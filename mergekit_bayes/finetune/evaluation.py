"""Held-out loss during training: measuring it, choosing the best checkpoint and stopping early.

Everything that is decided follows from the losses in the Trainer's log, which its checkpoints
store: a resumed run decides what one that was never stopped does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_bayes.curvature.outputs import scored_logits, scored_targets
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.data import Run
from mergekit_bayes.models.encode import Collate, Example
from mergekit_bayes.models.modes import evaluating
from mergekit_bayes.ranks import mean_over_ranks, own_number, world

if TYPE_CHECKING:
    from accelerate import Accelerator

LOSS = "eval_loss"  # under which the Trainer's log has it
_PREFIX = "eval_"


class Best(NamedTuple):
    """The checkpoint with the lowest held-out loss: its step and its folder."""

    step: int
    path: Path


class Evaluated:
    """Base to put in front of a Trainer, whose `evaluate` measures a run's held-out data.

    The Trainer's own is the mean of its batches' losses, whatever they have of scored tokens.
    """

    model: torch.nn.Module
    accelerator: "Accelerator"
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    callback_handler: Any
    run: Run

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Measure the held-out data at the present mean, and log it. Every rank must call this."""
        found = measure(
            self.model,
            self.run.held_out,
            Collate(self.run.loaded.pad),
            self.run.config.batch_size,
            device=self.args.device,
            autocast=self.accelerator.autocast,
            is_classifier=self.run.loaded.task == "classification",
        )
        metrics = {_PREFIX + name: value for name, value in found.items()}
        self.log(metrics)  # type: ignore[attr-defined]
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    examples: Sequence[Example],
    collate: Collate,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    is_classifier: bool = False,
) -> dict[str, float]:
    """Mean loss over all scored tokens, or rows of a classifier, in eval mode.

    Ranks share the batches. All run the same number, since a sharded model is gathered in step.

    Args:
        model: The model.
        examples: Encoded rows with labels.
        collate: Makes their batches.
        batch_size: Rows of a batch.
        device: Where the batches go.
        autocast: Makes the context of a forward pass.
        is_classifier: Whether rows have one label each.

    Returns:
        `loss` in nats, and `perplexity` or `accuracy`, the share of rows.
    """
    starts = range(0, len(examples), batch_size)
    total, hits, count = 0.0, 0.0, 0.0
    with evaluating(model):
        for first in range(0, len(starts), world()):
            place = first + own_number()
            start = starts[place] if place < len(starts) else 0  # of a batch that is not counted
            rows = collate(examples[start : start + batch_size])
            batch = {name: tensor.to(device) for name, tensor in rows.items()}
            labels = batch.pop("labels")
            with autocast():
                logits = model(**batch).logits
            if place >= len(starts):
                continue
            tokens = batch["input_ids"]
            scored = scored_logits(logits, labels, tokens).float()
            targets = scored_targets(logits, labels, tokens)
            assert targets is not None
            total += float(torch.nn.functional.cross_entropy(scored, targets, reduction="sum"))
            count += len(targets)
            hits += float((scored.argmax(-1) == targets).sum())
    total, hits, count = (mean_over_ranks(value) * world() for value in (total, hits, count))
    loss = total / count
    if is_classifier:
        return {"loss": loss, "accuracy": hits / count}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # the range of a float


def has_lost_patience(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations had no lower loss than the best one before them.

    Args:
        history: The Trainer's log.
        patience: Number of evaluations.
    """
    losses = [entry[LOSS] for entry in history if isinstance(entry.get(LOSS), (int, float))]
    numbers = [loss if loss == loss else math.inf for loss in losses]
    return bool(numbers) and len(numbers) - 1 - numbers.index(min(numbers)) >= patience


class Patience(TrainerCallback):  # type: ignore[misc]
    """Ends training when the held-out loss has stopped falling.

    Args:
        patience: As `has_lost_patience` takes it.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Stop after this step."""
        if has_lost_patience(state.log_history, self._patience):
            control.should_training_stop = True


class BestCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Names the best checkpoint when it is there.

    The Trainer looks for its folder while it writes it, and misses one that a sharded model's
    ranks make later.
    """

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Look once more, after all files are written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and folder.is_dir():
            state.best_model_checkpoint = str(folder)


def has_ended(checkpoint: Checkpoint | None, patience: int | None) -> bool:
    """Whether the run of a checkpoint had stopped early there."""
    if checkpoint is None or patience is None:
        return False
    return has_lost_patience(_history(checkpoint), patience)


def best_of(checkpoint: Checkpoint) -> Best | None:
    """The best checkpoint that a run had when it wrote this one; None before any had a loss.

    Raises:
        CheckpointError: The record of it is none, or it is not there any more.
    """
    step = _state(checkpoint).get("best_global_step")
    if step is None:
        return None
    if not isinstance(step, int) or not 0 < step <= checkpoint.step:
        raise CheckpointError(
            f"{checkpoint.path / _STATE}: best_global_step is {step!r}, expected a step of the "
            f"run. Remove {checkpoint.path}, to resume from the checkpoint before it."
        )
    path = checkpoint.path.with_name(f"checkpoint-{step}")
    if not path.is_dir():
        raise CheckpointError(
            f"'{path}' is the best checkpoint of the run that '{checkpoint.path}' continues, and "
            "it is gone. Put it back, or leave --resume out and start again with --force."
        )
    return Best(step, path)


def measured_at(history: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, float]:
    """The last evaluation of a log, or that of a step, without the prefix of its names."""
    found = [e for e in history if LOSS in e and step in (None, e.get("step"))]
    names = (LOSS, "eval_perplexity", "eval_accuracy")
    return {n.removeprefix(_PREFIX): float(found[-1][n]) for n in names if found and n in found[-1]}


_STATE = "trainer_state.json"


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_mapping(
        checkpoint.path / _STATE,
        f"Remove {checkpoint.path}, to resume from the checkpoint before it.",
    )


def _history(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    history = _state(checkpoint).get("log_history")
    return [e for e in history if isinstance(e, Mapping)] if isinstance(history, list) else []
