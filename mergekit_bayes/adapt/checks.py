"""Measure the goals of an adaptation at its present weights, without disturbing the training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.data import Example, Run, batches_of
from mergekit_bayes.adapt.losses import log_likelihood
from mergekit_bayes.adapt.objective import HELD
from mergekit_bayes.adapt.settings import Check
from mergekit_bayes.adapt.teacher import Batch, Teacher, run, scored
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.generation import Sampling, sample_continuations
from mergekit_bayes.models.modes import evaluating
from mergekit_bayes.ranks import on_main

Autocast = Callable[[], AbstractContextManager[object]]


class Checks:
    """What a check measures: `Check` at the model's present weights.

    Continuations are drawn with the same noise in every check. Under a launcher rank 0 measures
    and tells the others.

    Args:
        run: The run, whose model is measured.
        teacher: The start.

    Raises:
        CheckpointError: The scorer cannot be read.
        ConfigError: The scorer fails, or no example of the memory is held out for its budget.
    """

    autocast: Autocast = nullcontext  # that of the training, when there is a Trainer

    def __init__(self, run: Run, teacher: Teacher) -> None:
        self._run, self._teacher = run, teacher
        self._start_loss: float | None = None
        self._scorer: Scorer | None = None
        config = run.config
        if config.until.memory_kl is not None and not run.held.memory:
            raise ConfigError(
                "until: memory_kl is measured on the held-out part of the memory, which is empty. "
                "Raise memory_held_out, or give a larger memory."
            )
        if config.scorer is not None and run.prompts:
            on_main(lambda: self._open_scorer(config.scorer or ""))

    def _open_scorer(self, spec: str) -> None:
        remote = self._run.config.trust_remote_code
        (self._scorer,) = open_scorers([spec], trust_remote_code=remote, single=True)

    def __call__(self, step: int) -> Check:
        """Measure after `step` steps. Every rank must call this; the first call is at the start."""
        held = self._run.held

        def measure() -> tuple[Check, float | None]:
            with self.autocast(), undisturbed(self._run.loaded.model):
                loss = self._loss(held.removed) if held.removed else None
                start = self._start_loss if self._start_loss is not None else loss
                rise = loss - start if loss is not None and start is not None else None
                share = self._toxic_share() if self._scorer is not None else None
                kl = None
                if held.memory:
                    batches = batches_of(self._run, held.memory, HELD)
                    kl = mean_divergence(self._run.loaded.model, self._teacher, batches)
            return Check(step=step, toxic_share=share, held_out_rise=rise, memory_kl=kl), start

        check, self._start_loss = on_main(measure)
        return check

    def state(self) -> float | None:
        """What the next checks need of the first one."""
        return self._start_loss

    def restore(self, state: float | None) -> None:
        """Go on from `state()`."""
        self._start_loss = state

    def _toxic_share(self) -> float:
        config, loaded = self._run.config, self._run.loaded
        assert self._scorer is not None
        sampling = Sampling(
            continuations=config.continuations, new_tokens=config.new_tokens, seed=config.seed
        )
        samples = sample_continuations(
            loaded.model,
            loaded.tokenizer,
            self._run.prompts,
            start=loaded.start,
            context=loaded.context,
            sampling=sampling,
        )
        scores = self._scorer.score([text for row in samples.texts for text in row])
        return float(np.mean(np.asarray(scores) >= self._scorer.threshold(config.threshold)))

    @torch.no_grad()
    def _loss(self, examples: Sequence[Example]) -> float:
        """Mean loss of an observation, in nats."""
        likelihood = trained_loss(self._run.loaded.model).likelihood

        def losses(batch: dict[str, Tensor]) -> Tensor:
            logits = run(self._run.loaded.model, batch)
            outputs, labels = scored(logits, batch["labels"], batch["input_ids"])
            return -log_likelihood(outputs, labels, likelihood)

        return _mean(losses(batch) for batch in batches_of(self._run, examples, 0))


@torch.no_grad()
def mean_divergence(model: Module, teacher: Teacher, batches: Iterable[Batch]) -> float:
    """Mean `KL(p_0 || p)` of an observation at the model's present weights, in nats.

    Args:
        model: The model.
        teacher: The start.
        batches: Batches of one part each, as a stored teacher knows them.
    """
    return _mean(teacher.divergence(batch, _scored(run(model, batch), batch)) for batch in batches)


def _scored(logits: Tensor, batch: Batch) -> Tensor:
    return scored(logits, batch["labels"], batch["input_ids"])[0]


def _mean(values: Iterator[Tensor]) -> float:
    return float(torch.cat([v.double().cpu() for v in values]).mean())


@contextmanager
def undisturbed(model: Module) -> Iterator[None]:
    """Measure in eval mode; afterwards mode and random states are as before."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        yield
