"""Numbers that tell how much a posterior can be trusted."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.shards import local
from mergekit_bayes.optim.state import ParameterState

_VIEWED = 65536  # entries of a tensor that quantiles are taken of
ROW, _EVERY = 4096, 16  # the noise number looks at every 16th row of 4096 entries


class Entry(NamedTuple):
    """A parameter whose posterior is looked at.

    Attributes:
        parameter: The parameter.
        state: Its state.
        decay: d, the prior's precision over `ess`: a number or this rank's shard.
        ess: Effective sample size, in observations.
    """

    parameter: Tensor
    state: ParameterState
    decay: Tensor | float
    ess: float


def posterior_health(entries: Iterable[Entry], beta2: float, sharded: bool) -> dict[str, float]:
    """Return the numbers of every optimizer, as `PosteriorOptimizer.health` describes them.

    Args:
        entries: The trained parameters.
        beta2: Decay of h.
        sharded: Whether any parameter is sharded; then this is a collective over all ranks.
    """
    samples, ratios, steps, bad = [], [], 0, 0
    for parameter, state, decay, ess in entries:
        hess, weights = local(state["hess"]).flatten(), local(parameter).float()
        steps = max(steps, int(state["step"]))
        curvature = hess + (decay.flatten() if isinstance(decay, Tensor) and decay.ndim else decay)
        bad += int((~(curvature > 0) | ~curvature.isfinite()).sum())
        samples.append(hess[:: max(1, hess.numel() // _VIEWED)])
        rms = float(weights.square().mean().sqrt()) if weights.numel() else 0.0
        if rms > 0 and parameter.ndim > 1:  # biases are near zero and would always alarm
            ratios.append(float((curvature * ess).rsqrt().median()) / rms)
    values = torch.cat(samples) if samples else torch.zeros(1)
    if sharded:
        values, ratios, bad = _gathered(values, ratios, bad)
    return {
        "init_fraction": beta2**steps,
        "hess_min": float(values.min()),
        "hess_median": float(values.median()),
        "hess_max": float(values.max()),
        "bad_entries": float(bad),
        "sigma_over_rms": sorted(ratios)[len(ratios) // 2] if ratios else 0.0,
    }


def gradient_norm(sampled: Mapping[Tensor, Sampled], sharded: bool) -> float:
    """Norm of the mean gradient over the samples since the last step.

    Args:
        sampled: Sums over the samples by parameter.
        sharded: Whether any parameter is sharded; then this is a collective over all ranks.
    """
    total = 0.0
    for parameter, sums in sampled.items():
        square = float(sums.grad.float().square().sum()) / max(1, sums.draws) ** 2
        total += square / _copies(parameter) if sharded else square
    if sharded:
        totals: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(totals, total)
        total = sum(totals)
    return math.sqrt(total)


def _copies(parameter: Tensor) -> int:
    """Number of ranks that have the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return dist.get_world_size()
    mesh = parameter.device_mesh
    shards = [mesh.size(i) for i, place in enumerate(parameter.placements) if place.is_shard()]
    return dist.get_world_size() // math.prod(shards)


def curvature_noise(states: Iterable[tuple[ParameterState, float]]) -> float:
    """Return the noise of IVON's h: `0.5 (1 - b2) E[((f - h) / (h + d))^2]`, median over tensors.

    Args:
        states: State and b2 of each trained parameter.
    """
    numbers = []
    for state, beta2 in states:
        if "noise" in state and state["step"] > 0:
            debiased = float(state["noise"]) / (1 - beta2 ** int(state["step"]))
            numbers.append(0.5 * (1 - beta2) * debiased)
    return sorted(numbers)[len(numbers) // 2] if numbers else 0.0


def curvature_ratios(noise_grad: Tensor, hess: Tensor, decay: Tensor | float, ess: float) -> Tensor:
    """Return (f - h) / (h + d) of some entries, with f = ess (h + d) noise_grad."""
    f, h = _some(noise_grad), _some(hess)
    d = _some(decay) if isinstance(decay, Tensor) and decay.ndim else decay
    return (f * ess).sub_(h / (h + d))


def _some(tensor: Tensor) -> Tensor:
    """Return every `_EVERY`th row of a flat tensor, the same ones in a tensor and its slices."""
    flat = tensor.reshape(-1)
    rows = flat.numel() // (ROW * _EVERY)
    if not rows:
        return flat[:ROW]
    return flat[: rows * ROW * _EVERY].view(rows, -1)[:, :ROW]


def _gathered(values: Tensor, ratios: list[float], bad: int) -> tuple[Tensor, list[float], int]:
    """Put together what each rank has seen; replicas count twice, which changes no median."""
    stride = max(1, values.numel() // _VIEWED)
    extremes = (values.min()[None], values.max()[None])
    ours = (torch.cat([values[::stride], *extremes]).cpu(), ratios, bad)
    ranks = [ours] * dist.get_world_size()
    dist.all_gather_object(ranks, ours)
    return (
        torch.cat([values for values, _, _ in ranks]),
        [ratio for _, ratios, _ in ranks for ratio in ratios],
        sum(bad for _, _, bad in ranks),
    )
