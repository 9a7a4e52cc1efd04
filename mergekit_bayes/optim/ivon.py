"""IVON, the improved variational online Newton method (Shen et al., ICML 2024).

One run gives a mean, used like ordinary weights, and a diagonal posterior precision, at about Adam's cost. It
minimises `ess * E_q[mean loss] + KL(q, p)` over Gaussians q, with prior p = N(0, 1 / (ess * weight_decay)) or any
other diagonal Gaussian, a stored posterior say. State lives per parameter, in float32 whatever the parameter's dtype,
so mixed dtypes, sharding, resuming and frozen parameters work by the ordinary means of `torch.optim`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from mergekit_bayes.optim.base import Moved, PosteriorOptimizer, Prior, in_range, local, own_gradient, slices

_EVERY = 16  # the noise number looks at one entry in so many


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
    """One step of IVON, elementwise and in place on `mean`, `momentum` and `hess`; overwrites `noise_grad`.

        f = ess (h + d) * noise_grad                              curvature seen by the samples
        g <- b1 g + (1 - b1) grad
        h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d))      old h on the right
        m <- m - lr clip( (g / (1 - b1^step) + d (m - m_p)) / (h + d) )         new h

    The last term of the Hessian keeps `h + d` at least half of what it was, for any f.

    Args:
        mean, momentum, hess: float32 state of one shape; weight, mean-loss/weight, mean-loss/weight^2.
        grad: Gradient of the mean loss, averaged over samples.
        noise_grad: `(sample - mean) * gradient`, averaged over samples.
        step: Steps made including this one, for the debiasing of the momentum.
        lr: Already rescaled, if it is to be.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        prior_mean: m_p; None is zero.
    """
    momentum.lerp_(grad, 1 - beta1)
    curvature = hess + weight_decay
    change = noise_grad.mul_(curvature).mul_(ess).sub_(hess)  # f - h
    hess.add_(change, alpha=1 - beta2)
    hess.addcdiv_(change.square_(), curvature, value=0.5 * (1 - beta2) ** 2)
    correction = 1 - beta1**step if debias else 1.0
    direction = torch.div(momentum, correction, out=change) if change.dtype == momentum.dtype else momentum / correction
    pull = mean if prior_mean is None else torch.sub(mean, prior_mean)
    if isinstance(weight_decay, Tensor):
        direction.addcmul_(pull, weight_decay)
    else:
        direction.add_(pull, alpha=weight_decay)
    direction.div_(torch.add(hess, weight_decay, out=curvature))
    if math.isfinite(clip_radius):
        direction.clamp_(-clip_radius, clip_radius)
    mean.sub_(direction, alpha=lr)


@dataclass(slots=True)
class _Sampled:
    """What the samples of one step have left for one parameter."""

    draws: int
    grad: Tensor
    noise_grad: Tensor


class IVON(PosteriorOptimizer):
    """IVON as published, with per-parameter float32 state.

        for batch in loader:
            for _ in range(mc_samples):
                with optimizer.sampled_params(train=True):
                    loss(model, batch).backward()
            optimizer.step()

    The loss is a mean over the observations that `ess` counts. Clipping and unscaling belong inside the context,
    which takes the gradients when it closes. Replicas (DDP) draw the same noise; shards (DTensor) each their own.

    Parameters of fewer than 32 bits have a float32 master of the mean in `state`, so that small steps add up; the
    curvature is estimated with the perturbation that rounding has left.

    Args:
        params: Parameters or groups; frozen ones are left alone.
        lr: With `rescale_lr` an SGD learning rate at the start, else that of a Newton step.
        ess: Effective sample size lambda, observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, the Hessian diagonal of the mean loss.
        beta1: Decay of the momentum.
        beta2: Decay of the Hessian; `beta2^steps` of `hess_init` is never forgotten.
        weight_decay: Prior precision over `ess`.
        clip_radius: Bound on each entry of the preconditioned direction.
        mc_samples: Weight samples a step; `step` insists on none but at least one.
        rescale_lr: Multiply `lr` by `hess_init + weight_decay` (the median of a prior's precision over ess).
        debias: Divide the momentum by `1 - beta1^step`.
        seed: Of the noise.
        prior: `{parameter: (mean, precision)}`, tensors of the parameter's shape; mean None is zero, precision
            (1/weight^2, a tensor or a number) None is `ess * weight_decay`. With a stored posterior, training goes on
            where it ended: on quadratics, one data set after the other gives what both at once would. Not part of
            `state_dict`; give it again to resume.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        clip_radius: float = math.inf,
        mc_samples: int = 1,
        rescale_lr: bool = True,
        debias: bool = True,
        seed: int = 0,
        prior: Prior | None = None,
    ) -> None:
        in_range("IVON", (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("clip_radius", clip_radius, clip_radius > 0),
            ("mc_samples", mc_samples, mc_samples >= 1),
        ))  # fmt: skip
        defaults = {
            "lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2,
            "weight_decay": weight_decay, "clip_radius": clip_radius, "mc_samples": mc_samples,
            "rescale_lr": rescale_lr, "debias": debias, "seed": seed,
        }  # fmt: skip
        super().__init__(params, defaults, prior=prior)

    def _take(self, at: Moved) -> None:
        gradient = own_gradient(at.parameter)
        noise_grad = self._product(at, gradient)
        before = self._samples.get(at.parameter)
        if before is None:
            self._samples[at.parameter] = _Sampled(1, gradient, noise_grad)
        else:
            before.draws += 1
            before.grad.add_(gradient)
            before.noise_grad.add_(noise_grad)

    def _product(self, at: Moved, gradient: Tensor) -> Tensor:
        """(sample - mean) * gradient with the perturbation really applied, rounding included; restores the mean."""
        weights = local(at.parameter)
        if at.saved is None:
            mean = local(at.state["mean"])
            product = torch.empty_like(mean)
            for w, m, g, p in slices(weights, mean, gradient, product):
                torch.mul(w.float().sub_(m), g, out=p)
            return product
        for w, m, g in slices(weights, at.saved, gradient):
            noise = w - m
            w.copy_(m)
            torch.mul(noise, g, out=m)  # the saved mean has done its work, and its memory is used again
        product, at.saved, at.restored = at.saved, None, True
        return product

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update mean and Hessian from the samples since the last step; parameters without any are skipped.

        A closure is evaluated in `mc_samples` contexts of its own.
        """
        loss = None
        if closure is not None:
            for _ in range(int(self.defaults["mc_samples"])):
                with self.sampled_params(train=True), torch.enable_grad():
                    loss = closure()
        for group in self.param_groups:
            group["steps"] += bool(self._sample)
            for _, parameter, state in self._trainable(group):
                sampled = self._samples.pop(parameter, None)
                if sampled is not None:
                    self._update(parameter, group, state, sampled)
        self._samples.clear()
        self._sample = 0
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], sampled: _Sampled) -> None:
        state["step"] += 1
        centre, decay = self._prior_of(parameter, group, state)
        scale = group["hess_init"] + self._typical_decay(parameter, group) if group["rescale_lr"] else 1.0
        weights = local(parameter)
        mean = local(state["mean"]) if "mean" in state else weights
        if sampled.draws > 1:
            sampled.grad.div_(sampled.draws)
            sampled.noise_grad.div_(sampled.draws)
        tensors = (
            mean,
            local(state["momentum"]),
            local(state["hess"]),
            sampled.grad,
            sampled.noise_grad,
            centre,
            decay,
        )
        for m, momentum, hess, grad, noise_grad, m_p, d in slices(*tensors):
            ivon_update(
                m, momentum, hess, grad, noise_grad,
                step=int(state["step"]), lr=group["lr"] * scale, ess=group["ess"],
                beta1=group["beta1"], beta2=group["beta2"], weight_decay=d,
                clip_radius=group["clip_radius"], debias=group["debias"], prior_mean=m_p,
            )  # fmt: skip
        if mean is not weights:
            weights.copy_(mean)

    @torch.no_grad()
    def health(self, batch_size: float) -> dict[str, float]:
        """How much the Hessian can be trusted.

        Args:
            batch_size: Observations that enter one step, over micro-batches and ranks.

        Returns:
            `init_fraction` = beta2^steps, the share of `hess_init` still in h; `kappa` = (1 - beta2) ess /
            (2 batch_size), the noise of h for a diagonal Hessian; `hess_min`, `hess_median`, `hess_max`;
            `bad_entries`, where `h + weight_decay` is not a positive number; `sigma_over_rms`, the median over
            matrices of posterior deviation to weight size, with matrices of zeros left out.
            Quantiles are from at most 65,536 entries a tensor.
        """
        group = self.param_groups[0]
        samples, ratios, steps, bad = [], [], 0, 0
        for group in self.param_groups:
            for _, parameter, state in self._trainable(group):
                hess, weights = local(state["hess"]).flatten(), local(parameter).float()
                steps = max(steps, int(state["step"]))
                _, decay = self._prior_of(parameter, group, state)
                curvature = hess + (decay.flatten() if isinstance(decay, Tensor) and decay.ndim else decay)
                bad += int((~(curvature > 0) | ~curvature.isfinite()).sum())
                samples.append(hess[:: max(1, hess.numel() // 65536)])
                rms = float(weights.square().mean().sqrt()) if weights.numel() else 0.0
                if rms > 0 and parameter.ndim > 1:  # biases are near zero and would always alarm
                    ratios.append(float((curvature * group["ess"]).rsqrt().median()) / rms)
        values = torch.cat(samples) if samples else torch.zeros(1)
        return {
            "init_fraction": group["beta2"] ** steps,
            "kappa": (1 - group["beta2"]) * group["ess"] / (2 * batch_size),
            "hess_min": float(values.min()),
            "hess_median": float(values.median()),
            "hess_max": float(values.max()),
            "bad_entries": float(bad),
            "sigma_over_rms": sorted(ratios)[len(ratios) // 2] if ratios else 0.0,
        }
