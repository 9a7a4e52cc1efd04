"""The diagonal of the Hessian as IVON sees it: noise on the weights, with the mean frozen."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.outputs import (
    numbers,
    scored_logits,
    scored_targets,
    trained_loss,
)
from mergekit_bayes.curvature.sums import ENTRIES, Keeping
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.libraries import outputs_of
from mergekit_bayes.ranks import is_main

logger = logging.getLogger(__name__)

_NOISE = 0.01  # standard deviation where the curvature is typical, as a share of typical weights
_START = 8.0  # batches that the start counts for
_DECAY = 0.01  # what the noise adds to every curvature, as a share of the typical one
_CORRECTED = 0.5  # share of h that may be the correction of its sign


def ivon_diagonal(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Estimate the Hessian diagonal of the summed loss over some batches, as IVON does.

    A pair of passes a batch, of n observations with the mean loss l and the observed labels:

        sigma^2 = 1 / (ess (h + d)),   e ~ N(0, 1)
        f       = e (grad l(m + sigma e) - grad l(m - sigma e)) / (2 sigma)
        h      <- h + w (f - h) + w^2 (f - h)^2 / (2 h),     w = n / (observations so far + start)

    This is IVON (Shen et al., ICML 2024; `optim.IVON` with antithetic pairs) at a mean that does
    not move, with weights by which every observation counts alike. It starts from the mean of a
    first f over each tensor, which counts as 8 batches; `ess` makes the noise 1 % of the typical
    weight where the curvature is typical, and d, 1 % of the typical curvature, bounds the noise.

    The expectation of f is the Hessian's diagonal, up to the square of sigma: that of the loss at
    the observed labels, and not the Fisher information. The two agree where the model fits. The
    last term keeps h positive and is a bias upward, of about V log(1 + batches / 8) / (2 batches H)
    with V the variance of f. An entry whose curvature is zero or negative ends near 8 / (batches +
    8) of the first curvature of its tensor.

    The variance of f is `H_ii^2 + sum_j H_ij^2 sigma_j^2 / sigma_i^2`: beside its own curvature
    each entry sees the noise of all others. In networks that is hundreds of times H_ii^2 and more,
    the more the larger they are, where root-GGN has a relative variance of at most 2. Where more
    than half of the result is the correction, a warning says so. Take it to compare with IVON.

    Several ranks do not share the batches: h follows from one after the other, and each rank makes
    the whole pass.

    Args:
        model: As for `squares.squared_gradients`, with float32 or float64 parameters. Its weights
            are moved meanwhile and put back to the bit.
        batches: As for `fisher_empirical.empirical_fisher_diagonal`.
        seed: Seed of the noise.
        keep: How finely the result is kept. Meanwhile every entry is, on the model's device, since
            the noise of each depends on its curvature.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.

    Raises:
        CheckpointError: The model's outputs are not numbers.
        ConfigError: The parameters have fewer bits than float32, in whose rounding noise is lost;
            or the sums are to lie elsewhere than on the device.
        MismatchError: A batch has no labels.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    _refuse_narrow(parameters)
    if keep.place != "device":
        raise ConfigError(
            "ivon: its noise depends on the curvature of each entry, which therefore lies on the "
            "model's device. Leave out --sums, or take another estimator."
        )
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    size = _NOISE * _typical_size(parameters)
    hess = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]  # of the mean loss
    typical, start, observations, corrected = 0.0, 0.0, 0, 0.0
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            if not start:
                even = [torch.full_like(h, size) for h in hess]
                seen, count = _seen_by_noise(model, parameters, even, batch, generator)
                hess, typical = _start(seen)
                start = _START * count
            deviations = [size * (typical / (h + _DECAY * typical)).sqrt() for h in hess]
            seen, count = _seen_by_noise(model, parameters, deviations, batch, generator)
            observations += count
            if not count:
                continue
            weight = count / (observations + start)
            for h, f in zip(hess, seen, strict=True):
                change = f.sub_(h)
                correction = change.square().div_(2 * h).mul_(weight**2)
                h.add_(change, alpha=weight).add_(correction)
                corrected += float(correction.sum()) * (observations + start)
    finally:
        model.train(was_training)
    # What a correction added has been averaged with all later batches.
    share = corrected / ((observations + start) * sum(float(h.sum()) for h in hess) or 1.0)
    if share > _CORRECTED and is_main():
        logger.warning(
            "ivon: %s of the curvature is the correction that keeps it positive, so that "
            "noise decides its size. Look at more batches, or take the estimator ggn",
            f"{share:.0%}" if share < 1 else "all",  # what else was added may be below zero
        )
    return Curvature(
        {n: keep.mean_of(n, h.mul_(observations)) for n, h in zip(named, hess, strict=True)},
        observations,
    )


def _start(seen: list[Tensor]) -> tuple[list[Tensor], float]:
    """A first curvature, the mean of f over each tensor, and its mean over all entries."""
    levels = [abs(float(f.mean())) for f in seen]
    sizes = [f.numel() for f in seen]
    total = sum(level * n for level, n in zip(levels, sizes, strict=True))
    typical = max(total / sum(sizes), torch.finfo(torch.float32).tiny)
    # A tensor that the first batch does not use may be used by a later one.
    return [torch.full_like(f, x or typical) for f, x in zip(seen, levels, strict=True)], typical


def _seen_by_noise(
    model: Module,
    parameters: list[Parameter],
    deviations: list[Tensor],
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[list[Tensor], int]:
    """f of one pair of passes, by parameter, and the number of observations of the batch.

    The weights are afterwards as they were, whatever is raised.
    """
    noise = [torch.empty_like(d).normal_(generator=generator) for d in deviations]
    means = [p.detach().clone() for p in parameters]
    gradients, count = [], 0
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, mean, e, deviation in zip(parameters, means, noise, deviations, strict=True):
                    p.copy_(mean + sign * deviation * e)
            loss, count = summed_loss(model, batch)
            gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    finally:
        with torch.no_grad():
            for p, mean in zip(parameters, means, strict=True):
                p.copy_(mean)
    seen = []
    for e, deviation, plus, minus in zip(noise, deviations, *gradients, strict=True):
        if plus is None or minus is None or not count:
            seen.append(torch.zeros_like(e))
        else:
            seen.append((plus - minus).float().mul_(e).div_(deviation).div_(2 * count))
    return seen, count


def summed_loss(model: Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The loss that the model trains with, summed over the observations of a batch."""
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    if labels is None:
        raise MismatchError(
            "ivon: the data have no labels, which this estimator looks at. Name their column, or "
            "take an estimator that needs none."
        )
    outputs = outputs_of(model, **{name: v for name, v in batch.items() if name != "labels"})
    loss = trained_loss(model, labels)
    logits = scored_logits(outputs.logits, labels, tokens, shifts=loss.shifts)
    targets = scored_targets(outputs.logits, labels, tokens, shifts=loss.shifts)
    assert targets is not None
    z = numbers(logits)
    if loss.likelihood == "categorical":
        return nn.functional.cross_entropy(z, targets.flatten(), reduction="sum"), len(z)
    y, scale = targets.reshape(z.shape).to(z.dtype), loss.scale(z.shape[-1])
    if loss.likelihood == "bernoulli":
        logistic = nn.functional.binary_cross_entropy_with_logits
        return scale * logistic(z, y, reduction="sum"), len(z)
    return scale * 0.5 * (z - y).square().sum(), len(z)


def _typical_size(parameters: list[Parameter]) -> float:
    """RMS of the median matrix; of the median tensor where there are no matrices."""
    matrices = [p for p in parameters if p.ndim > 1] or parameters
    sizes = sorted(float(p.detach().float().square().mean().sqrt()) for p in matrices)
    return sizes[len(sizes) // 2] or 1.0


def _refuse_narrow(parameters: list[Parameter]) -> None:
    narrow = {p.dtype for p in parameters if p.dtype.itemsize < 4}
    if narrow:
        name = str(narrow.pop()).removeprefix("torch.")
        raise ConfigError(
            f"ivon: the parameters are {name}, in whose rounding its noise is lost. Load them as "
            "float32 (--dtype float32), or take another estimator."
        )
