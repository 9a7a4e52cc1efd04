"""What the start predicts: the reference of the removal and of the function-space part.

A teacher answers two questions about a batch of examples, for every scored observation in order:
its log-likelihood at the start, and the divergence of given logits from the start's. `AdapterOff`
and `FrozenCopy` run the start; both are exact.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.losses import divergence, log_likelihood, wide
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.libraries import outputs_of
from mergekit_bayes.models.encode import IGNORED

Batch = Mapping[str, Tensor]


class Teacher(Protocol):
    """The start of an adaptation."""

    def log_likelihood(self, batch: Batch) -> Tensor:
        """`log p_0(y)` of each observation in a batch, (n,), without a graph."""
        ...

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """`KL(p_0 || p)` of each observation in a batch, (n,), with the graph of the logits."""
        ...


def scored(logits: Tensor, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that a loss looks at, (n, C) in float32 at least, and their labels, (n,).

    Args:
        logits: Of a model of tokens (batch, length, C), of a classifier (batch, C).
        labels: (batch, length), -100 where nothing is scored; of a classifier (batch,).
        tokens: Input tokens, (batch, length).
    """
    if labels.shape != tokens.shape:
        return wide(logits), labels
    mask = labels[:, 1:] != IGNORED
    return wide(logits[:, :-1][mask]), labels[:, 1:][mask]


def run(model: Module, batch: Batch) -> Tensor:
    """The logits of a model for a batch, of all its positions."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = outputs_of(model, **inputs).logits
    return logits


def chosen_teacher(config: AdaptConfig) -> Literal["adapter", "copy", "stored"]:
    """The teacher that a run has: the setting, or what `auto` is for it."""
    if config.teacher != "auto":
        return config.teacher
    return "copy" if config.lora is None else "adapter"


class FrozenCopy:
    """A second copy of the model at the start, which is run for every batch.

    Args:
        model: The model, in eval mode, before its first step.
    """

    def __init__(self, model: Module) -> None:
        self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self._likelihood = trained_loss(model).likelihood

    @contextmanager
    def _start(self) -> Iterator[Module]:
        yield self._model

    @torch.no_grad()
    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._start() as model:
            logits = run(model, batch)
        return scored(logits, batch["labels"], batch["input_ids"])

    def log_likelihood(self, batch: Batch) -> Tensor:
        """`log p_0(y)` of each observation in a batch, (n,), without a graph."""
        logits, labels = self._logits(batch)
        return log_likelihood(logits, labels, self._likelihood)

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """`KL(p_0 || p)` of each observation in a batch, (n,), with the graph of the logits."""
        teacher, _ = self._logits(batch)
        return divergence(teacher, logits, self._likelihood)


class AdapterOff(FrozenCopy):
    """The model itself with its adapter switched off: no second copy.

    Args:
        model: A peft model.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        self._likelihood = trained_loss(model).likelihood

    @contextmanager
    def _start(self) -> Iterator[Module]:
        with self._model.disable_adapter():  # type: ignore[operator]
            yield self._model
