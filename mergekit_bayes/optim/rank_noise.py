"""Noise of each rank's own: gradients and noise * gradient are reduced in the step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mergekit_bayes.optim.moves import Moved, Noise
from mergekit_bayes.optim.samples import Sampled, redrawn_product
from mergekit_bayes.optim.shards import at_least_float32


def check_replicas(parameters: Sequence[Tensor], *, copies: bool) -> None:
    """Check that ranks may draw noise of their own on these parameters.

    Args:
        parameters: All parameters of the optimizer.
        copies: Whether `restore` is "copy".

    Raises:
        ValueError: The parameters are sharded, or replicas of them would drift apart.
    """
    for p in parameters:
        if isinstance(p, DTensor):
            raise ValueError(
                "IVON: rank_noise=True needs replicas; of sharded parameters all ranks see one "
                "sample"
            )
        if not copies and p.requires_grad and p.dtype.itemsize >= 4:
            raise ValueError(
                "IVON: rank_noise=True with restore='redraw' would let replicas drift apart: "
                "without a float32 master each rank's noise leaves rounding of its own. Use "
                "restore='copy'."
            )


def sampled_on_any_rank(
    parameters: Sequence[Tensor], sampled: dict[Tensor, Sampled], *, check: bool
) -> set[Tensor]:
    """Return the parameters with a gradient on this rank or on another one; a collective.

    Args:
        parameters: All parameters that are trained, in the same order on all ranks.
        sampled: Sums over the samples of this rank, by parameter.
        check: Whether to check that the gradients of the ranks differ.

    Raises:
        RuntimeError: The gradients are reduced already, so that h would be divided by the number
            of ranks.
    """
    device = parameters[0].device if parameters else None
    ours = torch.zeros(len(parameters) + 1, dtype=torch.float64, device=device)
    ours[:-1] = torch.tensor([p in sampled for p in parameters], dtype=torch.float64)
    if check:
        ours[-1] = sum(s.grad.double().abs().sum().to(ours.device) for s in sampled.values())
    ranks = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, ours)
    *anywhere, largest = torch.stack(ranks).amax(0).tolist()
    if check and largest > 0 and all(float(r[-1]) == largest for r in ranks):
        raise RuntimeError(
            "IVON: rank_noise=True, but the gradients are the same on all ranks. Call backward "
            "under DDP's no_sync(), for every micro-batch, and give each rank its own part of the "
            "batch."
        )
    return {p for p, is_sampled in zip(parameters, anywhere, strict=True) if is_sampled}


def mean_over_ranks(
    moved: Moved, sampled: Sampled | None, noise: Noise, *, uses_noise: bool, copies: bool
) -> Sampled:
    """Make gradient and noise * gradient means over the samples of all ranks; a collective.

    Args:
        moved: The parameter.
        sampled: Sums over this rank's samples; None counts as zero.
        noise: Draws the noise again where noise * gradient was not kept.
        uses_noise: Whether noise * gradient is needed.
        copies: Whether `restore` is "copy", which makes noise * gradient in the gradient's dtype.
    """
    if sampled is None:
        zero = at_least_float32(torch.zeros_like(moved.parameter))
        product = zero.clone() if copies else torch.zeros_like(moved.state["hess"])
        sampled = Sampled(1, zero, product if uses_noise else None, moved=moved)
    elif uses_noise and sampled.noise_grad is None:
        assert sampled.moved is not None
        sampled.noise_grad = redrawn_product(sampled.moved, sampled.grad, noise)
    sampled.grad = at_least_float32(sampled.grad)
    for tensor in (sampled.grad, sampled.noise_grad):
        if tensor is not None:
            dist.all_reduce(tensor.div_(sampled.draws * dist.get_world_size()))
    sampled.draws = 1
    return sampled
