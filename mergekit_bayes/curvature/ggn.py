"""The diagonal of the generalised Gauss-Newton matrix by random square roots (root-GGN).

For a softmax likelihood the GGN is the Fisher information. Its output factor `diag(p) - p p'` has the random
square root below, which needs no labels, no per-example gradients, and stays bounded on confident models,
where sampling labels hardly ever shows the other class.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_IGNORED = -100


class Curvature(NamedTuple):
    """Diagonal curvature of the summed loss over `observations`; divide to get it per observation."""

    total: dict[str, Tensor]  # 1/weight^2, float32, >= 0, by parameter name
    observations: int


def ggn_diagonal(model: Any, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0) -> Curvature:
    """Estimate the GGN diagonal of the summed loss over some batches, at the model's present weights.

        p   = softmax(z)                               per observation, a constant
        v   = sqrt(p) * r - p * sum(sqrt(p) * r)       r in {-1, +1}^C at random; E[v v'] = diag(p) - p p'
        F   = sum over batches of ( grad sum_n <v_n, z_n> )^2

    One backward a batch. Observations of one batch have independent signs, so their cross terms vanish in
    expectation: unbiased at any batch size; more batches mean more draws. Relative error about
    sqrt(2 / batches).

    Args:
        model: A causal language model if batches hold `labels` of the inputs' shape (a token is scored where the
            next label is not -100), else a classifier. Dropout is off meanwhile.
        batches: Mappings with `input_ids`, `attention_mask` and, for language models, `labels`.
        seed: Of the signs.

    Returns:
        float32 tensors for every parameter that requires a gradient; tied parameters once.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    observations, was_training = 0, model.training
    model.eval()
    try:
        for batch in batches:
            labels, tokens = batch.get("labels"), batch.get("input_ids")
            logits = scored_logits(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, labels, tokens)
            root = random_root(logits.detach().float(), likelihood(model), generator)
            gradients = torch.autograd.grad((root * logits.float()).sum(), parameters, allow_unused=True)
            for sum_, g in zip(total, gradients, strict=True):
                if g is not None:
                    sum_.addcmul_(g.float(), g.float())
            observations += logits.shape[0]
    finally:
        model.train(was_training)
    return Curvature(dict(zip(names, total, strict=True)), observations)


def random_root(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Vectors v with `E[v v']` the Hessian of the loss in the logits; shape as the logits, (n, C).

    `categorical` is softmax, `bernoulli` an independent sigmoid per logit, `gaussian` the squared error
    `0.5 |z - y|^2`.
    """
    signs = torch.empty_like(logits).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    if likelihood == "gaussian":
        return signs
    if likelihood == "bernoulli":
        p = logits.sigmoid()
        return signs * (p * (1 - p)).sqrt()
    p = logits.softmax(-1)
    drawn = p.sqrt() * signs
    return drawn - p * drawn.sum(-1, keepdim=True)


def scored_logits(logits: Tensor, labels: Tensor | None, tokens: Tensor | None) -> Tensor:
    """The logits that the loss looks at, (n, C): of a language model where the next label is not -100."""
    if labels is not None and tokens is not None and labels.shape == tokens.shape and logits.ndim == 3:
        return logits[:, :-1][labels[:, 1:] != _IGNORED]
    return logits.reshape(-1, logits.shape[-1])


def likelihood(model: Any) -> str:
    """Which `random_root` belongs to the loss that the model trains with."""
    kind = getattr(model.config, "problem_type", None)
    if kind is None and getattr(model.config, "num_labels", 2) == 1:
        return "gaussian"  # transformers then trains with the squared error
    return {"regression": "gaussian", "multi_label_classification": "bernoulli"}.get(str(kind), "categorical")
