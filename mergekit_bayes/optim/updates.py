"""The arithmetic of a step of IVON, elementwise and in place: pure functions of tensors.

`passes` has the same functions compiled for the CPU.
"""

import math

import torch
from torch import Tensor


def ivon_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    grad: Tensor,
    noise_grad: Tensor,
    *,
    step: int,
    lr: float,
    ess: float,
    beta1: float,
    beta2: float,
    weight_decay: float | Tensor,
    clip_radius: float,
    debias: bool,
    prior_mean: Tensor | None = None,
) -> None:
    """Make one step of IVON, as published (Shen et al., ICML 2024).

        f = ess (h + d) * noise_grad                              curvature seen by the samples
        g <- b1 g + (1 - b1) grad
        h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d))      old h on the right
        m <- m - lr clip( (g / (1 - b1^step) + d (m - m_p)) / (h + d) )         new h

    The last term of the Hessian keeps `h + d` at least half of what it was, for any f.
    `mean`, `momentum` and `hess` are updated in place, and `noise_grad` is overwritten.

    Args:
        mean: m; float32, as all tensors here, which have one shape.
        momentum: g, in mean loss/weight.
        hess: h, in mean loss/weight^2.
        grad: Gradient of the mean loss, averaged over samples.
        noise_grad: `noise * gradient` with noise = sample - mean, averaged over samples.
        step: Number of steps including this one, which debiases the momentum.
        lr: Learning rate of a Newton step, already rescaled if `rescale_lr` is set.
        ess: Effective sample size, in observations.
        beta1: b1, decay of the momentum.
        beta2: b2, decay of the Hessian.
        weight_decay: d, the prior's precision over `ess`; a number or a tensor.
        clip_radius: Bound on each entry of the preconditioned direction.
        debias: Divide the momentum by `1 - b1^step`.
        prior_mean: m_p; None is zero.
    """
    momentum.lerp_(grad, 1 - beta1)
    curvature = hess + weight_decay
    change = torch.addcmul(hess, noise_grad, curvature, value=-ess, out=noise_grad)  # h - f
    hess.sub_(change, alpha=1 - beta2)
    hess.addcdiv_(change.square_(), curvature, value=0.5 * (1 - beta2) ** 2)
    newton_step(
        mean,
        momentum,
        hess,
        lr=lr,
        correction=1 - beta1**step if debias else 1.0,
        weight_decay=weight_decay,
        prior_mean=prior_mean,
        clip_radius=clip_radius,
        scratch=(change, curvature),
    )


def ggn_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    grad: Tensor,
    squares: Tensor | None,
    *,
    share: float,
    step: int,
    lr: float,
    beta1: float,
    weight_decay: float | Tensor,
    clip_radius: float,
    debias: bool,
    prior_mean: Tensor | None = None,
) -> None:
    """Make one step with an estimate of the curvature from outside.

        g <- b1 g + (1 - b1) grad
        h <- h + share (squares - h)                                    if there is an estimate
        m <- m - lr clip( (g / (1 - b1^step) + d (m - m_p)) / (h + d) )

    With `share = (1 - b2) / (1 - b2^j)` at estimate j, h is the average of all estimates with
    weights b2^age, debiased from a start at zero. `mean`, `momentum` and `hess` are updated in
    place.

    Args:
        mean: m; float32, as all tensors here, which have one shape.
        momentum: g, in mean loss/weight.
        hess: h, in mean loss/weight^2.
        grad: Gradient of the mean loss, averaged over samples.
        squares: Estimate of the Hessian diagonal of the mean loss, >= 0; None in a step
            without one.
        share: Share of the estimate in the new h, 0 to 1.
        step: Number of steps including this one, which debiases the momentum.
        lr: Learning rate of a Newton step.
        beta1: b1, decay of the momentum.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        clip_radius: Bound on each entry of the preconditioned direction.
        debias: Divide the momentum by `1 - b1^step`.
        prior_mean: m_p; None is zero.
    """
    momentum.lerp_(grad, 1 - beta1)
    if squares is not None:
        hess.lerp_(squares, share)
    newton_step(
        mean,
        momentum,
        hess,
        lr=lr,
        correction=1 - beta1**step if debias else 1.0,
        weight_decay=weight_decay,
        prior_mean=prior_mean,
        clip_radius=clip_radius,
        scratch=(torch.empty_like(hess), torch.empty_like(hess)),
    )


def newton_step(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    *,
    lr: float,
    correction: float,
    weight_decay: float | Tensor,
    prior_mean: Tensor | None,
    clip_radius: float,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """Move the mean in place.

        m <- m - lr clip( (momentum / correction + d (m - m_p)) / (h + d) )

    Args:
        mean: m; float32, as all tensors here, which have one shape.
        momentum: Average of the gradients.
        hess: h, the new estimate of the Hessian diagonal.
        lr: Learning rate of a Newton step.
        correction: What the momentum is divided by.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        prior_mean: m_p; None is zero.
        clip_radius: Bound on each entry of the preconditioned direction.
        scratch: Two tensors of the same shape, which are overwritten.
    """
    # The correction is left out of the direction and put into bound and factor: one pass less.
    pull = mean if prior_mean is None else torch.sub(mean, prior_mean)
    if isinstance(weight_decay, Tensor):
        direction = torch.addcmul(momentum, pull, weight_decay, value=correction, out=scratch[0])
    else:
        direction = torch.add(momentum, pull, alpha=weight_decay * correction, out=scratch[0])
    direction.div_(torch.add(hess, weight_decay, out=scratch[1]))
    if math.isfinite(clip_radius):
        direction.clamp_(-clip_radius * correction, clip_radius * correction)
    mean.sub_(direction, alpha=lr / correction)
