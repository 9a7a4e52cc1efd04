"""Many small parameters that leave their means and come back in one call each.

A call for each of them would cost the host ten times its arithmetic. All numbers are the same as
those of a parameter alone, bit for bit on a CPU with numba (`pointed`); elsewhere by `foreach`.
`steps_together` makes their steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import compress, groupby
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from mergekit_bayes.draws import mixes
from mergekit_bayes.optim import foreach, slicing
from mergekit_bayes.optim.noise import TRAIN, Draw
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.shards import at_least_float32, take_gradient
from mergekit_bayes.optim.state import Group, ParameterState

SMALL = 1 << 16  # entries of a parameter at most; larger ones take longer than their call
_IN_FLIGHT = 2  # of the memory of samples: the sums of earlier ones, and the present one
POINTED = "mergekit_bayes.optim.pointed"


@dataclass(slots=True)
class Member:
    """A small parameter.

    Attributes:
        parameter: The parameter.
        group: Its parameter group.
        state: Its state.
        index: Numbers of group and parameter, which name its noise.
    """

    parameter: Tensor
    group: Group
    state: ParameterState
    index: tuple[int, int]


def fits(way: Any, parameter: Tensor, state: ParameterState) -> bool:
    """Return whether a parameter goes together with others.

    Alone go large parameters, shards, tensors that are not contiguous and those whose prior is
    adapted.

    Args:
        way: The module that would work on it.
        parameter: The parameter.
        state: Its state.
    """
    if (
        parameter.numel() > SMALL
        or type(parameter) not in (Parameter, Tensor)
        or "weight_decay" in state
    ):
        return False
    if "mean" in state:
        return bool(way.fits(parameter, state["momentum"], state["hess"], state["mean"]))
    return bool(way.fits(parameter, state["momentum"], state["hess"]))


def goes_together(parameter: Tensor, state: ParameterState, sampled: Sampled) -> bool:
    """Return whether a parameter that was sampled together with others is still one of them."""
    return sampled.way is not None and fits(sampled.way, parameter, state)


@dataclass(slots=True)
class Arenas:
    """The memory of means, or of noise, of all small parameters, kept between steps.

    Attributes:
        free: Tensors by parameters, not in use.
        taken: Those that sums of the present step lie in.
    """

    free: list[list[Tensor]] = field(default_factory=list)
    taken: list[list[Tensor]] = field(default_factory=list)

    def take(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return float32 tensors of the shapes of some, on their device, one after the other."""
        if not parameters:
            return []
        if self.free and parameters[0].is_cpu:
            kept = self.free.pop()
            if [k.shape for k in kept] == [p.shape for p in parameters]:
                return kept
        sizes = [p.numel() for p in parameters]
        pieces = torch.split(torch.empty(sum(sizes), device=parameters[0].device), sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def give(self, kept: list[Tensor]) -> None:
        """Give memory back that is no longer in use; again after an interrupt changes nothing."""
        if not kept or len(self.free) == _IN_FLIGHT or any(kept is other for other in self.free):
            return
        # Outside of inference mode a tensor made in it could not be written to.
        if kept[0].is_cpu and not kept[0].is_inference():
            self.free.append(kept)

    def forget_step(self) -> None:
        """Give all memory back that sums lay in."""
        while self.taken:
            self.give(self.taken.pop())


class Together:
    """Small parameters while they are away from their means, as `moves.Moved` is a large one.

    Two flags tell whether all of them have left and whether all are back. Each is set in the same
    call as the tensors, or before what `kept` holds is changed, so that an interrupt finds both or
    neither.

    Args:
        way: The module that works on them.
        draw: The draw of their noise.
        arenas: Memory for their means.
        keeps_noise: Whether the noise is kept beside a float32 master.
    """

    def __init__(self, way: ModuleType, draw: Draw, arenas: Arenas, *, keeps_noise: bool) -> None:
        self.members: list[Member] = []
        self.entries = 0
        self._way: Any = way
        self._draw = draw
        self._arenas = arenas
        self._keeps_noise = keeps_noise
        self._arena: list[Tensor] = []
        self._flags = np.zeros(2, np.int64)
        self._weights: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        self._means: list[Tensor | None] = []
        self._kept: list[Tensor | None] = []

    def leave(
        self,
        place: Callable[[Tensor, Draw], int],
        generators: dict[torch.device, torch.Generator],
    ) -> None:
        """Move all members to their means plus noise.

        Args:
            place: Tells this rank's noise of a parameter from that of others; one for all here,
                which are not sharded.
            generators: torch's generators by device, added to where one is missing.
        """
        self._weights = [m.parameter for m in self.members]
        self._places = _places(self._weights)
        self._means = [m.state.get("mean") for m in self.members]
        keeps = [mean is None or self._keeps_noise for mean in self._means]
        self._arena = self._arenas.take(list(compress(self._weights, keeps)))
        memory = iter(self._arena)
        self._kept = [next(memory) if is_kept else None for is_kept in keeps]
        hess = [m.state["hess"] for m in self.members]
        decays = [float(m.group["weight_decay"]) for m in self.members]
        factors = [self._factor(m) for m in self.members]
        seeds = self._seeds(place(self._weights[0], self._draw))
        tensors = (self._weights, self._means, self._kept, hess)
        self._way.leave(*tensors, decays, factors, seeds, self._flags, generators)

    def take(self, sampled: dict[Tensor, Sampled], *, uses_noise: bool) -> None:
        """Put all members back, and add the gradients of this sample to the sums of the step.

        Args:
            sampled: The sums by parameter; changed in place.
            uses_noise: Whether noise * gradient is summed, too.
        """
        gradients = [None if p.grad is None else _plain_gradient(p) for p in self._weights]
        asked = gradients if uses_noise else [None] * len(gradients)
        products = self._come_back(asked)
        again: list[tuple[Sampled, Tensor, Any]] = []
        is_used = False
        for p, gradient, product in zip(self._weights, gradients, products, strict=True):
            if gradient is None:
                continue
            earlier = sampled.get(p)
            if earlier is None:
                kept = product if uses_noise else None
                sampled[p], is_used = Sampled(1, gradient, kept, way=self._way), uses_noise
            else:
                earlier.draws += 1
                earlier.grad = at_least_float32(earlier.grad)
                again.append((earlier, gradient, product))
        if again:
            torch._foreach_add_([e.grad for e, _, _ in again], [g for _, g, _ in again])
            if uses_noise:
                sums: list[Any] = [earlier.noise_grad for earlier, *_ in again]
                torch._foreach_add_(sums, [product for *_, product in again])
        if is_used:
            self._arenas.taken.append(self._arena)
        else:
            self._arenas.give(self._arena)
        self._arena = []

    def restore(self) -> None:
        """Put all members back that are away."""
        if self._flags[0] and not self._flags[1]:
            self._come_back([None] * len(self._weights))
        self._arenas.give(self._arena)

    def _come_back(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        # The compiled functions believe addresses. Weights that were exchanged while they were
        # away, by `model.half()` for example, are left to torch, which looks.
        way = self._way if _places(self._weights) == self._places else foreach
        products: Sequence[Tensor | None] = way.come_back(
            self._weights, self._means, self._kept, gradients, self._flags
        )
        return products

    def _factor(self, member: Member) -> float:
        if not member.state.get("estimates", 1):
            return 0.0
        return float(self._draw.scale / member.group["ess"] ** 0.5)

    def _seeds(self, place: int) -> list[int]:
        seeds: list[int] = []
        for number, run in groupby(self.members, lambda member: member.index[0]):
            members, draw = list(run), self._draw
            head = (members[0].group["seed"], draw.stream, draw.number, draw.sample, number)
            seeds += mixes(head, [m.index[1] for m in members], place)
        return seeds


class Gathered:
    """The small parameters of one sample, by their devices.

    Args:
        draw: The draw of their noise.
        arenas: Memory for their means.
        uses_noise: Whether a step needs the noise beside the gradient.
    """

    def __init__(self, draw: Draw, arenas: Arenas, uses_noise: bool) -> None:
        self._settings = (draw, arenas)
        self._keeps_noise = uses_noise and draw.stream == TRAIN
        self._together: list[Together] = []
        self._latest: dict[torch.device, Together] = {}
        # Loaded when it is needed, like the compiled passes themselves.
        self._on_cpu = import_module(POINTED) if slicing.passes_module() else foreach

    def accepts(self, member: Member) -> bool:
        """Take in a parameter if it is one that goes together with others."""
        way = self._on_cpu if member.parameter.is_cpu else foreach
        if not fits(way, member.parameter, member.state):
            return False
        device, size = member.parameter.device, member.parameter.numel()
        latest = self._latest.get(device)
        # On a GPU scratch memory does not grow with the number of parameters.
        if latest is None or (way is foreach and latest.entries + size > slicing.GPU_SLICE):
            latest = self._latest[device] = Together(
                way, *self._settings, keeps_noise=self._keeps_noise
            )
            self._together.append(latest)
        latest.members.append(member)
        latest.entries += size
        return True

    def all(self) -> list[Together]:
        """Return all parameters; those of a device are together."""
        return self._together


def _places(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the address and the number of entries of each."""
    return [(w.data_ptr(), w.numel()) for w in weights]


def _plain_gradient(parameter: Tensor) -> Tensor:
    """Return this rank's gradient, contiguous, of float32 or of the parameter's dtype."""
    gradient = take_gradient(parameter).contiguous()
    fits = gradient.dtype in (torch.float32, parameter.dtype)
    return gradient if fits else gradient.float()
