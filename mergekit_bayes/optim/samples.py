"""Sums over the weight samples of one step: of gradients, and of noise * gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mergekit_bayes.optim.moves import Buffers, Moved, Noise
from mergekit_bayes.optim.shards import at_least_float32, local
from mergekit_bayes.optim.slicing import Items, slices


@dataclass(slots=True)
class Sampled:
    """Sums over the samples of one step, for this rank's shard of one parameter.

    Attributes:
        draws: Number of samples in the sums.
        grad: Sum of the gradients of the mean loss; in VOGN of single examples' losses.
        noise_grad: IVON with `curvature="price"`: sum of noise * gradient, noise = sample - mean.
            None if it is to be made from the noise of `moved`, drawn again, and `grad`.
        squares: VOGN: sum of the squared gradients of single examples.
        moved: The parameter at the sample that `grad` belongs to, while there is only one.
        way: The module by which it was sampled together with others; None of one alone.
    """

    draws: int
    grad: Tensor
    noise_grad: Tensor | None = None
    squares: Tensor | None = None
    moved: Moved | None = None
    way: ModuleType | None = None


def add_gradient(sampled: dict[Tensor, Sampled], moved: Moved, gradient: Tensor) -> None:
    """Add the gradient of one more sample, whose noise is not needed."""
    earlier = sampled.get(moved.parameter)
    if earlier is None:
        sampled[moved.parameter] = Sampled(1, gradient, moved=moved)
        return
    earlier.draws += 1
    earlier.grad = at_least_float32(earlier.grad).add_(gradient)


def add_noise_gradient(
    sampled: dict[Tensor, Sampled], moved: Moved, gradient: Tensor, noise: Noise, buffers: Buffers
) -> None:
    """Add gradient and noise * gradient of one more sample.

    Args:
        sampled: The sums by parameter; changed in place.
        moved: The parameter, still at the sample.
        gradient: This rank's gradient at the sample.
        noise: Draws the noise.
        buffers: Where buffers that are no longer in use are kept.
    """
    earlier = sampled.get(moved.parameter)
    has_noise = moved.noise is not None or moved.saved is not None  # else it must be drawn again
    if earlier is None and not has_noise:
        sampled[moved.parameter] = Sampled(1, gradient, moved=moved)
        return
    product = (
        product_in_place(moved, gradient) if has_noise else redrawn_product(moved, gradient, noise)
    )
    if earlier is None:
        sampled[moved.parameter] = Sampled(1, gradient, product, moved=moved)
        return
    if earlier.noise_grad is None:
        assert earlier.moved is not None
        earlier.noise_grad = redrawn_product(earlier.moved, earlier.grad, noise)
    earlier.draws += 1
    earlier.grad = at_least_float32(earlier.grad).add_(gradient)
    earlier.noise_grad.add_(product)
    buffers.keep(moved.parameter, product)


def product_in_place(moved: Moved, gradient: Tensor) -> Tensor:
    """Return noise * gradient in the buffer of the noise, or of the mean, which is put back."""
    if moved.noise is not None:
        return moved.noise.mul_(gradient)
    assert moved.saved is not None
    for w, m, g in slices(local(moved.parameter), moved.saved, gradient):
        noise = w - m
        w.copy_(m)
        # Before the mean is overwritten, because an interrupt may come between the two.
        moved.returned += max(1, w.numel())
        torch.mul(noise, g, out=m)
    product, moved.saved = moved.saved, None
    return product


def redrawn_product(moved: Moved, gradient: Tensor, noise: Noise) -> Tensor:
    """Return noise * gradient, float32, from the noise drawn again."""
    product = torch.empty_like(local(moved.state["hess"]))
    for piece, p in redrawn(moved, gradient, noise, product):
        p.copy_(piece)
    return product


def redrawn(
    moved: Moved, gradient: Tensor, noise: Noise, *others: Tensor | float | None
) -> Iterator[Items]:
    """Yield noise * gradient in scratch, from the noise drawn again, and slices of `others`."""
    for drawn, g, *rest in noise(moved, gradient, *others):
        yield drawn.mul_(g), *rest
