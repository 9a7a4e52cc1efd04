"""IVON, the improved variational online Newton method (Shen et al., ICML 2024).

One run gives a mean, used like ordinary weights, and a diagonal posterior precision, at about Adam's cost. It
minimises `ess * E_q[mean loss] + KL(q, p)` over Gaussians q, with prior p = N(0, 1 / (ess * weight_decay)) or any
other diagonal Gaussian, a stored posterior say. State lives per parameter, in float32 whatever the parameter's dtype,
so mixed dtypes, sharding, resuming and frozen parameters work by the ordinary means of `torch.optim`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from mergekit_bayes.optim.base import (
    TRAIN,
    Moved,
    PosteriorOptimizer,
    Prior,
    fused_passes,
    in_range,
    local,
    newton_step,
    own_gradient,
    slices,
    wide,
)

_LOOKED, _EVERY = 4096, 16  # the noise number looks at so many entries in a row, and at one row in so many


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
        noise_grad: `noise * gradient`, noise = sample - mean, averaged over samples.
        step: Steps made including this one, for the debiasing of the momentum.
        lr: Already rescaled, if it is to be.
        weight_decay: d, the prior's precision over ess; a number or a tensor.
        prior_mean: m_p; None is zero.
    """
    momentum.lerp_(grad, 1 - beta1)
    curvature = hess + weight_decay
    change = torch.addcmul(hess, noise_grad, curvature, value=-ess, out=noise_grad)  # h - f
    hess.sub_(change, alpha=1 - beta2)
    hess.addcdiv_(change.square_(), curvature, value=0.5 * (1 - beta2) ** 2)
    correction = 1 - beta1**step if debias else 1.0
    newton_step(
        mean, momentum, hess, lr=lr, correction=correction, weight_decay=weight_decay, prior_mean=prior_mean,
        clip_radius=clip_radius, scratch=(change, curvature),
    )  # fmt: skip


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
    """One step with a curvature from outside, elementwise and in place on `mean`, `momentum` and `hess`.

        g <- b1 g + (1 - b1) grad
        h <- h + share (squares - h)                                    if there is an estimate
        m <- m - lr clip( (g / (1 - b1^step) + d (m - m_p)) / (h + d) )

    With `share = (1 - b2) / (1 - b2^j)` at estimate j, h is the average of all estimates with weights b2^age, debiased
    from a start at zero.

    Args:
        squares: Estimate of the Hessian diagonal of the mean loss, >= 0.
        mean, momentum, hess, grad, step, lr, weight_decay, prior_mean: As in `ivon_update`.
    """
    momentum.lerp_(grad, 1 - beta1)
    if squares is not None:
        hess.lerp_(squares, share)
    correction = 1 - beta1**step if debias else 1.0
    newton_step(
        mean, momentum, hess, lr=lr, correction=correction, weight_decay=weight_decay, prior_mean=prior_mean,
        clip_radius=clip_radius, scratch=(torch.empty_like(hess), torch.empty_like(hess)),
    )  # fmt: skip


@dataclass(slots=True)
class _Sampled:
    """What the samples of one step have left for one parameter."""

    draws: int
    grad: Tensor
    noise_grad: Tensor | None  # None: to be made from the noise of `at`, drawn again
    at: Moved


