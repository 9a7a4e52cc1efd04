"""Undo a step after which the KL divergence on the memory leaps (`leap`).

The divergence of the weights after step t is seen in the batch of step t + 1, at no cost. There
step t is undone: its weights are replaced by those before it, and the learning rate is halved. What
the optimizer remembers stays, since all of its gradients were taken at weights that were accepted;
the gradient at the refused weights is dropped. So the guard costs one copy of the trained weights.

A batch with a rare example may have many times the divergence of other batches without any leap.
So a suspicion is confirmed on the same examples: at the weights before the step their divergence
must have been smaller by the same factor.

Where somebody looks at the weights before that batch comes (a check, a checkpoint, a kept step, the
end of the run), the guard looks first, at the front of the memory, so that no weights are kept,
stored or called good which the next batch would refuse.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_bayes.adapt.checks import mean_divergence, undisturbed
from mergekit_bayes.adapt.data import Run, batches_of
from mergekit_bayes.adapt.objective import PARTS, Objective, Terms
from mergekit_bayes.adapt.teacher import Batch, Teacher
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.rates import step_bound
from mergekit_bayes.ranks import is_main, mean_over_ranks

logger = logging.getLogger(__name__)

# Nats an observation, for the recent mean at least. From zero the divergence grows with the square
# of the steps, so that every step of the first ones is a leap beside the one before it.
_FLOOR = 0.01
_RECENT = 5  # steps in the mean


class LeapGuard(TrainerCallback):  # type: ignore[misc]
    """Watches the divergence on the memory; without a memory it does nothing.

    A divergence is a leap if it is not a number, or larger than both

        leap * max(mean of the last five accepted ones, 0.01 nats)
        leap * max(that of the same examples before the step, 0.01 nats)

    Growth with the square of the steps, as by equal steps from the start, is four times the mean
    after the second step and less from then on.

    Every rank must have it: the divergence is the mean of all ranks', and all do the same.

    Args:
        run: The run.
        objective: J / N, which is watched by calling the guard in its place.
        teacher: The start.

    Attributes:
        refused: Steps that were undone.
    """

    def __init__(self, run: Run, objective: Objective, teacher: Teacher) -> None:
        self._run, self._objective, self._teacher = run, objective, teacher
        self._seen: list[Tensor] = []  # of the micro-batches of this step
        self._memory: list[Batch] = []  # their examples of the memory
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._before: list[Tensor] = []  # the weights before the last step
        self._may_undo = False
        self.refused = 0

    def __call__(self, model: Module, batch: Batch) -> Terms:
        """The objective on one micro-batch."""
        terms = self._objective(model, batch)
        if "memory" in terms.means:
            self._seen.append(terms.means["memory"])
            chosen = (batch["part"] == PARTS.index("memory")).nonzero().flatten()
            self._memory.append({name: tensor[chosen] for name, tensor in batch.items()})
        return terms

    def state(self) -> dict[str, Any]:
        """What a resumed run must know. No step before a checkpoint can be undone after it."""
        return {"recent": list(self._recent), "refused": self.refused}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._recent = deque(state["recent"], maxlen=_RECENT)
        self.refused = state["refused"]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: object,
    ) -> None:
        """Undo the last step if its divergence leapt; else keep the weights before this one."""
        if not self._seen:
            return
        divergence = mean_over_ranks(float(torch.stack(self._seen).mean()))
        examples, self._seen, self._memory = self._memory, [], []
        if self._may_undo and self._leaps(divergence, examples):
            self._undo(state.global_step, divergence, optimizer, lr_scheduler)
            _drop_gradients(optimizer)
            return
        if math.isfinite(divergence) and state.global_step:  # the start's is zero
            self._recent.append(divergence)
        self._keep()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: object,
    ) -> None:
        """Look at the weights before anybody else does."""
        config, step = self._run.config, state.global_step
        is_looked_at = (
            control.should_save
            or control.should_training_stop
            or step in config.keep_steps
            or (config.has_checks and step % config.check_every == 0)
        )
        if not (is_looked_at and self._may_undo):
            return
        front = self._run.parts["memory"][: config.batch_size]
        examples = list(batches_of(self._run, front, PARTS.index("memory")))
        divergence = self._divergence(examples)
        if self._leaps(divergence, examples):
            self._undo(step, divergence, optimizer, lr_scheduler)
        self._may_undo = False

    def _leaps(self, divergence: float, examples: Sequence[Batch]) -> bool:
        """Whether these examples' divergence leapt by the last step."""
        usual = sum(self._recent) / max(1, len(self._recent))
        if divergence <= self._run.config.leap * max(usual, _FLOOR):
            return False
        if not math.isfinite(divergence):
            return True
        self._swap()
        before = self._divergence(examples)
        self._swap()
        return divergence > self._run.config.leap * max(before, _FLOOR)

    def _divergence(self, examples: Sequence[Batch]) -> float:
        """Mean divergence at the present weights. Every rank must call this."""
        model = self._run.loaded.model
        with undisturbed(model):
            return mean_over_ranks(mean_divergence(model, self._teacher, examples))

    def _swap(self) -> None:
        """Exchange the present weights and those before the last step."""
        for now, before in zip(self._trained(), self._before, strict=True):
            kept = now.clone()
            now.copy_(before)
            before.copy_(kept)

    def _trained(self) -> list[Tensor]:
        return [p.data for p in self._run.loaded.model.parameters() if p.requires_grad]

    def _keep(self) -> None:
        weights = self._trained()
        if not self._before:
            self._before = [torch.empty_like(w) for w in weights]
        _copy(weights, self._before)
        self._may_undo = True

    def _undo(self, step: int, divergence: float, optimizer: Any, lr_scheduler: Any) -> None:
        _copy(self._before, self._trained())
        self._may_undo = False
        self.refused += 1
        for group in optimizer.param_groups:
            group["lr"] /= 2
        lr_scheduler.base_lrs = [rate / 2 for rate in lr_scheduler.base_lrs]
        if is_main():
            logger.warning(
                "step %d is undone: it takes the KL divergence on the memory to %.3g nats, more "
                "than %g times its recent mean. The learning rate is now %.3g.",
                step,
                divergence,
                self._run.config.leap,
                _told_rate(optimizer),
            )


def _told_rate(optimizer: Any) -> float:
    """The learning rate in the unit in which the settings give it."""
    group = optimizer.param_groups[0]
    rate = float(group["lr"])
    return step_bound(group, rate) if "clip_radius" in group else rate


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _drop_gradients(optimizer: Any) -> None:
    """Let the step that follows change nothing, not even what the optimizer remembers."""
    optimizer.zero_grad(set_to_none=True)
    inner = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper
    if isinstance(inner, IVON):  # whose gradients are those of its samples
        inner.forget_samples()
