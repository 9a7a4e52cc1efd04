"""What the start predicts, stored before the first step: a teacher that runs no second model.

The `k` most probable outputs of an observation are kept, and all others are one bin of probability
`r_0 = 1 - sum_top p_0`. With `r = 1 - sum_top p` the divergence is that of the binned
distributions:

    KL_k = sum_top p_0 log(p_0 / p) + r_0 log(r_0 / r)
    KL - KL_k = r_0 KL( p_0(. | rest) || p(. | rest) )  >= 0

So it never exceeds the divergence, it misses only what moves inside of the rest, and with `k = C`
it is the divergence itself. Training on it leaves the order within the rest free.

A memory observation takes 8 k + 4 bytes: 516 at `k = 64`, where the logits of a vocabulary of
50,257 take 201,028. A removed one takes 4. All lies in main memory, on every rank.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.checks import undisturbed
from mergekit_bayes.adapt.data import Run, batches_of
from mergekit_bayes.adapt.losses import log_likelihood
from mergekit_bayes.adapt.objective import HELD, PARTS
from mergekit_bayes.adapt.teacher import Batch, run, scored
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError


class _Predictions(NamedTuple):
    """What is kept of one part's observations, in the order of its examples.

    Attributes:
        firsts: Number of the first observation of each example, and of the end, (examples + 1,).
        values: One tensor or more, (observations, ...).
    """

    firsts: Tensor
    values: tuple[Tensor, ...]

    def of(self, index: Tensor) -> list[Tensor]:
        """The values of these examples, one after the other, on the device of `index`."""
        firsts = self.firsts.tolist()
        rows = torch.cat([torch.arange(firsts[i], firsts[i + 1]) for i in index.tolist()])
        return [value[rows].to(index.device) for value in self.values]


class Stored:
    """A teacher that remembers.

    Args:
        model: The model at the start, in eval mode.
        likelihoods: Batches of the parts whose log-likelihood is asked for, part by part and in
            the order of their examples.
        divergences: Likewise, of the parts whose divergence is asked for.
        top_k: Outputs that are kept of an observation; all where there are fewer.

    Raises:
        ConfigError: The model's outputs are no softmax.
    """

    def __init__(
        self,
        model: Module,
        likelihoods: Iterable[Batch],
        divergences: Iterable[Batch],
        top_k: int,
    ) -> None:
        likelihood = trained_loss(model).likelihood
        if likelihood != "categorical":
            raise ConfigError(
                "teacher: stored keeps the largest probabilities of a softmax, and this model has "
                "none. Use teacher: copy."
            )

        def labelled(outputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return (log_likelihood(outputs, labels, likelihood),)

        def largest(outputs: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            log_p = outputs.log_softmax(-1)
            top, ids = log_p.topk(min(top_k, log_p.shape[-1]))
            return top, ids.int(), _rest(log_p, ids)

        self._likelihoods = _predictions(model, likelihoods, labelled)
        self._divergences = _predictions(model, divergences, largest)

    def log_likelihood(self, batch: Batch) -> Tensor:
        """`log p_0(y)` of each observation in a batch of one part, (n,), without a graph."""
        (log_p0,) = self._likelihoods[int(batch["part"][0])].of(batch["index"])
        return log_p0

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """`KL_k` of each observation in a batch of one part, (n,), with the graph of the logits."""
        top, ids, rest = self._divergences[int(batch["part"][0])].of(batch["index"])
        log_p, ids = logits.log_softmax(-1), ids.long()
        inside = (top.exp() * (top - log_p.gather(-1, ids))).sum(-1)
        if ids.shape[-1] == log_p.shape[-1]:
            return inside  # there is no rest, and no gradient of its logarithm
        # Where all of p_0 lies in the top, 0 log 0 is 0.
        rest_is_empty = rest == -torch.inf
        difference = torch.where(rest_is_empty, 0.0, rest) - _rest(log_p, ids)
        return inside + torch.where(rest_is_empty, 0.0, rest.exp() * difference)


def _rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the probability outside of `ids`, (n,); -inf if they are all."""
    return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


@torch.no_grad()
def _predictions(
    model: Module, batches: Iterable[Batch], keep: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> dict[int, _Predictions]:
    """Run the start over the batches, and keep of each part's observations what `keep` returns."""
    counts: dict[int, list[int]] = {}
    values: dict[int, list[tuple[Tensor, ...]]] = {}
    for batch in batches:
        part = int(batch["part"][0])
        logits = run(model, batch)
        for i in range(len(logits)):
            outputs, labels = scored(
                logits[i : i + 1], batch["labels"][i : i + 1], batch["input_ids"][i : i + 1]
            )
            counts.setdefault(part, []).append(len(outputs))
            values.setdefault(part, []).append(tuple(v.cpu() for v in keep(outputs, labels)))
    return {
        part: _Predictions(
            torch.tensor([0, *counts[part]]).cumsum(0),
            tuple(torch.cat(tensors) for tensors in zip(*of_part, strict=True)),
        )
        for part, of_part in values.items()
    }


def stored_teacher(adapted: Run) -> Stored:
    """Run the model of a run, which is at its start, over all that the teacher will be asked for.

    Raises:
        ConfigError: The model's outputs are no softmax.
    """
    parts, model = adapted.parts, adapted.loaded.model
    asked = {PARTS.index("memory"): parts.get("memory", ()), HELD: adapted.held.memory}
    removed = PARTS.index("remove")
    with (
        undisturbed(model),
        torch.autocast(adapted.loaded.device.type, torch.bfloat16, enabled=adapted.config.bf16),
    ):
        return Stored(
            model,
            batches_of(adapted, parts.get("remove", ()), removed),
            (b for part, rows in asked.items() for b in batches_of(adapted, rows, part)),
            adapted.config.top_k,
        )
