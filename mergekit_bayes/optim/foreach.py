"""The functions of `pointed` by torch's foreach functions, for GPUs and where numba is missing.

On a GPU each call is a few kernels for all tensors. The arithmetic is that of `noise`, `moves` and
`updates`, operation by operation, with the same noise of torch's generators.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.optim.noise import seeded_generator


def fits(parameter: Tensor, *state: Tensor) -> bool:
    """Return whether these functions work on a parameter with its state of the same shape.

    That is contiguous, of float32, bfloat16 or float16, and the state of float32.
    """
    return (
        parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and parameter.is_contiguous()
        and all(
            t.dtype == torch.float32
            and t.shape == parameter.shape
            and t.device == parameter.device
            and t.is_contiguous()
            for t in state
        )
    )


def leave(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    hess: Sequence[Tensor],
    decays: Sequence[float],
    factors: Sequence[float],
    seeds: Sequence[int],
    flags: Any,
    generators: dict[torch.device, torch.Generator],
) -> None:
    """Move parameters from their means to `mean + eps factor / sqrt(h + d)`; as in `pointed`.

    Args:
        weights: The parameters.
        means: Their float32 masters, or None.
        kept: Overwritten with the mean, or beside a master with the noise; None where that is
            not needed.
        hess: h.
        decays: d, the prior's precision over ess.
        factors: `sign / sqrt(ess)`. With 0 the noise is zero, and nothing is drawn.
        seeds: Seeds of torch's generators.
        flags: The first entry is set to 1 before any parameter leaves its mean.
        generators: torch's generators by device, added to where one is missing.
    """
    noise = _noise(hess, decays, factors, seeds, generators)
    plain = [k for k, mean in enumerate(means) if mean is None]
    saved, moved = _at(kept, plain), _at(weights, plain)
    if plain:
        torch._foreach_copy_(saved, moved)
    flags[0] = 1
    if plain:
        torch._foreach_add_(moved, _at(noise, plain))
    mastered = [k for k, mean in enumerate(means) if mean is not None]
    if not mastered:
        return
    masters, rounded, drawn = _at(means, mastered), _at(weights, mastered), _at(noise, mastered)
    _follow_weights(rounded, masters)
    asked = [k for k in mastered if kept[k] is not None]
    if asked:
        torch._foreach_copy_(_at(kept, asked), _at(noise, asked))
    torch._foreach_add_(drawn, masters)
    torch._foreach_copy_(rounded, drawn)


def come_back(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    flags: Any,
) -> list[Tensor | None]:
    """Put parameters back to their means, and return noise * gradient; as in `pointed`.

    Args:
        weights: The parameters, as `leave` left them.
        means: Their float32 masters, or None.
        kept: What `leave` has kept.
        gradients: Their gradients; None for those whose noise is not needed.
        flags: The second entry is set to 1 when all are back.

    Returns:
        noise * gradient, float32; undefined where there is no gradient.
    """
    asked = [k for k, gradient in enumerate(gradients) if gradient is not None]
    plain = [k for k in asked if means[k] is None]
    noise = list(kept)
    if plain:
        for k, drawn in zip(
            plain, torch._foreach_sub(_at(weights, plain), _at(kept, plain)), strict=True
        ):
            noise[k] = drawn
    sources: list[Any] = [k if m is None else m for k, m in zip(kept, means, strict=True)]
    torch._foreach_copy_(list(weights), sources)
    flags[1] = 1
    if asked:
        torch._foreach_mul_(_at(noise, asked), _at(gradients, asked))
    return noise


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
) -> list[Tensor]:
    """Make the step of `updates.ivon_update` of each parameter; as in `pointed`.

    Returns:
        Mean of ((f - h) / (h + d))^2 over the first `viewed` entries of each parameter, by a norm,
        which rounds otherwise than the sum in the step of one alone.
    """
    some = [h.reshape(-1)[:viewed] for h in hess]
    ratios = torch._foreach_mul([q.reshape(-1)[:viewed] for q in noise_grads], ess)
    torch._foreach_sub_(ratios, torch._foreach_div(some, torch._foreach_add(some, weight_decay)))
    norms = torch._foreach_norm(ratios)
    squares = torch._foreach_mul(norms, norms)
    torch._foreach_div_(squares, [float(max(1, ratio.numel())) for ratio in ratios])
    _lerp(momenta, gradients, 1 - beta1)
    curvature = torch._foreach_add(list(hess), weight_decay)
    change = torch._foreach_addcmul(list(hess), list(noise_grads), curvature, value=-ess)
    torch._foreach_sub_(list(hess), change, alpha=1 - beta2)
    torch._foreach_mul_(change, change)
    torch._foreach_addcdiv_(list(hess), change, curvature, value=0.5 * (1 - beta2) ** 2)
    _newton_step(weights, means, momenta, hess, step, lr, beta1, weight_decay, clip_radius, debias)
    return list(squares)


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
    """Make the step of `updates.ggn_update` of each parameter; all have squares, or none."""
    _lerp(momenta, gradients, 1 - beta1)
    estimates = [square for square in squares if square is not None]
    if estimates:
        torch._foreach_lerp_(list(hess), estimates, share)
    _newton_step(weights, means, momenta, hess, step, lr, beta1, weight_decay, clip_radius, debias)


def _noise(
    hess: Sequence[Tensor],
    decays: Sequence[float],
    factors: Sequence[float],
    seeds: Sequence[int],
    generators: dict[torch.device, torch.Generator],
) -> list[Tensor]:
    noise = [torch.zeros_like(h) for h in hess]
    drawn = [k for k, factor in enumerate(factors) if factor]
    if drawn:
        for k in drawn:
            noise[k].normal_(generator=seeded_generator(generators, noise[k].device, seeds[k]))
        deviations = torch._foreach_add(_at(hess, drawn), _at(decays, drawn))
        torch._foreach_rsqrt_(deviations)
        torch._foreach_mul_(_at(noise, drawn), deviations)
        torch._foreach_mul_(_at(noise, drawn), _at(factors, drawn))
    return noise


def _follow_weights(weights: list[Tensor], means: list[Tensor]) -> None:
    """Do as `moves.follow_weights`, by kernels for tensors of one dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for k, weight in enumerate(weights):
        kinds.setdefault((weight.dtype, weight.device), []).append(k)
    for kind in kinds.values():
        w = torch.cat([t.reshape(-1) for t in _at(weights, kind)])
        m = torch.cat([t.view(-1) for t in _at(means, kind)])
        followed = torch.where(m.to(w.dtype) == w, m, w.float())
        flat = [t.view(-1) for t in _at(means, kind)]
        torch._foreach_copy_(flat, torch.split(followed, [t.numel() for t in flat]))


def _lerp(momenta: Sequence[Tensor], gradients: Sequence[Tensor], share: float) -> None:
    wide = [gradient.to(torch.float32) for gradient in gradients]
    torch._foreach_lerp_(list(momenta), wide, share)


def _newton_step(
    weights: Sequence[Tensor],
    means: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    hess: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    weight_decay: float,
    clip_radius: float,
    debias: bool,
) -> None:
    """Do as `updates.newton_step`, and round masters to their parameters."""
    correction = 1 - beta1**step if debias else 1.0
    moved = [w if mean is None else mean for w, mean in zip(weights, means, strict=True)]
    direction = torch._foreach_add(list(momenta), moved, alpha=weight_decay * correction)
    torch._foreach_div_(direction, torch._foreach_add(list(hess), weight_decay))
    if math.isfinite(clip_radius):
        torch._foreach_clamp_min_(direction, -clip_radius * correction)
        torch._foreach_clamp_max_(direction, clip_radius * correction)
    torch._foreach_sub_(moved, direction, alpha=lr / correction)
    mastered = [k for k, mean in enumerate(means) if mean is not None]
    if mastered:
        torch._foreach_copy_(_at(weights, mastered), _at(means, mastered))


def _at(items: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [items[k] for k in places]
