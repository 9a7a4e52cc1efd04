"""VOGN, the variational online Gauss-Newton method.

Khan et al., ICML 2018; Osawa et al., NeurIPS 2019. Like IVON with the curvature from squares of
per-example gradients instead of noise * gradient: one backward an example, no positivity term,
always positive. Its h is the empirical Fisher at weights drawn from the posterior.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mergekit_bayes.optim.base import PosteriorOptimizer
from mergekit_bayes.optim.moves import Moved
from mergekit_bayes.optim.prior import Priors
from mergekit_bayes.optim.ranges import check_settings
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.shards import at_least_float32, take_gradient
from mergekit_bayes.optim.slicing import slices
from mergekit_bayes.optim.state import mean_of, update_weights


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
    """Make one step of VOGN, elementwise and in place on `mean`, `momentum` and `hess`.

        h <- b2 h + (1 - b2) squares
        g <- b1 g + (1 - b1) (grad + d (m - m_p))
        m <- m - lr g / (h + d)                                         new h

    Args:
        mean: m; float32, as all tensors here, which have one shape.
        momentum: g, in mean loss/weight.
        hess: h, in mean loss/weight^2.
        grad: Mean gradient of the examples at sampled weights.
        squares: Mean of their squared gradients.
        lr: Learning rate of a Newton step.
        beta1: b1, decay of the momentum.
        beta2: b2, decay of the Hessian.
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
        params: Parameters or groups; frozen parameters are left alone.
        lr: Learning rate of a Newton step.
        ess: Effective sample size, in observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, of which `beta2^steps` stays.
        beta1: Decay of the momentum.
        beta2: Decay of h.
        weight_decay: Prior precision over `ess`.
        seed: Seed of the noise.
        prior: `{parameter: (mean, precision)}`, as in IVON.
        restore: "copy" or "redraw", as in IVON.

    Raises:
        ValueError: A setting is out of range, or the prior does not fit.
    """

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
        )
        check_settings("VOGN", rules)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "seed": seed,
        }
        super().__init__(params, defaults, prior=prior, restore=restore)

    @contextmanager
    def sampled_params(self, train: bool = False, *, temperature: float = 1.0) -> Iterator[None]:
        """Set the weights to a sample of the posterior, and back to the mean on leaving.

        Args:
            train: Take the gradients for `step` when the context closes without an exception.
                Inside, call `backward` instead of the loss's own.
            temperature: Factor on the variance of samples for prediction.

        Raises:
            RuntimeError: The context is opened inside another one, or a gradient was not made by
                `backward`.
            ValueError: Parameters that were exchanged and no longer fit the prior, or a
                temperature that is not a positive number, or not 1 in training.
        """
        if not self._transient.is_open:
            self._transient.squares.clear()
            self._transient.open_observations = 0
        with super().sampled_params(train, temperature=temperature):
            yield
        if train:
            self._transient.observations += self._transient.open_observations

    def backward(self, losses: Tensor) -> None:
        """Compute the gradients of single examples, one backward each; `.grad` gets their sum.

        Args:
            losses: One loss an example, shape (n,).

        Raises:
            ValueError: `losses` is not one-dimensional.
            RuntimeError: Several processes train together, whose gradients this would not reduce.
        """
        if losses.ndim != 1:
            raise ValueError(
                f"VOGN: losses of shape {list(losses.shape)}; one loss an example is needed, "
                "shape [n]"
            )
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError("VOGN runs in one process; use IVON to train on several")
        parameters, squares = self._trained_parameters(), self._transient.squares
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    if gradient is None:
                        continue
                    if p not in squares:
                        squares[p] = torch.zeros_like(p, dtype=torch.float32)
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
                    squares[p].addcmul_(gradient.float(), gradient.float())
        self._transient.open_observations += len(losses)

    def _take(self, moved: Moved) -> None:
        parameter, transient = moved.parameter, self._transient
        if parameter not in transient.squares:
            raise RuntimeError(
                "VOGN: a gradient without per-example squares: call optimizer.backward(losses)"
            )
        gradient = at_least_float32(take_gradient(parameter))
        squares = transient.squares.pop(parameter)
        earlier = transient.sampled.get(parameter)
        if earlier is None:
            transient.sampled[parameter] = Sampled(1, gradient, squares=squares)
            return
        assert earlier.squares is not None
        earlier.draws += 1
        earlier.grad.add_(gradient)
        earlier.squares.add_(squares)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """Update mean and h from the samples since the last step.

        Args:
            closure: Returns the losses of the examples, shape (n,), without a backward. It is
                evaluated in a context of its own.

        Returns:
            The losses, if there is a closure.
        """
        losses = None
        if closure is not None:
            with self.sampled_params(train=True), torch.enable_grad():
                losses = closure()
                self.backward(losses)
        observations = self._transient.observations
        for parameter, group, state, sampled in self._each_sampled():
            mean = mean_of(parameter, state)
            prior = self._prior_of(parameter, group, state)
            tensors = (mean, state["momentum"], state["hess"], sampled.grad, sampled.squares)
            for m, g, h, grad, square, m_p, d in slices(*tensors, *prior):
                vogn_update(
                    m,
                    g,
                    h,
                    grad.div_(observations),
                    square.div_(observations),
                    lr=group["lr"],
                    beta1=group["beta1"],
                    beta2=group["beta2"],
                    weight_decay=d,
                    prior_mean=m_p,
                )
            update_weights(parameter, state)
        self._transient.forget_step()
        return losses
