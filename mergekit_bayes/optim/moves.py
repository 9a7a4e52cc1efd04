"""Parameters that leave their mean and return to it, whatever interrupts them on the way.

An exception may come between any two slices: Ctrl-C, or a GPU out of memory. Therefore `Moved`
counts which entries have left the mean and which have returned, and `restore` puts back those in
between. Blocking signals would not replace the counts, because running out of memory is no signal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mergekit_bayes.optim.noise import Draw
from mergekit_bayes.optim.shards import local
from mergekit_bayes.optim.slicing import Items, slices
from mergekit_bayes.optim.state import Group, ParameterState, update_weights

T = TypeVar("T")


@dataclass(slots=True)
class Moved:
    """A parameter while it is away from its mean.

    Where the mean is meanwhile: `state["mean"]` if there is a float32 master. Else, for entries
    `returned` to `left` (of the flat tensor) it is in `saved`, or where that is None it is
    weights - noise, and for all others it is in the parameter.

    Attributes:
        parameter: The parameter.
        group: Its parameter group.
        state: Its state.
        index: Numbers of group and parameter, which name its noise.
        draw: The draw of its noise; None for a move that is not random.
        saved: Buffer for the mean, like this rank's shard. None under a master, under
            `restore="redraw"`, and when the buffer was used up for noise * gradient.
        noise: The noise that was drawn, float32, kept beside a master only, because rounded
            weights do not tell it.
        left: Number of entries that have left the mean.
        returned: Number of entries that have been put back.
    """

    parameter: Tensor
    group: Group
    state: ParameterState
    index: tuple[int, int]
    draw: Draw | None
    saved: Tensor | None = None
    noise: Tensor | None = None
    left: int = 0
    returned: int = 0

    def leave(self, weights: Tensor, saved: Tensor | None) -> None:
        """Save the mean of a slice. To be called before its weights are changed.

        Args:
            weights: The slice of the parameter.
            saved: The same slice of `self.saved`, if there is one.
        """
        if saved is not None:
            saved.copy_(weights)
        self.left += max(1, weights.numel())  # 1: an empty shard is put back like the others


class Noise(Protocol):
    """How an optimizer draws the noise of a parameter: slice by slice, with other tensors."""

    def __call__(self, moved: Moved, *others: Tensor | float | None) -> Iterator[Items]:
        """Yield the noise of a slice in scratch, and the slices of `others`."""


@dataclass(slots=True)
class Buffers:
    """A third tensor of each parameter's size, kept between steps on a CPU.

    Fresh memory is zeroed page by page when it is touched, which costs as much as the noise. On
    other devices torch keeps memory itself.

    Attributes:
        keeps: Whether buffers are kept at all.
        tensors: The buffers that are not in use, by parameter.
    """

    keeps: bool = True
    tensors: dict[Tensor, Tensor] = field(default_factory=dict)

    def take(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Return the parameter's buffer if it is laid out like the given tensor, else a new one."""
        buffer = self.tensors.pop(parameter, None)
        layout = (like.dtype, like.device, like.shape, like.stride())
        if buffer is not None and _layout(buffer) == layout:
            return buffer
        return torch.empty_like(like)

    def keep(self, parameter: Tensor, buffer: Tensor) -> None:
        """Keep a buffer that is no longer in use."""
        # Outside of inference mode a tensor made in it could not be written to.
        if buffer.device.type == "cpu" and self.keeps and not buffer.is_inference():
            self.tensors[parameter] = buffer


def follow_weights(weights: Tensor, mean: Tensor) -> None:
    """Update a float32 master where the weights were changed from outside, by loading for example.

    Args:
        weights: This rank's weights, of fewer than 32 bits.
        mean: Their master, which keeps the entries that round to the weights.
    """
    for w, m in slices(weights, mean):
        m.copy_(torch.where(m.to(w.dtype) == w, m, w.float()))


def add_noise(moved: Moved, noise: Noise) -> None:
    """Move a parameter to mean + noise.

    Args:
        moved: The parameter at its mean. With `moved.noise`, the noise is kept there.
        noise: Draws the noise.
    """
    weights = local(moved.parameter)
    if "mean" not in moved.state:
        for drawn, w, saved in noise(moved, weights, moved.saved):
            moved.leave(w, saved)
            w.add_(drawn)
        return
    for drawn, w, m, kept in noise(moved, weights, local(moved.state["mean"]), moved.noise):
        if kept is not None:
            kept.copy_(drawn)
        w.copy_(drawn.add_(m))


def restore(moved: Moved, noise: Noise, buffers: Buffers) -> None:
    """Put the mean of a parameter back; it may have been moved, or put back, only in part."""
    if "mean" in moved.state:
        update_weights(moved.parameter, moved.state)
        return
    weights = local(moved.parameter)
    if moved.saved is not None:
        if moved.left >= weights.numel() and not moved.returned:
            weights.copy_(moved.saved)
        elif moved.returned < moved.left:  # only flat tensors are moved slice by slice
            away = slice(moved.returned, moved.left)
            weights.view(-1)[away].copy_(moved.saved.view(-1)[away])
        buffers.keep(moved.parameter, moved.saved)
    elif moved.returned < moved.left:
        seen = 0
        for drawn, w in noise(moved, weights):
            count = max(1, w.numel())
            if seen >= moved.returned and moved.returned < moved.left:
                w.sub_(drawn)
                moved.returned += count  # right after, lest an interrupt has it subtracted twice
            seen += w.numel()


def restore_all(all_moved: list[T], restore_one: Callable[[T], None]) -> None:
    """Put all means back. Ctrl-C meanwhile waits until that is done, and is then raised again."""
    interrupt: BaseException | None = None
    while all_moved:
        try:
            with torch.no_grad():
                restore_one(all_moved[-1])
            all_moved.pop()
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()
