"""The passes of `passes` over many small tensors in one call, which finds them by their addresses.

Compiled by numba: import only after checking that numba is installed. To hand numba an array takes
longer than a pass over a thousand entries, so tensors come as addresses in one table. They are
read without any check: `fits` has to be asked in the same step. `foreach` has the same functions
for other devices, of which `together` chooses one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bayes.compiled import compiled, inlined
from mergekit_bayes.optim.passes import ggn_entries, ivon_entries, noise_entries

Flags = NDArray[np.int64]


def fits(parameter: Tensor, *state: Tensor) -> bool:
    """Return whether these functions work on a parameter with its state of the same shape.

    That is on a CPU, contiguous, of float32 or bfloat16, and the state of float32.
    """
    dtype, shape = parameter.dtype, parameter.shape
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    for t in state:
        if not t.is_cpu or t.dtype is not torch.float32 or t.shape != shape:
            return False
        if not t.is_contiguous():
            return False
    # The memory of a parameter may have been given back, by a library that shards models.
    has_memory = parameter.data_ptr() != 0 or parameter.numel() == 0
    return parameter.is_cpu and has_memory and parameter.is_contiguous()


def leave(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    hess: Sequence[Tensor],
    decays: Sequence[float],
    factors: Sequence[float],
    seeds: Sequence[int],
    flags: Flags,
    generators: object,
) -> None:
    """Move parameters from their means to `mean + eps factor / sqrt(h + d)`.

    Args:
        weights: The parameters.
        means: Their float32 masters, which first follow the weights where these were changed from
            outside; None where the parameter is the mean.
        kept: Overwritten: with the mean, or beside a master with the noise; float32. None beside
            a master whose noise is not needed.
        hess: h.
        decays: d, the prior's precision over ess.
        factors: `scale / sqrt(ess)`. With 0 the noise is zero.
        seeds: Seeds of 63 bits.
        flags: The first entry is set to 1 when the parameters have left their means, in the same
            call, so that no interrupt comes between.
        generators: Not used; the noise is that of `passes.noise`.
    """
    _leave(
        _addresses(weights, means, kept, hess),
        _sizes(weights),
        np.array(decays, np.float32),
        np.array(factors, np.float32),
        np.array(seeds, np.uint64),
        flags,
    )
    torch.autograd.graph.increment_version(weights)


def come_back(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    flags: Flags,
) -> Sequence[Tensor | None]:
    """Put parameters back to their means, and return noise * gradient.

    Args:
        weights: The parameters, as `leave` left them.
        means: Their float32 masters, or None.
        kept: What `leave` has kept.
        gradients: Their gradients, of float32 or of the parameter's dtype; None for those whose
            noise is not needed.
        flags: The second entry is set to 1, as the first one in `leave`.

    Returns:
        noise * gradient, float32, in the memory of `kept`; undefined where there is no gradient.
    """
    _come_back(
        _addresses(weights, means, kept, gradients), _sizes(weights), _narrow(gradients), flags
    )
    torch.autograd.graph.increment_version(weights)
    return kept


def price_step(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    hess: Sequence[Tensor],
    gradients: Sequence[Tensor],
    noise_grads: Sequence[Tensor],
    *,
    viewed: int,
    step: int,
    lr: float,
    ess: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    clip_radius: float,
    debias: bool,
) -> Sequence[Tensor]:
    """Make the step of `updates.ivon_update` of each parameter.

    The arguments are the same but those of `leave`, each of many parameters that share the
    settings. Gradients are of float32 or bfloat16.

    Returns:
        Mean of ((f - h) / (h + d))^2 over the first `viewed` entries of each parameter.
    """
    sizes = _sizes(weights)
    order = np.argsort(sizes, kind="stable")  # so that equal ones lie behind each other
    counts = np.minimum(sizes[order], viewed)
    squares = torch.empty(int(counts.sum()))
    addresses = _addresses(weights, means, momenta, hess, gradients, noise_grads)
    newton = _newton(step, lr, beta1, weight_decay, clip_radius, debias)
    a2, half = np.float32(1 - beta2), np.float32(0.5 * (1 - beta2) ** 2)
    _price(
        addresses[order],
        sizes[order],
        _narrow(gradients)[order],
        counts,
        squares.numpy(),
        np.float32(ess),
        a2,
        half,
        *newton,
    )
    torch.autograd.graph.increment_version(weights)
    means_of_squares = torch.empty(len(sizes))
    numbers = torch.from_numpy(np.maximum(counts, 1).astype(np.float32))
    means_of_squares[torch.from_numpy(order)] = _sums(squares, counts) / numbers
    return means_of_squares.unbind()


def ggn_step(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    hess: Sequence[Tensor],
    gradients: Sequence[Tensor],
    squares: Sequence[Tensor | None],
    *,
    share: float,
    step: int,
    lr: float,
    beta1: float,
    weight_decay: float,
    clip_radius: float,
    debias: bool,
) -> None:
    """Make the step of `updates.ggn_update` of each parameter; as `price_step`."""
    addresses = _addresses(weights, means, momenta, hess, gradients, squares)
    newton = _newton(step, lr, beta1, weight_decay, clip_radius, debias)
    _ggn(addresses, _sizes(weights), _narrow(gradients), np.float32(share), *newton)
    torch.autograd.graph.increment_version(weights)


def _addresses(*columns: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Return the addresses of many tensors, one row a parameter; 0 for None."""
    table = np.empty((len(columns[0]), len(columns)), np.int64)
    for k, column in enumerate(columns):
        table[:, k] = [0 if t is None else t.data_ptr() for t in column]
    return table


