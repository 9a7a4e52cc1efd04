"""bSAM, Bayesian sharpness-aware minimisation (Möllenhoff and Khan, ICLR 2023).

SAM with the neighbourhood and the step scaled by a posterior that is learned along the way, as the
optimal convex lower bound of a variational objective. Its h averages sqrt(s) |gradient| rather
than squares: it orders parameters by their sensitivity, and does not estimate the Hessian's size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mergekit_bayes.optim.base import PosteriorOptimizer
from mergekit_bayes.optim.moves import Moved
from mergekit_bayes.optim.prior import Priors
from mergekit_bayes.optim.ranges import check_settings
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.shards import local, take_gradient
from mergekit_bayes.optim.slicing import slices
from mergekit_bayes.optim.state import Group, ParameterState, mean_of, update_weights


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
    """Make one step of bSAM, elementwise and in place on `mean`, `momentum` and `hess`.

        s = h + d
        g <- b1 g + (1 - b1) (grad + d (m - m_p))
        m <- m - lr g / s                                               old s
        h <- b2 h + (1 - b2) ( sqrt(s) |sampled_grad| + damping )

    Args:
        mean: m; float32, as all tensors here, which have one shape.
        momentum: g, in mean loss/weight.
        hess: h, in mean loss/weight^2.
        sampled_grad: Gradient of the mean loss at `m + eps / sqrt(ess s)`.
        grad: Gradient of the mean loss at `m + rho sampled_grad / s`.
        lr: Learning rate of a step preconditioned by s.
        beta1: b1, decay of the momentum.
        beta2: b2, decay of h.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        damping: What is added to h in every step.
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
        params: Parameters or groups; frozen parameters are left alone.
        lr: Learning rate of a step preconditioned by s.
        ess: Effective sample size, in observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, of which `beta2^steps` stays.
        beta1: Decay of the momentum.
        beta2: Decay of h.
        weight_decay: Prior precision over `ess`.
        rho: Size of the ascent.
        damping: What is added to h in every step.
        seed: Seed of the noise.
        prior: `{parameter: (mean, precision)}`, as in IVON.
        restore: "copy" or "redraw", as in IVON; the ascent always keeps a copy.

    Raises:
        ValueError: A setting is out of range, or the prior does not fit.
    """

    _mark = "rho"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        *,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 1e-4,
        rho: float = 0.01,
        damping: float = 0.1,
        seed: int = 0,
        prior: Priors | None = None,
        restore: str = "copy",
    ) -> None:
        rules = (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("rho", rho, rho >= 0),
            ("damping", damping, damping >= 0),
        )
        check_settings("BSAM", rules)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "rho": rho,
            "damping": damping,
            "seed": seed,
        }
        super().__init__(params, defaults, prior=prior, restore=restore)

    @contextmanager
    def ascended_params(self) -> Iterator[None]:
        """Set the weights to `mean + rho g / s`, and back to the mean on leaving.

        g is the gradient that was taken in `sampled_params`.

        Raises:
            RuntimeError: There was not exactly one `sampled_params(train=True)` in this step.
        """
        samples = self._transient.samples
        if samples != 1:
            raise RuntimeError(
                f"BSAM: ascended_params follows one sampled_params(train=True), not {samples}"
            )
        with self._away(self._ascend, self._take_ascended, None):
            yield

    def _ascend(self, moved: Moved) -> None:
        sampled = self._transient.sampled.get(moved.parameter)
        if sampled is None:
            return
        _, decay = self._prior_of(moved.parameter, moved.group, moved.state)
        weights, mean = local(moved.parameter), mean_of(moved.parameter, moved.state)
        tensors = (weights, moved.saved, mean, sampled.grad, local(moved.state["hess"]), decay)
        for w, saved, m, g, h, d in slices(*tensors):
            moved.leave(w, saved)
            w.copy_((g / (h + d)).mul_(moved.group["rho"]).add_(m))

    def _take(self, moved: Moved) -> None:
        if self._transient.samples:
            raise RuntimeError("BSAM: one sampled_params(train=True) a step")
        self._transient.sampled[moved.parameter] = Sampled(1, take_gradient(moved.parameter))

    def _take_ascended(self, moved: Moved) -> None:
        self._transient.ascended[moved.parameter] = take_gradient(moved.parameter)

    def _pop_sampled(
        self, parameter: Tensor, group: Group, state: ParameterState
    ) -> Sampled | None:
        if parameter not in self._transient.ascended:
            return None
        return super()._pop_sampled(parameter, group, state)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update mean and h from both passes.

        Args:
            closure: Computes loss and gradients, and returns the loss. It is evaluated in both
                contexts.

        Returns:
            The loss of the first pass, if there is a closure.

        Raises:
            RuntimeError: A pass inside `ascended_params` is missing.
        """
        loss = None
        if closure is not None:
            with self.sampled_params(train=True), torch.enable_grad():
                loss = closure()
            with self.ascended_params(), torch.enable_grad():
                closure()
        transient = self._transient
        if transient.sampled and not transient.ascended:
            raise RuntimeError(
                "BSAM: step after sampled_params alone; a pass inside ascended_params() is missing"
            )
        for parameter, group, state, sampled in self._each_sampled():
            mean, ascended = mean_of(parameter, state), transient.ascended.pop(parameter)
            prior = self._prior_of(parameter, group, state)
            momentum, hess = local(state["momentum"]), local(state["hess"])
            tensors = (mean, momentum, hess, sampled.grad, ascended)
            for m, g, h, sampled_grad, grad, m_p, d in slices(*tensors, *prior):
                bsam_update(
                    m,
                    g,
                    h,
                    sampled_grad,
                    grad,
                    lr=group["lr"],
                    beta1=group["beta1"],
                    beta2=group["beta2"],
                    weight_decay=d,
                    damping=group["damping"],
                    prior_mean=m_p,
                )
            update_weights(parameter, state)
        transient.forget_step()
        return loss