class IVON(PosteriorOptimizer):
    """IVON with per-parameter float32 state, as published or with the curvature of random root-GGN draws.

        for batch in loader:
            for _ in range(mc_samples):
                with optimizer.sampled_params(train=True):
                    loss(model, batch).backward()
            optimizer.step()

    The loss is a mean over the observations that `ess` counts. Clipping and unscaling belong inside the context,
    which takes the gradients when it closes. Replicas (DDP) draw the same noise; shards (DTensor) each their own.

    Under `fully_shard` all ranks see the same gathered sample, so a step is one sample on the global batch. Make the
    optimizer after sharding, and shard the root with `reshard_after_forward=True` if samples are used for prediction:
    by default the root keeps its gathered weights after a forward without a backward, and the next one would still
    see them. `full_tensors` gathers mean and precision; `torch.distributed.checkpoint` saves and loads the state.

    Parameters of fewer than 32 bits have a float32 master of the mean in `state`, so that small steps add up. Their
    curvature is estimated with the noise that was drawn: E[eps g(round(mean + sigma eps))] is exactly sigma times the
    derivative of the smoothed gradient, while the perturbation that rounding leaves adds its own square (a factor of
    1.9 at a sigma of 0.3 units in the last place, 94 at 0.03; both within 9 % from 1 on).

    Args:
        params: Parameters or groups; frozen ones are left alone.
        lr: With `rescale_lr` an SGD learning rate at the start, else that of a Newton step.
        ess: Effective sample size lambda, observations; the data set's size is untempered Bayes.
        hess_init: Start value of h, the Hessian diagonal of the mean loss.
        beta1: Decay of the momentum.
        beta2: Decay of the Hessian; `beta2^steps` of `hess_init` is never forgotten.
        weight_decay: Prior precision over `ess`.
        clip_radius: Bound on each entry of the preconditioned direction.
        mc_samples: Weight samples a step, an even number if antithetic; `step` insists on none but at least one.
        rescale_lr: Multiply `lr` by `hess_init + weight_decay` (the median of a prior's precision over ess).
        debias: Divide the momentum by `1 - beta1^step`.
        seed: Of the noise.
        prior: `{parameter: (mean, precision)}`, tensors of the parameter's shape; mean None is zero, precision
            (1/weight^2, a tensor or a number) None is `ess * weight_decay`. With a stored posterior, training goes on
            where it ended: on quadratics, one data set after the other gives what both at once would. Not part of
            `state_dict`; give it again to resume.
        antithetic: Samples 2k - 1 and 2k of a step have noise +eps and -eps, so that on the same batches the
            gradient's own noise cancels in the Hessian: its relative noise a step falls from sqrt(ess / batch) to
            sqrt(2). In float32; under bf16 autocast only at a moderate ess.
        restore: `copy` holds the mean (and then noise * gradient) in a third buffer of the parameters' size, and
            restores it exactly. `redraw` holds nothing and draws the noise two or three times; under a float32
            master it is as exact, else adding and subtracting leaves rounding in the mean: 7.5 % of the entries
            change in each sample at a sigma of 1e-3.
        adapt_prior: Move the prior precision of each matrix, at the pace of beta2, to the evidence's optimum
            `weight_decay = 1 / (ess mean_j((m_j - m_p,j)^2 + sigma_j^2))`, from `weight_decay` on; kept in `state`.
        curvature: `price` is the published estimate, noise * gradient. `ggn` takes the GGN's diagonal from
            `add_curvature`, every `curvature_every` steps: of the right size where the other may be a thousand times
            too large (the noise of the other parameters, made a bias by the positivity term). h is then an average
            from zero, beta2 its decay an estimate (1 - 5 curvature_every / steps), `hess_init` and `rescale_lr` are
            not used, the first step is made at the mean, and an entry that no output depends on has the noise of the
            prior, so `weight_decay` bounds it.
        rank_noise: Each rank draws noise of its own for its own part of the batch, so that R ranks are R samples at
            the cost of one. The gradients must come unreduced (DDP's `no_sync` around every backward, which the
            Trainer mixin opens): gradient and noise * gradient are reduced in `step`. Replicas stay equal bit for bit;
            `restore="redraw"` would undo that, and is allowed beside float32 masters only.
    """

    _mark = "mc_samples"
    _settings = (*PosteriorOptimizer._settings, "curvature", "rank_noise", "_uses_noise")

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
        antithetic: bool = False,
        restore: str = "copy",
        adapt_prior: bool = False,
        curvature: str = "price",
        curvature_every: int = 8,
        rank_noise: bool = False,
    ) -> None:
        in_range("IVON", (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("clip_radius", clip_radius, clip_radius > 0),
            ("mc_samples", mc_samples, mc_samples >= 1 and not (antithetic and mc_samples % 2)),
            ("curvature_every", curvature_every, curvature_every >= 1),
        ))  # fmt: skip
        if curvature not in ("price", "ggn"):
            raise ValueError(f"IVON: curvature={curvature!r} is neither 'price' nor 'ggn'")
        if curvature == "ggn":
            if not weight_decay and prior is None:
                raise ValueError("IVON: curvature='ggn' needs weight_decay > 0: where it is zero, so is the precision")
            hess_init, rescale_lr = 0.0, False
        defaults = {
            "lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2,
            "weight_decay": weight_decay, "clip_radius": clip_radius, "mc_samples": mc_samples,
            "rescale_lr": rescale_lr, "debias": debias, "seed": seed, "adapt_prior": adapt_prior,
            "curvature_every": curvature_every, "ggn": curvature == "ggn",  # torch's checkpoints hold no strings here
        }  # fmt: skip
        super().__init__(params, defaults, prior=prior, restore=restore)
        self.antithetic = antithetic
        self.curvature = curvature
        self.rank_noise = rank_noise
        self._check_parameters()
        self._uses_noise = curvature == "price"

    def _clear(self) -> None:
        super()._clear()
        self._squares: dict[Tensor, Tensor] = {}
        self._observed = 0
        self._told_apart = False

    def _forget_samples(self) -> None:
        super()._forget_samples()
        self._squares, self._observed = {}, 0

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for p in [p for group in self.param_groups for p in group["params"]] if self.rank_noise else []:
            if isinstance(p, DTensor):
                raise ValueError("IVON: rank_noise=True needs replicas; of sharded parameters all ranks see one sample")
            if self.restore == "redraw" and p.requires_grad and p.dtype.itemsize >= 4:
                raise ValueError(
                    "IVON: rank_noise=True with restore='redraw' would let replicas drift apart: without a float32 "
                    "master each rank's noise leaves rounding of its own. Use restore='copy'."
                )

    def _place(self, at: Moved) -> int:
        if self._own_noise and at.draw is not None and at.draw.stream == TRAIN:
            return dist.get_rank()
        return super()._place(at)

    @property
    def _own_noise(self) -> bool:
        return self.rank_noise and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def curvature_due(self) -> bool:
        """Whether the present sample of the step should call `add_curvature`."""
        due = self.param_groups[0]["steps"] % self.param_groups[0]["curvature_every"] == 0
        return self.curvature == "ggn" and due and self._sample == 0

    def add_curvature(self, projected: Tensor, observations: int) -> None:
        """Square the gradients of one micro-batch' randomly projected outputs, inside `sampled_params`, before its
        backward.

            g~ = grad sum_n <v_n, z_n>,   F = sum over micro-batches and ranks of g~^2 / observations

        With E[v v'] the Hessian of the loss in the outputs z (`curvature.random_root`), F is unbiased for the diagonal
        of the GGN at any batch size; draw the v of each rank by a seed of its own.

        The v of different observations are independent and have mean zero, so that cross terms vanish and F is also
        unbiased where gradients are summed over ranks before they are squared. Sharded parameters do that, because
        they have no gradient of one rank: there one draw is made of all ranks, with R times the variance.

        Args:
            projected: sum_n <v_n, z_n>, with its graph, which is kept.
            observations: The n of the sum.

        Raises:
            RuntimeError: Sharded parameters whose gradients are not reduced in every micro-batch.
        """
        parameters = [p for group in self.param_groups for _, p, _ in self._trainable(group)]
        gradients: Sequence[Tensor | None]
        if any(isinstance(p, DTensor) for p in parameters):
            gradients = _summed_gradients(projected, parameters)
        else:
            gradients = torch.autograd.grad(projected, parameters, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter not in self._squares:
                    self._squares[parameter] = torch.zeros_like(local(parameter), dtype=torch.float32)
                if gradient is not None:
                    self._squares[parameter].addcmul_(gradient.float(), gradient.float())
        self._observed += observations

    def _reduced_curvature(self) -> dict[Tensor, Tensor]:
        """This step's estimates of the Hessian diagonal, over all ranks."""
        if not self._squares:
            return {}
        squares, observed = self._squares, self._observed
        self._squares, self._observed = {}, 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            device = next(iter(squares.values())).device
            count = torch.tensor(observed, dtype=torch.float64, device=device)
            whole = [square for parameter, square in squares.items() if not isinstance(parameter, DTensor)]
            for tensor in (count, *whole):
                dist.all_reduce(tensor)
            observed = int(count)
        if not observed:  # all labels were masked, on every rank
            return {}
        for square in squares.values():
            square.div_(observed)
        return squares

    def _take(self, at: Moved) -> None:
        gradient = own_gradient(at.parameter)
        before = self._samples.get(at.parameter)
        if not self._uses_noise:
            if before is None:
                self._samples[at.parameter] = _Sampled(1, gradient, None, at)
            else:
                before.draws += 1
                before.grad = wide(before.grad).add_(gradient)
            return
        if before is None and self.restore == "redraw":
            self._samples[at.parameter] = _Sampled(1, gradient, None, at)
            return
        product = self._product(at, gradient) if self.restore == "copy" else self._redrawn_product(at, gradient)
        if before is None:
            self._samples[at.parameter] = _Sampled(1, gradient, product, at)
            return
        if before.noise_grad is None:
            before.noise_grad = self._redrawn_product(before.at, before.grad)
        before.draws += 1
        before.grad = wide(before.grad).add_(gradient)
        before.noise_grad.add_(product)
        self._keep_buffer(at.parameter, product)

    def _product(self, at: Moved, gradient: Tensor) -> Tensor:
        """noise * gradient in the buffer that held the noise, or the mean, which is restored."""
        if at.noise is not None:
            return at.noise.mul_(gradient)
        assert at.saved is not None
        for w, m, g in slices(local(at.parameter), at.saved, gradient):
            noise = w - m
            w.copy_(m)
            at.restored += max(1, w.numel())  # before the mean is overwritten: an interrupt may come anywhere
            torch.mul(noise, g, out=m)
        product, at.saved = at.saved, None
        return product

    def _redrawn_product(self, at: Moved, gradient: Tensor) -> Tensor:
        product = torch.empty_like(local(at.state["hess"]))
        for piece, p in self._redrawn(at, gradient, product):
            p.copy_(piece)
        return product

    def _redrawn(self, at: Moved, gradient: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
        """noise * gradient in scratch, from the noise drawn again, with the slices of other tensors."""
        for noise, g, *rest in self._noise(at, gradient, *others):
            yield noise.mul_(g), *rest

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update mean and Hessian from the samples since the last step; parameters without any are skipped.

        A closure is evaluated in `mc_samples` contexts of its own. Under `ggn` a parameter whose first gradient comes
        between two estimates, an expert's say, keeps its mean until it has an estimate.

        Raises:
            RuntimeError: Before any change: no curvature was ever given under `ggn`, or `rank_noise` with gradients
                that were already reduced.
        """
        loss = None
        if closure is not None:
            for _ in range(int(self.defaults["mc_samples"])):
                with self.sampled_params(train=True), torch.enable_grad():
                    loss = closure()
        self._check_curvature()
        together = self._sampled_on_any_rank() if self._own_noise else set()
        squares = self._reduced_curvature()
        seen: list[tuple[Tensor, dict[str, Any], Tensor, int]] = []
        for group in self.param_groups:
            group["steps"] += bool(self._sample)
            for _, parameter, state in self._trainable(group):
                sampled = self._samples.pop(parameter, None)
                if parameter in together:
                    sampled = self._mean_over_ranks(Moved(parameter, group, state, (0, 0), None), sampled)
                if sampled is None:
                    continue
                state["step"] += 1
                if sampled.draws > 1:
                    sampled.grad.div_(sampled.draws)
                if self.curvature == "ggn":
                    self._update_ggn(parameter, group, state, sampled.grad, squares.pop(parameter, None))
                else:
                    looked, noise = self._update(parameter, group, state, sampled)
                    seen.append((parameter, group, noise, looked))
                if group["adapt_prior"] and parameter.ndim > 1 and state.get("estimates", 1) > 0:
                    self._adapt(parameter, group, state)
        for parameter, group, noise, count in _over_shards(seen):
            self.state[parameter]["noise"].lerp_(noise / max(count, 1), 1 - group["beta2"])
        self._forget_samples()
        return loss

    def _check_curvature(self) -> None:
        """Raise if the first estimate was due in this step and nobody has made one."""
        group = self.param_groups[0]
        due = self.curvature == "ggn" and self._samples and group["steps"] % group["curvature_every"] == 0
        if due and not self._squares and not any(s.get("estimates", 0) > 0 for s in self.state.values()):
            raise RuntimeError(
                "IVON: curvature='ggn' has no estimate yet: call add_curvature inside sampled_params whenever "
                "curvature_due is True."
            )

    def _sampled_on_any_rank(self) -> set[Tensor]:
        """Parameters with a gradient on this rank or another; a collective.

        Raises:
            RuntimeError: The first gradients are already reduced, so that h would be R times too small.
        """
        parameters = [p for group in self.param_groups for _, p, _ in self._trainable(group)]
        mine = torch.zeros(
            len(parameters) + 1, dtype=torch.float64, device=parameters[0].device if parameters else None
        )
        mine[:-1] = torch.tensor([p in self._samples for p in parameters], dtype=torch.float64)
        if not self._told_apart:
            mine[-1] = sum(s.grad.double().abs().sum().to(mine.device) for s in self._samples.values())
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        *anywhere, largest = torch.stack(ranks).amax(0).tolist()
        if not self._told_apart and largest > 0 and all(float(r[-1]) == largest for r in ranks):
            raise RuntimeError(
                "IVON: rank_noise=True, but the gradients are the same on all ranks. Call backward under DDP's "
                "no_sync(), for every micro-batch, and give each rank its own part of the batch."
            )
        self._told_apart = True
        return {p for p, found in zip(parameters, anywhere, strict=True) if found}

    def _mean_over_ranks(self, at: Moved, sampled: _Sampled | None) -> _Sampled:
        """Gradient and noise * gradient of this rank's samples become means over all ranks; zero where it has none."""
        if sampled is None:
            zero = wide(torch.zeros_like(at.parameter))
            product = zero.clone() if self.restore == "copy" else torch.zeros_like(at.state["hess"])
            sampled = _Sampled(1, zero, product if self._uses_noise else None, at)
        elif self._uses_noise and sampled.noise_grad is None:
            sampled.noise_grad = self._redrawn_product(sampled.at, sampled.grad)
        sampled.grad = wide(sampled.grad)
        for tensor in (sampled.grad, sampled.noise_grad):
            if tensor is not None:
                dist.all_reduce(tensor.div_(sampled.draws * dist.get_world_size()))
        sampled.draws = 1
        return sampled

    def _update(
        self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], sampled: _Sampled
    ) -> tuple[int, Tensor]:
        """Make the step; return how many entries the noise number looked at, and its sum over them."""
        centre, decay = self._prior_of(parameter, group, state)
        scale = group["hess_init"] + self._typical_decay(parameter, group) if group["rescale_lr"] else 1.0
        weights = local(parameter)
        mean = local(state["mean"]) if "mean" in state else weights
        tensors = (mean, local(state["momentum"]), local(state["hess"]), sampled.grad, centre, decay)
        if sampled.noise_grad is None:
            pieces = self._redrawn(sampled.at, sampled.grad, *tensors)
        else:
            pieces = slices(sampled.noise_grad.div_(sampled.draws), *tensors)
        passes = fused_passes(*tensors[:3], centre, decay)
        update = passes.ivon_update if passes else ivon_update
        looked, noise = 0, torch.zeros((), device=weights.device)
        for noise_grad, m, momentum, hess, g, m_p, d in pieces:
            grad = g.to(momentum.dtype).contiguous()
            ratios = _ratios(noise_grad, hess, d, group["ess"])
            noise += ratios.square_().sum()
            looked += ratios.numel()
            update(
                m, momentum, hess, grad, noise_grad,
                step=int(state["step"]), lr=group["lr"] * scale, ess=group["ess"],
                beta1=group["beta1"], beta2=group["beta2"], weight_decay=d,
                clip_radius=group["clip_radius"], debias=group["debias"], prior_mean=m_p,
            )  # fmt: skip
        if mean is not weights:
            weights.copy_(mean)
        if sampled.noise_grad is not None:
            self._keep_buffer(parameter, sampled.noise_grad)
        return looked, noise

    def _update_ggn(
        self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], grad: Tensor, squares: Tensor | None
    ) -> None:
        if squares is not None:
            state["estimates"] += 1
        elif state["estimates"] == 0:  # without a curvature there is no Newton step
            momentum = local(state["momentum"])
            momentum.lerp_(grad.to(momentum.dtype), 1 - group["beta1"])
            return
        centre, decay = self._prior_of(parameter, group, state)
        weights = local(parameter)
        mean = local(state["mean"]) if "mean" in state else weights
        tensors = (mean, local(state["momentum"]), local(state["hess"]), grad, squares, centre, decay)
        passes = fused_passes(*tensors[:3], squares, centre, decay)
        update = passes.ggn_update if passes else ggn_update
        for m, momentum, hess, g, square, m_p, d in slices(*tensors):
            update(
                m, momentum, hess, g.to(momentum.dtype).contiguous(), square,
                share=(1 - group["beta2"]) / (1 - group["beta2"] ** max(1, int(state["estimates"]))),
                step=int(state["step"]), lr=group["lr"], beta1=group["beta1"], weight_decay=d,
                clip_radius=group["clip_radius"], debias=group["debias"], prior_mean=m_p,
            )  # fmt: skip
        if mean is not weights:
            weights.copy_(mean)

    def _trainable(self, group: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        for index, parameter, state in super()._trainable(group):
            # All of the state is there from the start, as torch.distributed.checkpoint loads into what it finds.
            if self.curvature == "ggn" and "estimates" not in state:
                state["estimates"] = torch.zeros((), dtype=torch.float32)
            if self.curvature == "price" and "noise" not in state:
                state["noise"] = torch.zeros((), device=parameter.device)
            if group["adapt_prior"] and parameter.ndim > 1 and "weight_decay" not in state:
                start = self._prior.get(parameter, (None, float(group["weight_decay"])))[1]
                if not isinstance(start, Tensor):  # else every entry has a prior of its own
                    state["weight_decay"] = torch.full((), start, device=parameter.device)
            yield index, parameter, state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base's; raises `ValueError` also if the run was made with the other `curvature`."""
        counted = any("estimates" in state for state in state_dict["state"].values())
        for group in state_dict["param_groups"]:
            theirs = "ggn" if group.get("ggn", counted) else "price"
            if (state_dict["state"] or "ggn" in group) and theirs != self.curvature:
                raise ValueError(
                    f"IVON: the checkpoint was made with curvature='{theirs}', whose h is another than that of "
                    f"'{self.curvature}'. Resume with curvature='{theirs}', or give its posterior as the prior."
                )
        super().load_state_dict(state_dict)

    def _adapt(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "weight_decay" not in state:
            return
        centre, decay = self._prior.get(parameter, (None, None))[0], state["weight_decay"]
        mean = state.get("mean", parameter).float()
        away = mean if centre is None else mean - centre
        spread = ((state["hess"] + float(decay)) * group["ess"]).reciprocal_()
        second = away.square().add_(spread).mean()
        if isinstance(second, DTensor):
            second = second.full_tensor()
        decay.lerp_(1 / (group["ess"] * second), 1 - group["beta2"])

    def health(self, batch_size: float) -> dict[str, float]:
        """How much the Hessian can be trusted: the numbers of every optimizer here and two more.

        Returns:
            `kappa` = (1 - beta2) ess / (2 batch_size), the noise of h for a diagonal Hessian; `hess_noise` =
            0.5 (1 - beta2) E[(f - h)^2 / (h + d)^2], the median over tensors, which also sees the noise that comes
            from the other parameters: above 1, the size of h is noise. Under `ggn`, which has neither this noise nor
            a start to forget, both and `init_fraction` are 0.
        """
        health, noise = super().health(batch_size), []
        if self.curvature == "ggn":
            return {**health, "init_fraction": 0.0, "kappa": 0.0, "hess_noise": 0.0}
        for group in self.param_groups:
            for _, _, state in self._trainable(group):
                if "noise" in state and state["step"] > 0:
                    seen = float(state["noise"]) / (1 - group["beta2"] ** int(state["step"]))
                    noise.append(0.5 * (1 - group["beta2"]) * seen)
        group = self.param_groups[0]
        health["kappa"] = (1 - group["beta2"]) * group["ess"] / (2 * batch_size)
        health["hess_noise"] = sorted(noise)[len(noise) // 2] if noise else 0.0
        return health


def _ratios(noise_grad: Tensor, hess: Tensor, decay: Tensor | float, ess: float) -> Tensor:
    """(f - h) / (h + d) of some entries."""
    f, h = _some(noise_grad), _some(hess)
    d = _some(decay) if isinstance(decay, Tensor) and decay.ndim else decay
    return (f * ess).sub_(h / (h + d))


def _some(tensor: Tensor) -> Tensor:
    """Rows of a flat tensor, every `_EVERY`th; the same ones in whole tensors and in slices of them."""
    flat = tensor.reshape(-1)
    rows = flat.numel() // (_LOOKED * _EVERY)
    return flat[: rows * _LOOKED * _EVERY].view(rows, -1)[:, :_LOOKED] if rows else flat[:_LOOKED]


def _summed_gradients(projected: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradients of this rank's shards, summed over ranks, which all call this; `.grad` stays as it was."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    torch.autograd.backward(projected, retain_graph=True)
    found: list[Tensor | None] = []
    for p, kept in zip(parameters, before, strict=True):
        # fully_shard reduces to the mean over ranks; what it leaves alone is squared before it is reduced.
        scale = dist.get_world_size() if isinstance(p, DTensor) else 1
        found.append(None if p.grad is None else local(p.grad) * scale)
        p.grad = kept
    if all(g is None for g in found):
        raise RuntimeError(
            "IVON: add_curvature found no gradient. Under fully_shard every micro-batch of a step in which "
            "curvature_due is True needs its gradients reduced: model.set_requires_gradient_sync(True)."
        )
    return found


def _over_shards(
    seen: list[tuple[Tensor, dict[str, Any], Tensor, int]],
) -> Iterator[tuple[Tensor, dict[str, Any], Tensor, float]]:
    """Sum and count of each parameter, over its shards where it has several; one collective for all of a mesh."""
    meshes: dict[Any, list[tuple[Tensor, dict[str, Any], Tensor, int]]] = {}
    for entry in seen:
        if isinstance(entry[0], DTensor):
            meshes.setdefault(entry[0].device_mesh, []).append(entry)
        else:
            yield entry
    for mesh, entries in meshes.items():
        counts = torch.tensor([e[3] for e in entries], dtype=torch.float32, device=entries[0][2].device)
        mine = torch.stack([torch.stack([e[2] for e in entries]), counts])
        sums, totals = DTensor.from_local(mine, mesh, [Partial()] * mesh.ndim).full_tensor()
        for (parameter, group, _, _), noise, total in zip(entries, sums, totals.tolist(), strict=True):
            yield parameter, group, noise, total
