"""One pass over batches that adds up squared gradients, which most estimators of curvature share.

Such an estimator differs from others in the vectors v that it puts in front of the logits z of a
batch's n observations. With J_n the Jacobian of z_n in the weights, each of them adds

    ( sum_n J_n' v_n )^2        entry by entry, one backward pass

to the diagonal. If the v_n of one batch are uncorrelated with mean zero, the cross terms of
observations vanish, and the expectation is the diagonal of `sum_n J_n' E[v_n v_n'] J_n` at any
batch size.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.outputs import (
    TrainedLoss,
    numbers,
    scored_logits,
    scored_targets,
    trained_loss,
)
from mergekit_bayes.libraries import outputs_of


class Scored(NamedTuple):
    """The logits of a batch that the loss looks at, as an estimator sees them.

    Attributes:
        logits: z, shape (n, C), float32, without a graph.
        loss: The loss that the model trains with.
        generator: Generator of whatever is drawn, on the device of the logits.
        targets: Observed labels: class numbers (n,), or numbers (n, C); None without labels.
    """

    logits: Tensor
    loss: TrainedLoss
    generator: torch.Generator
    targets: Tensor | None = None


# The vectors v, (n, C) each, one backward pass for each of them.
Roots = Callable[[Scored], Iterable[Tensor]]


def squared_gradients(
    model: Module, batches: Iterable[Mapping[str, Tensor]], roots: Roots, *, seed: int = 0
) -> Curvature:
    """Add up `(grad sum_n <v_n, z_n>)^2` over batches, at the model's weights.

    Args:
        model: A model of tokens if batches hold `labels` of the inputs' shape (a causal one is
            scored where the next label is not -100, a masked one or a classifier of tokens where
            the label itself is not), else a classifier. Dropout is off meanwhile.
        batches: Mappings with `input_ids`, `attention_mask` and, for models of tokens, `labels`.
            Other labels say by their dtype which loss a classifier without `problem_type` trains
            with, and are what `roots` sees as `Scored.targets`.
        roots: The vectors v of a batch.
        seed: Seed of the generator that `roots` draws from.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.

    Raises:
        CheckpointError: The model's outputs are not numbers.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    observations, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            labels, tokens = batch.get("labels"), batch.get("input_ids")
            outputs = outputs_of(
                model, **{name: v for name, v in batch.items() if name != "labels"}
            )
            loss = trained_loss(model, labels)
            logits = scored_logits(outputs.logits, labels, tokens, shifts=loss.shifts)
            targets = scored_targets(outputs.logits, labels, tokens, shifts=loss.shifts)
            seen = numbers(logits.detach()).float()
            vectors = list(roots(Scored(seen, loss, generator, targets)))
            for i, vector in enumerate(vectors):
                gradients = torch.autograd.grad(
                    (vector * logits.float()).sum(),
                    parameters,
                    allow_unused=True,
                    retain_graph=i + 1 < len(vectors),
                )
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float())
            observations += logits.shape[0]
    finally:
        model.train(was_training)
    return Curvature(dict(zip(names, totals, strict=True)), observations)
