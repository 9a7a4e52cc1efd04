"""VOGN, the variational online Gauss-Newton method (Khan et al., ICML 2018; Osawa et al., NeurIPS 2019).

Like IVON with the curvature from squares of per-example gradients instead of noise * gradient: one backward an
example, no positivity term, always positive. Its h is the empirical Fisher at weights drawn from the posterior.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_bayes.optim.base import (
    Moved,
    PosteriorOptimizer,
    Prior,
    in_range,
    local,
    own_gradient,
    slices,
    wide,
)


def vogn_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    grad: Tensor,
    squares: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float | Tensor,
    prior_mean: Tensor | None = None,
) -> None:
    """One step of VOGN, elementwise and in place on `mean`, `momentum` and `hess`.

        h <- b2 h + (1 - b2) squares
        g <- b1 g + (1 - b1) (grad + d (m - m_p))
        m <- m - lr g / (h + d)                                         new h

    Args:
        mean, momentum, hess: float32 state of one shape; weight, mean-loss/weight, mean-loss/weight^2.
        grad, squares: Means over the examples of gradient and squared gradient, at sampled weights.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        prior_mean: m_p; None is zero.
    """
    hess.lerp_(squares, 1 - beta2)
    pull = (mean if prior_mean is None else mean - prior_mean) * weight_decay
    momentum.lerp_(pull.add_(grad), 1 - beta1)
    mean.sub_(momentum / (hess + weight_decay), alpha=lr)


class VOGN(PosteriorOptimizer):
    """VOGN with per-parameter float32 state, in one process.

        with optimizer.sampled_params(train=True):
            optimizer.backward(losses(model, batch))      # one loss an example, shape (n,)
        optimizer.step()

    Args:
        params: Parameters or groups; frozen ones are left alone.
        lr: Of a Newton step.
        ess: Effective sample size, observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, of which `beta2^steps` stays.
        beta1, beta2: Decay of the momentum and of h.
        weight_decay: Prior precision over `ess`.
        seed: Of the noise.
        prior: `{parameter: (mean, precision)}` as in IVON.
        restore: `copy` or `redraw` as in IVON.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, ess: float, *, hess_init: float = 1.0, beta1: float = 0.9,
        beta2: float = 0.999, weight_decay: float = 1e-4, seed: int = 0, prior: Prior | None = None,
        restore: str = "copy",
    ) -> None:  # fmt: skip
        in_range("VOGN", (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ))  # fmt: skip
        defaults = {"lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2,
                    "weight_decay": weight_decay, "seed": seed}  # fmt: skip
        super().__init__(params, defaults, prior=prior, restore=restore)

    def _clear(self) -> None:
        super()._clear()
        self._squares: dict[Tensor, Tensor] = {}  # of the open context
        self._observed = self._count = 0  # examples of the step; of the open context

    def _forget_samples(self) -> None:
        super()._forget_samples()
        self._observed = 0

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """As in the base; inside, with `train`, call `backward` instead of the loss's own."""
        if not self._open:
            self._squares, self._count = {}, 0
        with super().sampled_params(train):
            yield
        if train:
            self._observed += self._count

    def backward(self, losses: Tensor) -> None:
        """Gradients of single examples, one backward each; `.grad` gets their sum.

        Raises:
            ValueError: `losses` is not one-dimensional.
            RuntimeError: Several processes train together, whose gradients this would not reduce.
        """
        if losses.ndim != 1:
            raise ValueError(f"VOGN: losses of shape {list(losses.shape)}; one loss an example is needed, shape [n]")
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("VOGN runs in one process; use IVON to train on several")
        parameters = [p for group in self.param_groups for _, p, _ in self._trainable(group)]
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    if gradient is None:
                        continue
                    if p not in self._squares:
                        self._squares[p] = torch.zeros_like(p, dtype=torch.float32)
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
                    self._squares[p].addcmul_(gradient.float(), gradient.float())
        self._count += len(losses)

    def _take(self, at: Moved) -> None:
        if at.parameter not in self._squares:
            raise RuntimeError("VOGN: a gradient without per-example squares: call optimizer.backward(losses)")
        gradient, squares = wide(own_gradient(at.parameter)), self._squares.pop(at.parameter)
        before = self._samples.get(at.parameter)
        self._samples[at.parameter] = (
            (gradient, squares) if before is None else (before[0].add_(gradient), before[1].add_(squares))
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update from the samples since the last step; a closure returns the losses of the examples."""
        losses = None
        if closure is not None:
            with self.sampled_params(train=True), torch.enable_grad():
                losses = closure()
                self.backward(losses)
        for group in self.param_groups:
            group["steps"] += bool(self._sample)
            for _, parameter, state in self._trainable(group):
                if parameter not in self._samples:
                    continue
                gradient, squares = self._samples.pop(parameter)
                state["step"] += 1
                centre, decay = self._prior_of(parameter, group, state)
                weights = local(parameter)
                mean = local(state["mean"]) if "mean" in state else weights
                tensors = (mean, state["momentum"], state["hess"], gradient, squares, centre, decay)
                for m, g, h, grad, square, m_p, d in slices(*tensors):
                    vogn_update(
                        m, g, h, grad.div_(self._observed), square.div_(self._observed), lr=group["lr"],
                        beta1=group["beta1"], beta2=group["beta2"], weight_decay=d, prior_mean=m_p,
                    )  # fmt: skip
                if mean is not weights:
                    weights.copy_(mean)
        self._forget_samples()
        return losses
