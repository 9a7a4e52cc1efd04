"""The diagonal of the Fisher information by sampled labels: the "true" Fisher, one draw a label."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.squares import Scored, squared_gradients
from mergekit_bayes.curvature.sums import ENTRIES, Keeping


def fisher_diagonal(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Estimate the Fisher diagonal of the summed loss over some batches, at the model's weights.

        y_n ~ p(y | x_n)                               a label from the model's own distribution
        v_n = grad_z -log p(y_n | z_n)                 p_n - onehot(y_n) for softmax
        F   = sum over batches of ( grad sum_n <v_n, z_n> )^2

    One backward a batch, and no labels of the data. A gradient at a sampled label has mean zero
    and `E[v v'] = A`, the Hessian of the loss in the logits. So the cross terms of observations
    vanish and the estimate is unbiased at any batch size, for the matrix that root-GGN estimates
    (`ggn.ggn_diagonal`): for these likelihoods Fisher information and GGN are the same.

    The variance is the larger one. Of one draw it is `E[(J' v)^4] - F^2`: for a class that has the
    probability p it grows like 1 / p, where that of root-GGN is at most 2 F^2. On a confident model
    a sampled label hardly ever is another class, so that nearly all of the curvature comes from few
    draws and the median over entries lies far below the mean. The relative error over batches of
    models that are not confident is about sqrt(2 / batches).

    Args:
        model: As for `squares.squared_gradients`.
        batches: As for `squares.squared_gradients`.
        seed: Seed of the labels.
        keep: How finely the sums are kept, and where.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.
    """
    return squared_gradients(model, batches, _roots, seed=seed, keep=keep)


def _roots(scored: Scored) -> Iterator[Tensor]:
    score = sampled_score(scored.logits, scored.loss.likelihood, scored.generator)
    yield score.mul_(scored.loss.scale(scored.logits.shape[-1]) ** 0.5)


def sampled_score(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Draw labels from the model and return the gradient of their loss in the logits.

        categorical    v = p - onehot(y),   y ~ p = softmax(z)
        bernoulli      v = p - y,           y ~ p = sigmoid(z), for each output
        gaussian       v = z - y,           y ~ N(z, 1)

    Args:
        logits: z, shape (n, C); without a graph.
        likelihood: As for `ggn.random_root`.
        generator: Generator of the labels, on the device of the logits.

    Returns:
        One v for each observation, shape (n, C), with `E[v v']` the Hessian of the loss in z.

    Example:
        With p = (1/2, 1/2), v is (1, -1) / 2 or its negative.

        >>> v = sampled_score(torch.zeros(1000, 2), "categorical", torch.Generator().manual_seed(0))
        >>> v.unique(dim=0)
        tensor([[-0.5000,  0.5000],
                [ 0.5000, -0.5000]])
    """
    if likelihood == "gaussian":
        return torch.empty_like(logits).normal_(generator=generator)
    if likelihood == "bernoulli":
        p = logits.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
    p = logits.softmax(-1)
    if len(p) == 0:  # a batch without a scored token
        return p
    labels = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add_(-1, labels, -torch.ones_like(p[:, :1]))
