"""The K-prior (Khan and Swaroop, NeurIPS 2021): what holds a model where it was.

    K = (theta - theta_0)' S_w (theta - theta_0) / 2  +  kappa sum_{i in M} KL( p_0(i) || p(i) )

The first part rebuilds the gradient of the old data from the weights, by the posterior of the
start; the second rebuilds it from the functions, on a small memory M. Near the start the second
part has the curvature kappa H_M, with H_M that of the memory, so that data of the memory would
count twice if S_w were all of the start's precision S_0:

    S_w = max(S_0 - kappa H_M, prior)

so that both together have the diagonal max(S_0, kappa H_M + prior) there, also with a memory that
is not of the start's data: each weight is held as firmly as by S_0 at least. Both curvatures are
estimates. Where the memory stands for all of S_0, the maximum keeps the positive half of their
noise.

Without a memory it is S_0, and K is the penalty of elastic weight consolidation. With all data as
the memory it is the prior, and for generalised linear models the gradient of K is that of the old
objective. In between, both together are exact for quadratic losses whose curvature is diagonal.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from mergekit_bayes.adapt.losses import wide

Tensors: TypeAlias = Mapping[str, Tensor]


def weight_precision(
    start: Tensors, memory: Tensors | None, kappa: float, prior: float
) -> dict[str, Tensor]:
    """`S_w` of each parameter, 1/weight^2: the start's precision less the memory's share of it.

    Args:
        start: S_0 by parameter name, of the parameter's shape or one that broadcasts to it.
        memory: H_M, the curvature of the loss summed over the memory's observations; None without
            a memory.
        kappa: Weight of one memory observation.
        prior: The prior that S_0 contains, which no data added and none can take away.
    """
    if memory is None or not kappa:
        return dict(start)
    result = {}
    for name, precision in start.items():
        share = memory.get(name)
        result[name] = precision
        if share is not None:
            floor = torch.full_like(share, prior).minimum(precision.to(share))
            result[name] = (precision.to(share) - kappa * share).maximum(floor)
    return result


def weight_penalty(parameters: Tensors, centre: Tensors, precision: Tensors) -> Tensor:
    """`sum (theta - theta_0)' S_w (theta - theta_0) / 2`, in nats, a number with a graph.

    Args:
        parameters: theta by name; those without a precision are free.
        centre: theta_0 by name, without a graph.
        precision: S_w by name, of the parameter's shape or one that broadcasts to it.
    """
    terms = [
        (precision[name] * (wide(parameter) - wide(centre[name])).square()).sum()
        for name, parameter in parameters.items()
        if name in precision
    ]
    return 0.5 * torch.stack(terms).sum() if terms else torch.zeros(())
