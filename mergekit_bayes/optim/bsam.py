"""bSAM, Bayesian sharpness-aware minimisation (Möllenhoff and Khan, ICLR 2023).

SAM with the neighbourhood and the step scaled by a posterior that is learned along the way, as the optimal convex
lower bound of a variational objective. Its h averages sqrt(s) |gradient| rather than squares: it orders parameters
by their sensitivity and is no estimate of the Hessian's size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.optim.base import (
    Moved,
    PosteriorOptimizer,
    Prior,
    in_range,
    local,
    own_gradient,
    slices,
)


def bsam_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    sampled_grad: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float | Tensor,
    damping: float,
    prior_mean: Tensor | None = None,
) -> None:
    """One step of bSAM, elementwise and in place on `mean`, `momentum` and `hess`.

        s = h + d
        g <- b1 g + (1 - b1) (grad + d (m - m_p))
        m <- m - lr g / s                                               old s
        h <- b2 h + (1 - b2) ( sqrt(s) |sampled_grad| + damping )

    Args:
        mean, momentum, hess: float32 state of one shape; weight, mean-loss/weight, mean-loss/weight^2.
        sampled_grad: Gradient of the mean loss at `m + eps / sqrt(ess s)`.
        grad: Gradient of the mean loss at `m + rho sampled_grad / s`.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        prior_mean: m_p; None is zero.
    """
    scale = hess + weight_decay
    pull = (mean if prior_mean is None else mean - prior_mean) * weight_decay
    momentum.lerp_(pull.add_(grad), 1 - beta1)
    mean.sub_(momentum / scale, alpha=lr)
    hess.lerp_(scale.sqrt_().mul_(sampled_grad.abs()).add_(damping), 1 - beta2)


class BSAM(PosteriorOptimizer):
    """bSAM with per-parameter float32 state; two passes a step, on the same batch.

        with optimizer.sampled_params(train=True):
            loss(model, batch).backward()
        with optimizer.ascended_params():
            loss(model, batch).backward()
        optimizer.step()

    Args:
        params: Parameters or groups; frozen ones are left alone.
        lr: Of a step preconditioned by s.
        ess: Effective sample size, observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, of which `beta2^steps` stays.
        beta1, beta2: Decay of the momentum and of h.
        weight_decay: Prior precision over `ess`.
        rho: Size of the ascent.
        damping: Added to h in every step.
        seed: Of the noise.
        prior: `{parameter: (mean, precision)}` as in IVON.
        restore: `copy` or `redraw` as in IVON; the ascent always keeps a copy.
    """

    _mark = "rho"

    def __init__(
        self, params: Iterable[Any], lr: float, ess: float, *, hess_init: float = 1.0, beta1: float = 0.9,
        beta2: float = 0.999, weight_decay: float = 1e-4, rho: float = 0.01, damping: float = 0.1, seed: int = 0,
        prior: Prior | None = None, restore: str = "copy",
    ) -> None:  # fmt: skip
        in_range("BSAM", (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("rho", rho, rho >= 0),
            ("damping", damping, damping >= 0),
        ))  # fmt: skip
        defaults = {"lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2,
                    "weight_decay": weight_decay, "rho": rho, "damping": damping, "seed": seed}  # fmt: skip
        super().__init__(params, defaults, prior=prior, restore=restore)

    def _clear(self) -> None:
        super()._clear()
        self._ascended: dict[Tensor, Tensor] = {}

    def _forget_samples(self) -> None:
        super()._forget_samples()
        self._ascended.clear()

    @contextmanager
    def ascended_params(self) -> Iterator[None]:
        """Weights at `mean + rho g / s` inside, with g from `sampled_params`; the mean again outside."""
        if self._sample != 1:
            raise RuntimeError(f"BSAM: ascended_params follows one sampled_params(train=True), not {self._sample}")
        with self._away(self._ascend, self._take_ascended, None):
            yield

    def _ascend(self, at: Moved) -> None:
        if at.parameter not in self._samples:
            return
        _, decay = self._prior_of(at.parameter, at.group, at.state)
        weights = local(at.parameter)
        mean = local(at.state["mean"]) if "mean" in at.state else weights
        tensors = (weights, at.saved, mean, self._samples[at.parameter], local(at.state["hess"]), decay)
        for w, saved, m, g, h, d in slices(*tensors):
            at.leave(w, saved)
            w.copy_((g / (h + d)).mul_(at.group["rho"]).add_(m))

    def _take(self, at: Moved) -> None:
        if self._sample:
            raise RuntimeError("BSAM: one sampled_params(train=True) a step")
        self._samples[at.parameter] = own_gradient(at.parameter)

    def _take_ascended(self, at: Moved) -> None:
        self._ascended[at.parameter] = own_gradient(at.parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update from both passes; a closure is evaluated in both and returns the loss."""
        loss = None
        if closure is not None:
            with self.sampled_params(train=True), torch.enable_grad():
                loss = closure()
            with self.ascended_params(), torch.enable_grad():
                closure()
        if self._samples and not self._ascended:
            raise RuntimeError("BSAM: step after sampled_params alone; a pass inside ascended_params() is missing")
        for group in self.param_groups:
            group["steps"] += bool(self._sample)
            for _, parameter, state in self._trainable(group):
                if parameter not in self._samples or parameter not in self._ascended:
                    continue
                state["step"] += 1
                centre, decay = self._prior_of(parameter, group, state)
                weights = local(parameter)
                mean = local(state["mean"]) if "mean" in state else weights
                tensors = (mean, local(state["momentum"]), local(state["hess"]), self._samples.pop(parameter),
                           self._ascended.pop(parameter), centre, decay)  # fmt: skip
                for m, g, h, sampled, grad, m_p, d in slices(*tensors):
                    bsam_update(
                        m, g, h, sampled, grad, lr=group["lr"], beta1=group["beta1"], beta2=group["beta2"],
                        weight_decay=d, damping=group["damping"], prior_mean=m_p,
                    )  # fmt: skip
                if mean is not weights:
                    weights.copy_(mean)
        self._forget_samples()
        return loss
