"""The objective of an adaptation, estimated on a batch.

    J = sum_add N_a mean loss  +  R(remove)  +  tau (W + F),    in nats of the summed loss

A batch has examples of each part. The sum over a part is estimated without bias by the sum over
its examples in the batch, times all examples of the part over those in the batch. J is divided by
N, the observations that are removed and added, so that its gradient is of the size of a mean
loss's.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.losses import ascent, kl_uniform, log_likelihood, npo
from mergekit_bayes.adapt.settings import Removal
from mergekit_bayes.adapt.teacher import Batch, Teacher, run, scored
from mergekit_bayes.adapt.units import Units
from mergekit_bayes.curvature.outputs import trained_loss

PARTS = ("remove", "contrast", "add", "memory")  # the number of a part is its place here
HELD = len(PARTS)  # number of the held-out part of the memory, which no objective looks at


class Terms(NamedTuple):
    """The objective on one batch.

    Attributes:
        total: J / N with its graph.
        means: Mean of each part's own loss an observation in the batch, without graphs: of
            `remove` its removal loss, of `memory` its KL divergence.
        penalty: tau W / N, without its graph.
    """

    total: Tensor
    means: dict[str, Tensor]
    penalty: Tensor


class Objective:
    """J / N as a function of a model and a batch.

    Args:
        units: The weights of the parts.
        sizes: Number of examples of each part.
        removal: The removal's loss.
        beta: Of `npo`.
        teacher: The start.
        penalty: W of the model's present weights, a number with a graph; None without it.
    """

    def __init__(
        self,
        units: Units,
        sizes: Mapping[str, int],
        removal: Removal,
        beta: float,
        teacher: Teacher,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self._units, self._sizes = units, sizes
        self._removal, self._beta = removal, beta
        self._teacher, self._penalty = teacher, penalty

    @property
    def edited(self) -> int:
        """N, by which J is divided."""
        return self._units.edited

    def __call__(self, model: Module, batch: Batch) -> Terms:
        """J / N on a batch with `input_ids`, `attention_mask`, `labels` and `part`.

        `part` holds the number of each example's part in `PARTS`. One pass of the model is made
        over all examples.
        """
        logits = run(model, batch)
        total, means = logits.new_zeros((), dtype=torch.float32), {}
        for number, name in enumerate(PARTS):
            chosen = (batch["part"] == number).nonzero().flatten()
            if not len(chosen):
                continue
            inner = {key: value[chosen] for key, value in batch.items()}
            outputs, labels = scored(logits[chosen], inner["labels"], inner["input_ids"])
            losses = self._losses(model, name, inner, outputs, labels)
            factor = self._units.weight_of(name) * self._sizes[name] / len(chosen)
            total = total + factor * losses.sum()
            means[name] = losses.detach().mean()
        penalty = total.new_zeros(())
        if self._penalty is not None:
            penalty = self._units.tau * self._penalty()
        edited = self._units.edited
        return Terms((total + penalty) / edited, means, penalty.detach() / edited)

    def curvature_weights(self, batch: Batch) -> Tensor:
        """How much the curvature of each scored observation in a batch counts, (n,).

        With these factors the sum over a batch estimates the generalised Gauss-Newton matrix of
        the added, contrast and memory terms of J at the start of the memory's divergence. Removed
        rows have none of it.
        """
        weights = torch.zeros(len(batch["part"]), device=batch["part"].device)
        for number, name in enumerate(PARTS):
            chosen = batch["part"] == number
            if name != "remove" and chosen.any():
                weights[chosen] = self._units.weight_of(name) * self._sizes[name] / chosen.sum()
        labels, tokens = batch["labels"], batch["input_ids"]
        shape = (*tokens.shape, 1) if labels.shape == tokens.shape else (len(tokens), 1)
        spread = weights.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
        return scored(spread, labels, tokens)[0].squeeze(-1)

    def _losses(
        self, model: Module, part: str, batch: Batch, logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of each observation of one part, (n,)."""
        if part == "memory":
            return self._teacher.divergence(batch, logits)
        likelihood = trained_loss(model).likelihood
        if part == "remove" and self._removal == "kl_uniform":
            return kl_uniform(logits, likelihood)
        log_p = log_likelihood(logits, labels, likelihood)
        if part in ("add", "contrast"):
            return -log_p
        if self._removal == "ascent":
            return ascent(log_p)
        return npo(log_p, self._teacher.log_likelihood(batch), self._beta)
