"""Measure the goals of an adaptation at its present weights, without disturbing the training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

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
from mergekit_bayes.ranks import main_first, spread

Autocast = Callable[[], AbstractContextManager[object]]


class Checks:
    """What a check measures: `Check` at the model's present weights.

    Continuations are drawn with the same noise in every check. Under a launcher all ranks share
    the batches, on equal weights, and each gets the numbers of one process.

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
            spec, remote = config.scorer, config.trust_remote_code
            (self._scorer,) = main_first(
                lambda: open_scorers([spec], trust_remote_code=remote, single=True)
            )

    def __call__(self, step: int) -> Check:
        """Measure after `step` steps. Every rank must call this; the first call is at the start."""
        held, model = self._run.held, self._run.loaded.model
        rise = share = kl = None
        with self.autocast(), undisturbed(model):
            if held.removed:
                loss = self._loss(held.removed)
                if self._start_loss is None:
                    self._start_loss = loss
                rise = loss - self._start_loss
            if self._scorer is not None:
                share = self._toxic_share(self._scorer)
            if held.memory:
                batches = list(batches_of(self._run, held.memory, HELD))
                kl = _mean(spread(batches, partial(_divergences, model, self._teacher)))
        return Check(step=step, toxic_share=share, held_out_rise=rise, memory_kl=kl)

    def state(self) -> float | None:
        """What the next checks need of the first one."""
        return self._start_loss

    def restore(self, state: float | None) -> None:
        """Go on from `state()`."""
        self._start_loss = state

    def _toxic_share(self, scorer: Scorer) -> float:
        config, loaded = self._run.config, self._run.loaded
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
        scores = scorer.score([text for row in samples.texts for text in row])
        return float(np.mean(np.asarray(scores) >= scorer.threshold(config.threshold)))

    def _loss(self, examples: Sequence[Example]) -> float:
        """Mean loss of an observation, in nats."""
        likelihood = trained_loss(self._run.loaded.model).likelihood

        @torch.no_grad()
        def losses(batch: Batch) -> Tensor:
            logits = run(self._run.loaded.model, batch)
            outputs, labels = scored(logits, batch["labels"], batch["input_ids"])
            return -log_likelihood(outputs, labels, likelihood).double().cpu()

        return _mean(spread(list(batches_of(self._run, examples, 0)), losses))


def mean_divergence(model: Module, teacher: Teacher, batches: Iterable[Batch]) -> float:
    """Mean `KL(p_0 || p)` of an observation at the model's present weights, in nats.

    Args:
        model: The model.
        teacher: The start.
        batches: Batches of one part each, as a stored teacher knows them; this rank's own.
    """
    return _mean([_divergences(model, teacher, batch) for batch in batches])


@torch.no_grad()
def _divergences(model: Module, teacher: Teacher, batch: Batch) -> Tensor:
    logits, _ = scored(run(model, batch), batch["labels"], batch["input_ids"])
    return teacher.divergence(batch, logits).double().cpu()


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.cat(list(values)).mean())


@contextmanager
def undisturbed(model: Module) -> Iterator[None]:
    """Measure in eval mode; afterwards mode and random states are as before."""
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        yield
