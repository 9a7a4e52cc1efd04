"""Squared gradients of projected outputs: the curvature that IVON is given under "ggn"."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mergekit_bayes.optim.shards import local
from mergekit_bayes.optim.state import Group


def add_squares(
    squares: dict[Tensor, Tensor], projected: Tensor, parameters: Sequence[Tensor]
) -> None:
    """Add the squared gradient of the projected outputs of one micro-batch.

        squares <- squares + (grad sum_n <v_n, z_n>)^2

    Args:
        squares: Sums by parameter, float32, of this rank's shards; changed in place.
        projected: sum_n <v_n, z_n>, with its graph, which is kept.
        parameters: All parameters that are trained.

    Raises:
        RuntimeError: Sharded parameters whose gradients are not reduced in every micro-batch.
    """
    gradients: Sequence[Tensor | None]
    if any(isinstance(p, DTensor) for p in parameters):
        gradients = _summed_gradients(projected, parameters)
    else:
        gradients = torch.autograd.grad(projected, parameters, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter not in squares:
                squares[parameter] = torch.zeros_like(local(parameter), dtype=torch.float32)
            if gradient is not None:
                squares[parameter].addcmul_(gradient.float(), gradient.float())


def mean_squares(squares: dict[Tensor, Tensor], observations: int) -> dict[Tensor, Tensor]:
    """Divide the sums of all ranks by their observations; a collective, in place.

    Args:
        squares: Sums of squared gradients by parameter.
        observations: Number of observations of this rank.

    Returns:
        Estimates of the Hessian diagonal of the mean loss; none without any observation.
    """
    if not squares:
        return {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = next(iter(squares.values())).device
        count = torch.tensor(observations, dtype=torch.float64, device=device)
        # Those of shards are sums over the ranks already.
        unreduced = [square for p, square in squares.items() if not isinstance(p, DTensor)]
        for tensor in (count, *unreduced):
            dist.all_reduce(tensor)
        observations = int(count)
    if not observations:  # all labels were masked, on every rank
        return {}
    for square in squares.values():
        square.div_(observations)
    return squares


def damped(squares: dict[Tensor, Tensor], groups: Sequence[Group]) -> dict[Tensor, Tensor]:
    """Add each group's damping to the estimates of its parameters, in place.

    Args:
        squares: Estimates by parameter.
        groups: The parameter groups of the optimizer.
    """
    for group in groups:
        if group["damping"]:
            for parameter in group["params"]:
                if parameter in squares:
                    squares[parameter].add_(group["damping"])
    return squares


def _summed_gradients(projected: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients of this rank's shards, summed over all ranks; `.grad` is left as it was."""
    earlier = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    torch.autograd.backward(projected, retain_graph=True)
    gradients: list[Tensor | None] = []
    for p, grad in zip(parameters, earlier, strict=True):
        # fully_shard reduces to the mean over ranks, and leaves what it does not shard alone:
        # that is squared before it is reduced.
        ranks = dist.get_world_size() if isinstance(p, DTensor) else 1
        gradients.append(None if p.grad is None else local(p.grad) * ranks)
        p.grad = grad
    if all(g is None for g in gradients):
        raise RuntimeError(
            "IVON: add_curvature found no gradient. Under fully_shard every micro-batch of a step "
            "in which curvature_due is True needs its gradients reduced: "
            "model.set_requires_gradient_sync(True)."
        )
    return gradients
