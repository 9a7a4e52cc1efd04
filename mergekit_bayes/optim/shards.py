"""Sharded parameters (DTensor): this rank's shard, whole tensors, sums over shards."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

T = TypeVar("T")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard; a tensor that is not sharded is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's rows as those of a tensor that is sharded like a parameter.

    Args:
        tensor: Of the shape of `local(parameter)`, on its device.
        parameter: The parameter; for one that is not sharded the tensor is returned as it is.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(tensor, mesh, placements, shape=shape, stride=stride)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather shards into whole tensors on the CPU of rank 0.

    A collective: all ranks must call it, and all but rank 0 get an empty dict. Tensors are
    gathered one after the other, so that no device holds more than one whole tensor. Under
    `fully_shard`, mean and posterior are gathered by

        mean = full_tensors(model.state_dict())
        precision = full_tensors(optimizer.precision(model.named_parameters()))
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if whole is not None:
            gathered[name] = whole
    return gathered


def whole_tensor(tensor: Tensor) -> Tensor | None:
    """Gather one tensor on the CPU of rank 0; None on the others. All ranks must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    is_shared = full.data_ptr() == local(tensor).data_ptr()  # nothing had to be gathered
    return full.detach().to("cpu", copy=is_shared)


def shard_index(parameter: Tensor) -> int:
    """Return which shard of the parameter this rank holds; replicas of a shard agree."""
    if not isinstance(parameter, DTensor):
        return 0
    index = 0
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            mesh = parameter.device_mesh
            index = index * mesh.size(dim) + mesh.get_local_rank(dim)
    return index


def take_gradient(parameter: Tensor) -> Tensor:
    """Take this rank's gradient away from the parameter, so that no later backward changes it."""
    assert parameter.grad is not None
    gradient = local(parameter.grad)
    parameter.grad = None
    if gradient.untyped_storage().nbytes() > gradient.nbytes or not gradient.is_contiguous():
        return gradient.clone()  # a view, for example of a bucket of DDP
    return gradient


def at_least_float32(gradient: Tensor) -> Tensor:
    """Convert a gradient of fewer than 32 bits to float32, before others are added to it."""
    return gradient.float() if gradient.dtype.itemsize < 4 else gradient


def sum_over_shards(
    entries: list[tuple[Tensor, T, Tensor, int]],
) -> Iterator[tuple[Tensor, T, Tensor, float]]:
    """Add up a sum and a count of each parameter over its shards; one collective for each mesh.

    Args:
        entries: Parameter, anything, sum over this rank's entries (a scalar), and their count.

    Yields:
        The same with sum and count over all shards. Parameters without shards come first.
    """
    meshes: dict[DeviceMesh, list[tuple[Tensor, T, Tensor, int]]] = {}
    for entry in entries:
        if isinstance(entry[0], DTensor):
            meshes.setdefault(entry[0].device_mesh, []).append(entry)
        else:
            yield entry
    for mesh, sharded in meshes.items():
        device = sharded[0][2].device
        counts = torch.tensor([e[3] for e in sharded], dtype=torch.float32, device=device)
        ours = torch.stack([torch.stack([e[2] for e in sharded]), counts])
        sums, totals = DTensor.from_local(ours, mesh, [Partial()] * mesh.ndim).full_tensor()
        for entry, total, count in zip(sharded, sums, totals.tolist(), strict=True):
            yield entry[0], entry[1], total, count
