"""IVON's steps of many small parameters in one call, as `steps` makes that of one alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.optim import slicing
from mergekit_bayes.optim.health import ROW
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.state import Group, ParameterState


class Pending(NamedTuple):
    """A small parameter whose step is to be made.

    Attributes:
        parameter: The parameter.
        group: Its parameter group.
        state: Its state.
        sampled: The sums over its samples.
    """

    parameter: Tensor
    group: Group
    state: ParameterState
    sampled: Sampled


def step_together(
    entries: Sequence[Pending],
    squares: dict[Tensor, Tensor],
    rate: Callable[[Tensor, Group], float],
    *,
    ggn: bool,
) -> None:
    """Make the steps of small parameters, as `steps` does those of one alone.

    Args:
        entries: The parameters and the sums over their samples.
        squares: Under "ggn" estimates of the Hessian diagonal; those used are taken out.
        rate: The learning rate of a Newton step.
        ggn: Whether the curvature is "ggn".
    """
    if not entries:
        return
    torch._foreach_add_([e.state["step"] for e in entries], torch.ones(()), alpha=1.0)
    _average([e.sampled for e in entries])
    runs: dict[tuple[Any, ...], list[Pending]] = {}
    for entry in entries:
        state = entry.state
        number = int(state["estimates"]) if ggn else 0
        place = (entry.sampled.way, entry.parameter.device, id(entry.group))
        key = (*place, int(state["step"]), number, entry.parameter in squares)
        runs.setdefault(key, []).append(entry)
    for run in (part for whole in runs.values() for part in _parts(whole)):
        if ggn:
            estimates = [squares.pop(e.parameter, None) for e in run]
            _ggn_step(run, [None if e is None else e.contiguous() for e in estimates])
        else:
            _price_step(run, rate(run[0].parameter, run[0].group))


def _parts(run: Sequence[Pending]) -> Iterator[list[Pending]]:
    """Split a run into parts of at most `GPU_SLICE` entries."""
    part: list[Pending] = []
    entries = 0
    for pending in run:
        size = pending.parameter.numel()
        if part and entries + size > slicing.GPU_SLICE:
            yield part
            part, entries = [], 0
        part.append(pending)
        entries += size
    yield part


def _price_step(run: Sequence[Pending], lr: float) -> None:
    """Make the step of parameters that share settings and number of steps."""
    first, group = run[0], run[0].group
    way: Any = first.sampled.way
    seen = way.price_step(
        *_tensors(run),
        [e.sampled.noise_grad for e in run],
        viewed=ROW,
        step=int(first.state["step"]),
        lr=lr,
        ess=group["ess"],
        beta1=group["beta1"],
        beta2=group["beta2"],
        weight_decay=group["weight_decay"],
        clip_radius=group["clip_radius"],
        debias=group["debias"],
    )
    torch._foreach_lerp_([e.state["noise"] for e in run], seen, 1 - group["beta2"])


def _ggn_step(run: Sequence[Pending], squares: list[Tensor | None]) -> None:
    """Make the step of parameters that share settings and numbers of steps and estimates."""
    first, group = run[0], run[0].group
    if squares[0] is not None:
        torch._foreach_add_([e.state["estimates"] for e in run], torch.ones(()), alpha=1.0)
    elif not first.state["estimates"]:  # without a curvature there is no Newton step
        momenta = [e.state["momentum"] for e in run]
        gradients = [e.sampled.grad.float() for e in run]
        torch._foreach_lerp_(momenta, gradients, 1 - group["beta1"])
        return
    beta2 = group["beta2"]
    way: Any = first.sampled.way
    way.ggn_step(
        *_tensors(run),
        squares,
        share=(1 - beta2) / (1 - beta2 ** max(1, int(first.state["estimates"]))),
        step=int(first.state["step"]),
        lr=group["lr"],
        beta1=group["beta1"],
        weight_decay=group["weight_decay"],
        clip_radius=group["clip_radius"],
        debias=group["debias"],
    )


def _tensors(run: Sequence[Pending]) -> tuple[list[Any], ...]:
    """Return weights, means, momenta, h and gradients."""
    states = [e.state for e in run]
    return (
        [e.parameter for e in run],
        [state.get("mean") for state in states],
        [state["momentum"] for state in states],
        [state["hess"] for state in states],
        [e.sampled.grad for e in run],
    )


def _average(sums: Sequence[Sampled]) -> None:
    """Divide sums over several samples by their number."""
    several = [s for s in sums if s.draws > 1]
    tensors = [(s.grad, s.draws) for s in several]
    tensors += [(s.noise_grad, s.draws) for s in several if s.noise_grad is not None]
    if tensors:
        torch._foreach_div_([t for t, _ in tensors], [float(draws) for _, draws in tensors])
