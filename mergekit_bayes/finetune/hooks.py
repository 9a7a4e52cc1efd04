"""What a fine-tune adds to transformers' Trainer: health in the log, a bar, checkpoint markers.

transformers' own callbacks print on stdout, which belongs to the result of the command.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from mergekit_bayes.finetune.checkpoints import mark_whole
from mergekit_bayes.finetune.data import Run
from mergekit_bayes.finetune.evaluation import LOSS, Evaluated
from mergekit_bayes.finetune.health import LOGGED, HealthMonitor
from mergekit_bayes.finetune.shard_files import ShardsMixin
from mergekit_bayes.ranks import mean_over_ranks
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap


class PlainRunTrainer(Evaluated, ShardsMixin, Trainer):  # type: ignore[misc]
    """The Trainer of a run with AdamW."""

    def __init__(self, run: Run, **arguments: object) -> None:
        self.run = run
        super().__init__(**arguments)


class IvonRunTrainer(Evaluated, IvonTrainerMixin, ShardsMixin, Trainer):  # type: ignore[misc]
    """The Trainer of a run with IVON, whose log holds the posterior's health beside the loss."""

    _logs_step_bound = True

    def __init__(self, run: Run, **arguments: object) -> None:
        self.run = run
        self._step_observations = run.choices.batch_size
        self._logged = LOGGED[run.config.curvature]
        self._monitor = HealthMonitor(run.config)
        self._gradient_norm = 0.0
        super().__init__(**arguments)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As the mixin's; the norm of the gradient is kept for the log of the step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        is_logged = (self.state.global_step + 1) % self.args.logging_steps == 0
        if is_logged and self.accelerator.sync_gradients:
            self._gradient_norm = unwrap(self.optimizer).gradient_norm()
        return loss

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Add the health numbers to the log of a step, and warn of problems."""
        if "loss" in logs:
            health = unwrap(self.optimizer).health(self._step_observations)
            self._monitor.warn(health)
            norm = {"grad_norm": self._gradient_norm}
            logs = {**logs, **norm, **{name: health[name] for name in self._logged}}
        super().log(logs, *args, **kwargs)


class ProgressBar(ProgressCallback):  # type: ignore[misc]
    """On stderr: a first line, a line for each log, and on a terminal a bar.

    Args:
        first_line: Printed when training begins.
        patience: Evaluations after which training may end early, if it may.
    """

    def __init__(self, first_line: str, patience: int | None = None) -> None:
        super().__init__()
        self._first_line = first_line
        self._patience = patience

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Print the first line and open the bar."""
        if state.is_world_process_zero:
            print(self._first_line, file=sys.stderr)
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Say if training ended before its last step, and close the bar."""
        if state.is_world_process_zero and self._patience and state.global_step < state.max_steps:
            losses = "evaluation" if self._patience == 1 else f"{self._patience} evaluations"
            self.say(
                f"step {state.global_step}/{state.max_steps}  stopped by patience: no lower "
                f"held-out loss in the last {losses}"
            )
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Print loss, learning rate and health, or a held-out loss, above the bar."""
        if not state.is_world_process_zero or logs is None:
            return
        if LOSS in logs:
            line = f"step {state.global_step}/{state.max_steps}  held out:"
            for name in (LOSS, "eval_perplexity", "eval_accuracy"):
                if name in logs:
                    line += f"  {name.removeprefix('eval_')} {float(logs[name]):.4g}"
            self.say(line)
        if "loss" not in logs:
            return
        line = f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4g}"
        for name in ("learning_rate", "grad_norm", *LOGGED["price"]):
            if name in logs:
                line += f"  {name} {float(logs[name]):.3g}"
        self.say(line)
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.training_bar is None:
            print(line, file=sys.stderr)
        else:
            self.training_bar.write(line, file=sys.stderr)


class CheckpointMarker(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as complete when every rank has written its files.

    Args:
        trainer: The Trainer, which knows the loss since it was started.
        identity: What the marker stores of the run.
        loss_before: Sum of the training loss over the steps before this start.
    """

    def __init__(
        self, trainer: Trainer, identity: Mapping[str, object], loss_before: float
    ) -> None:
        self._trainer = trainer
        self._identity = identity
        self._loss_before = loss_before

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Mark the checkpoint. Every rank comes here after writing, and the mean waits for all."""
        total = self._trainer._total_loss_scalar + float(self._trainer._tr_loss)
        loss = self._loss_before + mean_over_ranks(total)
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_whole(path, state.global_step, self._identity, loss)