def _sizes(weights: Sequence[Tensor]) -> NDArray[np.int64]:
    return np.array([w.numel() for w in weights], np.int64)


def _narrow(gradients: Sequence[Tensor | None]) -> NDArray[np.bool_]:
    return np.array([g is not None and g.dtype == torch.bfloat16 for g in gradients], np.bool_)


def _newton(
    step: int, lr: float, beta1: float, decay: float, clip_radius: float, debias: bool
) -> tuple[np.float32, ...]:
    correction = 1 - beta1**step if debias else 1.0
    numbers = (decay, 1 - beta1, correction, clip_radius * correction, lr / correction)
    return tuple(np.float32(n) for n in numbers)


def _sums(values: Tensor, sizes: NDArray[np.int64]) -> Tensor:
    """Return the sum of each of many tensors that lie behind each other; equal ones in one call."""
    starts = np.flatnonzero(np.diff(sizes, prepend=-1))
    counts = np.diff(starts, append=len(sizes)).tolist()
    lengths = sizes[starts].tolist()
    runs = values.split([k * n for k, n in zip(counts, lengths, strict=True)])
    return torch.cat(
        [run.view(k, n).sum(1) for run, k, n in zip(runs, counts, lengths, strict=True)]
    )


@intrinsic
def _pointer(context, address):
    """Return a number as a pointer."""

    def make(target, builder, signature, arguments):
        return builder.inttoptr(arguments[0], target.get_value_type(types.voidptr))

    return types.voidptr(types.int64), make


@inlined
def _floats(address, size):
    return carray(_pointer(address), (size,), np.float32)


@inlined
def _halves(address, size):
    return carray(_pointer(address), (size,), np.uint16)


