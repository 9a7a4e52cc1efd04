"""IVON's step of one parameter: slice by slice, in compiled passes where they fit.

`updates` has the equations.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mergekit_bayes.optim.health import curvature_ratios
from mergekit_bayes.optim.moves import Noise
from mergekit_bayes.optim.prior import PriorTerm
from mergekit_bayes.optim.samples import Sampled, redrawn
from mergekit_bayes.optim.shards import local
from mergekit_bayes.optim.slicing import compiled_passes, slices
from mergekit_bayes.optim.state import Group, ParameterState, mean_of, update_weights
from mergekit_bayes.optim.updates import ggn_update, ivon_update


def price_step(
    parameter: Tensor,
    group: Group,
    state: ParameterState,
    sampled: Sampled,
    *,
    lr: float,
    prior: PriorTerm,
    noise: Noise,
) -> tuple[Tensor, int]:
    """Make the step of `ivon_update`.

    Args:
        parameter: The parameter; it and its state are updated in place.
        group: Its group.
        state: Its state.
        sampled: Mean gradient, and sum of noise * gradient, which is overwritten.
        lr: Learning rate of a Newton step.
        prior: Centre, and precision over `ess`.
        noise: Draws the noise again where `sampled` has no noise * gradient.

    Returns:
        Sum and number of the ((f - h) / (h + d))^2 that were looked at.
    """
    mean = mean_of(parameter, state)
    tensors = (mean, local(state["momentum"]), local(state["hess"]), sampled.grad, *prior)
    if sampled.noise_grad is None:
        assert sampled.moved is not None
        pieces = redrawn(sampled.moved, sampled.grad, noise, *tensors)
    else:
        pieces = slices(sampled.noise_grad.div_(sampled.draws), *tensors)
    passes = compiled_passes(*tensors[:3], *prior)
    update = passes.ivon_update if passes else ivon_update
    total, count = torch.zeros((), device=mean.device), 0
    for noise_grad, m, g, h, grad, m_p, d in pieces:
        ratios = curvature_ratios(noise_grad, h, d, group["ess"])
        total += ratios.square_().sum()
        count += ratios.numel()
        update(
            m,
            g,
            h,
            grad.to(g.dtype).contiguous(),
            noise_grad,
            step=int(state["step"]),
            lr=lr,
            ess=group["ess"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            weight_decay=d,
            clip_radius=group["clip_radius"],
            debias=group["debias"],
            prior_mean=m_p,
        )
    update_weights(parameter, state)
    return total, count


def ggn_step(
    parameter: Tensor,
    group: Group,
    state: ParameterState,
    grad: Tensor,
    squares: Tensor | None,
    *,
    prior: PriorTerm,
) -> None:
    """Make the step of `ggn_update`; before the first estimate only that of the momentum.

    Args:
        parameter: The parameter; it and its state are updated in place.
        group: Its group.
        state: Its state.
        grad: Mean gradient of the samples.
        squares: Estimate of the Hessian diagonal, if the step has one.
        prior: Centre, and precision over `ess`.
    """
    momentum = local(state["momentum"])
    if squares is not None:
        state["estimates"] += 1
    elif state["estimates"] == 0:  # without a curvature there is no Newton step
        momentum.lerp_(grad.to(momentum.dtype), 1 - group["beta1"])
        return
    mean = mean_of(parameter, state)
    tensors = (mean, momentum, local(state["hess"]), grad, squares, *prior)
    passes = compiled_passes(*tensors[:3], squares, *prior)
    update = passes.ggn_update if passes else ggn_update
    beta2, estimates = group["beta2"], max(1, int(state["estimates"]))
    for m, g, h, gradient, square, m_p, d in slices(*tensors):
        update(
            m,
            g,
            h,
            gradient.to(g.dtype).contiguous(),
            square,
            share=(1 - beta2) / (1 - beta2**estimates),
            step=int(state["step"]),
            lr=group["lr"],
            beta1=group["beta1"],
            weight_decay=d,
            clip_radius=group["clip_radius"],
            debias=group["debias"],
            prior_mean=m_p,
        )
    update_weights(parameter, state)


def adapt_prior(
    parameter: Tensor, group: Group, state: ParameterState, centre: Tensor | None
) -> None:
    """Move the prior's precision towards the optimum of the evidence, at the pace of beta2.

        d <- b2 d + (1 - b2) / (ess mean_j((m_j - m_p,j)^2 + sigma_j^2))

    Args:
        parameter: The parameter; it may be sharded.
        group: Its group.
        state: Its state, whose `weight_decay` is updated in place.
        centre: m_p, sharded like the parameter; None is zero.
    """
    decay = state["weight_decay"]
    mean = state.get("mean", parameter).float()
    away = mean if centre is None else mean - centre
    variance = ((state["hess"] + float(decay)) * group["ess"]).reciprocal_()
    second_moment = away.square().add_(variance).mean()
    if isinstance(second_moment, DTensor):
        second_moment = second_moment.full_tensor()
    decay.lerp_(1 / (group["ess"] * second_moment), 1 - group["beta2"])
