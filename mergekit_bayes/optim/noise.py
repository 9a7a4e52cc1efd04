"""The noise of weight samples: named draws, their seeds, and the noise slice by slice."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.optim.slicing import Items, compiled_passes, slices

TRAIN, PREDICT = 0, 1  # streams of noise


class Draw(NamedTuple):
    """The name of one draw of noise, from which it can be drawn again.

    Attributes:
        stream: `TRAIN` or `PREDICT`.
        number: Number of the step, or of the sample for prediction.
        sample: Number of the sample within the step; of the pair if antithetic.
        scale: Factor on the noise: 1, -1 for the second of an antithetic pair, or the root of a
            temperature.
    """

    stream: int
    number: int
    sample: int
    scale: float


def noise_slices(
    hess: Tensor,
    decay: Tensor | float,
    factor: float,
    seed: int,
    generators: dict[torch.device, torch.Generator],
    *others: Tensor | float | None,
) -> Iterator[Items]:
    """Draw `eps factor / sqrt(h + d)`, eps ~ N(0, 1), slice by slice into one scratch tensor.

    Args:
        hess: h; float32, of any shape.
        decay: d, of that shape or a number.
        factor: `scale / sqrt(ess)`. With 0 the noise is zero, and nothing is drawn.
        seed: Seed of 63 bits; the same seed gives the same noise, however it is sliced where
            the compiled pass fits.
        generators: torch's generators by device, added to where one is missing. They draw the
            noise where the compiled pass does not fit.
        others: Tensors of the shape of `hess`, numbers or None, to be sliced along.

    Yields:
        The noise of a slice, valid until the next one, and the slices of `others`.
    """
    passes = compiled_passes(hess, decay)
    generator = None if passes else seeded_generator(generators, hess.device, seed)
    scratch, start = torch.empty(0), 0
    for h, d, *rest in slices(hess, decay, *others):
        if scratch.shape != h.shape or not start:
            scratch = torch.empty_like(h)
        if not factor:
            scratch.zero_()
        elif passes is not None:
            passes.noise(scratch, h, d, factor, seed, start)
        else:
            scratch.normal_(generator=generator).mul_(torch.add(h, d).rsqrt_()).mul_(factor)
        start += h.numel()
        yield scratch, *rest


def seeded_generator(
    generators: dict[torch.device, torch.Generator], device: torch.device, seed: int
) -> torch.Generator:
    """Return the generator of a device, seeded; it is made where it is missing."""
    if device not in generators:
        generators[device] = torch.Generator(device)
    return generators[device].manual_seed(seed)