@inlined
def _widened(half):
    """Return a bfloat16 as float32."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@inlined
def _narrowed(x):
    """Return a float32 as the nearest bfloat16, of two the even one."""
    bits = np.float32(x).view(np.uint32)
    even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)


@inlined
def _gradient(address, size, is_narrow, scratch):
    """Return a gradient as float32, in scratch where it is bfloat16."""
    if not is_narrow:
        return _floats(address, size)
    half = _halves(address, size)
    for i in range(size):
        scratch[i] = _widened(half[i])
    return scratch[:size]


@inlined
def _round(weights, mean):
    for i in range(mean.size):
        weights[i] = _narrowed(mean[i])


@compiled(error_model="numpy")
def _leave(addresses, sizes, decays, factors, seeds, flags):
    scratch = np.empty(sizes.max(), np.float32)
    for k in range(sizes.size):
        n = sizes[k]
        kept, drawn = _floats(addresses[k, 2], n), scratch[:n]
        if factors[k] == 0:
            drawn[:] = 0
        else:
            low, high = np.uint32(seeds[k]), np.uint32(seeds[k] >> np.uint64(32))
            hess = _floats(addresses[k, 3], n)
            noise_entries(drawn, hess, None, decays[k], factors[k], low, high, np.uint64(0))
        if addresses[k, 1] == 0:
            weights = _floats(addresses[k, 0], n)
            for i in range(n):
                kept[i] = weights[i]
                weights[i] = weights[i] + drawn[i]
        else:
            halves, mean = _halves(addresses[k, 0], n), _floats(addresses[k, 1], n)
            for i in range(n):
                weight = _widened(halves[i])
                mean[i] = mean[i] if _widened(_narrowed(mean[i])) == weight else weight
                halves[i] = _narrowed(drawn[i] + mean[i])
            if addresses[k, 2] != 0:
                kept[:] = drawn
    flags[0] = 1


@compiled(error_model="numpy")
def _come_back(addresses, sizes, narrow, flags):
    scratch = np.empty(sizes.max(), np.float32)
    for k in range(sizes.size):
        n = sizes[k]
        kept, has_gradient = _floats(addresses[k, 2], n), addresses[k, 3] != 0
        if addresses[k, 1] == 0:
            weights = _floats(addresses[k, 0], n)
            if has_gradient:
                gradient = _gradient(addresses[k, 3], n, narrow[k], scratch)
                for i in range(n):
                    noise = weights[i] - kept[i]
                    weights[i] = kept[i]
                    kept[i] = noise * gradient[i]
            else:
                weights[:] = kept
        else:
            _round(_halves(addresses[k, 0], n), _floats(addresses[k, 1], n))
            if has_gradient:
                gradient = _gradient(addresses[k, 3], n, narrow[k], scratch)
                for i in range(n):
                    kept[i] = kept[i] * gradient[i]
    flags[1] = 1


@compiled(error_model="numpy")
def _price(
    addresses,
    sizes,
    narrow,
    viewed,
    squares,
    ess,
    a2,
    half,
    decay,
    a1,
    correction,
    clip,
    rate,
):
    scratch, start = np.empty(sizes.max(), np.float32), 0
    for k in range(sizes.size):
        n, has_master = sizes[k], addresses[k, 1] != 0
        mean = _floats(addresses[k, 1] if has_master else addresses[k, 0], n)
        momentum, hess = _floats(addresses[k, 2], n), _floats(addresses[k, 3], n)
        gradient = _gradient(addresses[k, 4], n, narrow[k], scratch)
        noise_grad = _floats(addresses[k, 5], n)
        for i in range(viewed[k]):
            ratio = noise_grad[i] * ess - hess[i] / (hess[i] + decay)
            squares[start + i] = ratio * ratio
        start += viewed[k]
        ivon_entries(
            mean,
            momentum,
            hess,
            gradient,
            noise_grad,
            ess,
            a2,
            half,
            None,
            None,
            decay,
            a1,
            correction,
            clip,
            rate,
        )
        if has_master:
            _round(_halves(addresses[k, 0], n), mean)


@compiled(error_model="numpy")
def _ggn(addresses, sizes, narrow, share, decay, a1, correction, clip, rate):
    scratch = np.empty(sizes.max(), np.float32)
    for k in range(sizes.size):
        n, has_master = sizes[k], addresses[k, 1] != 0
        mean = _floats(addresses[k, 1] if has_master else addresses[k, 0], n)
        momentum, hess = _floats(addresses[k, 2], n), _floats(addresses[k, 3], n)
        gradient = _gradient(addresses[k, 4], n, narrow[k], scratch)
        newton = (None, None, decay, a1, correction, clip, rate)
        if addresses[k, 5] == 0:
            ggn_entries(mean, momentum, hess, gradient, None, share, *newton)
        else:
            squares = _floats(addresses[k, 5], n)
            ggn_entries(mean, momentum, hess, gradient, squares, share, *newton)
        if has_master:
            _round(_halves(addresses[k, 0], n), mean)
