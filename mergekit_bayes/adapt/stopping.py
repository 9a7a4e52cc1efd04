"""End a run when its goal is reached, and leave the weights of its best check.

With goals the run ends at the first check that reaches one of them within the budget, and that
check's weights are kept. A check above the budget ends the run too. Where no goal was reached, the
kept check is, of those within the budget, the one that has come farthest:

    (start - toxic_share) / (start - goal)  or  held_out_rise / goal,   the larger of the two

which is the lowest share of toxic continuations, or the largest rise; of equal ones the earliest.
Under a budget alone it is the last check within it, and without goals the last step.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_bayes.adapt.checks import Autocast, Checks
from mergekit_bayes.adapt.data import Run
from mergekit_bayes.adapt.leap import LeapGuard
from mergekit_bayes.adapt.settings import Check, Until
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.libraries import call
from mergekit_bayes.ranks import is_main

logger = logging.getLogger(__name__)

STATE = "stopping.pt"  # in a checkpoint; `refuse_broken` tries whether it can be read


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        steps: Optimizer steps made.
        kept_step: The step whose weights the model has now.
        reached: Whether a goal was reached; None without one.
        checks: What each check found.
        refused_steps: Steps that were undone.
    """

    steps: int
    kept_step: int
    reached: bool | None = None
    checks: tuple[Check, ...] = ()
    refused_steps: int = 0


def progress(check: Check, start: Check, until: Until) -> float | None:
    """The share of the way from the start to the nearest goal, 1 or more if it is reached.

    Args:
        check: A check.
        start: The check before the first step.
        until: The goals.

    Returns:
        None if there is no goal but the budget.
    """
    shares = []
    if until.toxic_share is not None:
        assert check.toxic_share is not None
        assert start.toxic_share is not None
        is_there = check.toxic_share <= until.toxic_share  # as the start may be: no way to go
        way = start.toxic_share - until.toxic_share
        shares.append(1.0 if is_there else (start.toxic_share - check.toxic_share) / way)
    if until.held_out_rise is not None:
        assert check.held_out_rise is not None
        shares.append(check.held_out_rise / until.held_out_rise)
    return max(shares, default=None)


def is_affordable(check: Check, until: Until) -> bool:
    """Whether a check is within the budget; a divergence that is not a number is not."""
    if until.memory_kl is None:
        return True
    return check.memory_kl is not None and check.memory_kl <= until.memory_kl


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Makes the checks, ends the run, and keeps the weights of the best check on the CPU.

    Every rank must have it, after the guard: all decide the same by what rank 0 has measured. Its
    state is written into every checkpoint, so that a resumed run goes on with the same checks.

    Args:
        run: The run, whose model is at its start.
        measure: Measures a check.
        guard: Whose state is stored with it.
        tell: Called with a line for each check; None on all ranks but the first, and where nothing
            is to be printed.

    Attributes:
        is_over: Whether the run has ended before its last step.
    """

    def __init__(
        self, run: Run, measure: Checks, guard: LeapGuard, tell: Callable[[str], None] | None
    ) -> None:
        self._run, self._measure, self._guard, self._tell = run, measure, guard, tell
        self._until = run.config.until
        self._checks: list[Check] = []
        self._kept: int | None = None
        self._weights: dict[str, Tensor] | None = None
        self.is_over = False

    def begin(self, checkpoint: Checkpoint | None, autocast: Autocast = nullcontext) -> None:
        """Check the start, or go on where a checkpoint was. Every rank must call this.

        Args:
            checkpoint: Where the run is resumed.
            autocast: As the training computes.

        Raises:
            CheckpointError: The checkpoint does not hold what this run has stored in it.
            ConfigError: The prompts cannot be continued or scored.
        """
        self._measure.autocast = autocast
        if checkpoint is not None:
            call(
                f"'{checkpoint.path / STATE}' cannot be read",
                lambda: self._restore(checkpoint.path),
                f"Remove {checkpoint.path}: --resume then takes the one before it.",
            )
        elif self._run.config.has_checks:
            self._check(0)
            if self.is_over and is_main():
                logger.warning("until: the start has reached the goal already; nothing is trained.")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Check, every so many steps and after the last one."""
        config = self._run.config
        is_due = state.global_step % config.check_every == 0 or control.should_training_stop
        if is_due and config.has_checks:
            self._check(state.global_step)
            control.should_training_stop = control.should_training_stop or self.is_over

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Write the state into the checkpoint, before it is marked as complete."""
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        content = {
            "checks": [check.model_dump() for check in self._checks],
            "kept": self._kept,
            "weights": self._weights,
            "is_over": self.is_over,
            "measure": self._measure.state(),
            "guard": self._guard.state(),
        }
        call(f"{file}: writing failed", lambda: torch.save(content, file), "Free some space.")

    def finish(self, steps: int) -> Outcome:
        """Give the model the weights that are kept.

        Args:
            steps: Steps that were made.
        """
        kept = steps if self._kept is None else self._kept
        if kept != steps:
            assert self._weights is not None
            for name, parameter in self._trained().items():
                parameter.copy_(self._weights[name])
        self._weights = None
        reached = self._reached()
        if reached is False and is_main():
            found = next(check for check in self._checks if check.step == kept)
            budget = "" if self._until.memory_kl is None else " and the budget of memory_kl"
            logger.warning(
                "until: no goal was reached within %d steps%s. The check that came closest is "
                "kept (%s).",
                steps,
                budget,
                _line(found),
            )
        return Outcome(steps, kept, reached, tuple(self._checks), self._guard.refused)

    def _restore(self, folder: Path) -> None:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        self._checks = [Check.model_validate(check) for check in state["checks"]]
        self._kept, self._weights = state["kept"], state["weights"]
        self.is_over = state["is_over"]
        self._measure.restore(state["measure"])
        self._guard.restore(state["guard"])

    def _trained(self) -> dict[str, Tensor]:
        named = self._run.loaded.model.named_parameters()
        return {name: p.data for name, p in named if p.requires_grad}

    def _reached(self) -> bool | None:
        """Whether the last check reached a goal; None where there is none but the budget."""
        if not self._checks:
            return None
        last = self._checks[-1]
        way = progress(last, self._checks[0], self._until)
        return None if way is None else way >= 1 and is_affordable(last, self._until)

    def _check(self, step: int) -> None:
        check = self._measure(step)
        self._checks.append(check)
        if self._tell is not None:
            self._tell(_line(check))
        if not self._run.config.has_goals:
            return
        self.is_over = not is_affordable(check, self._until) or bool(self._reached())
        if self._is_best(check):
            self._kept = step
            self._weights = {n: p.to("cpu", copy=True) for n, p in self._trained().items()}

    def _is_best(self, check: Check) -> bool:
        """Whether a check, the last one, is to be kept rather than the one kept so far."""
        if self._kept is None or not is_affordable(check, self._until):
            return self._kept is None
        way = progress(check, self._checks[0], self._until)
        kept = next(c for c in self._checks if c.step == self._kept)
        best = progress(kept, self._checks[0], self._until)
        return way is None or best is None or way > best


def _line(check: Check) -> str:
    parts = [f"check at step {check.step}"]
    if check.toxic_share is not None:
        parts.append(f"toxic {check.toxic_share:.1%}")
    if check.held_out_rise is not None:
        parts.append(f"held-out rise {check.held_out_rise:+.4g}")
    if check.memory_kl is not None:
        parts.append(f"memory KL {check.memory_kl:.3g}")
    return "  ".join(parts)
