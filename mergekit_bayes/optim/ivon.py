"""IVON, the improved variational online Newton method (Shen et al., ICML 2024).

One run gives a mean, used like ordinary weights, and a diagonal posterior precision. It minimises
`ess * E_q[mean loss] + KL(q, p)` over Gaussians q, with prior p = N(0, 1 / (ess * weight_decay))
or any other diagonal Gaussian, a stored posterior for example. State lives per parameter, in
float32 whatever the parameter's dtype, so mixed dtypes, sharding, resuming and frozen parameters
work by the ordinary means of `torch.optim`.
"""

import math
from collections.abc import Callable, Iterator
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from mergekit_bayes.optim.base import PosteriorOptimizer
from mergekit_bayes.optim.health import curvature_noise
from mergekit_bayes.optim.moves import Moved
from mergekit_bayes.optim.noise import TRAIN, Draw
from mergekit_bayes.optim.prior import Priors
from mergekit_bayes.optim.ranges import check_settings
from mergekit_bayes.optim.rank_noise import check_replicas, mean_over_ranks, sampled_on_any_rank
from mergekit_bayes.optim.samples import Sampled, add_gradient, add_noise_gradient
from mergekit_bayes.optim.shards import sum_over_shards, take_gradient
from mergekit_bayes.optim.squares import add_squares, damped, mean_squares
from mergekit_bayes.optim.state import Group, ParameterState, check_curvature
from mergekit_bayes.optim.steps import adapt_prior, ggn_step, price_step
from mergekit_bayes.optim.steps_together import Pending, step_together


class IVON(PosteriorOptimizer):
    """IVON with float32 state, by the published equations or with random root-GGN draws for h.

        for batch in loader:
            for _ in range(mc_samples):
                with optimizer.sampled_params(train=True):
                    loss(model, batch).backward()
            optimizer.step()

    The loss is a mean over the observations that `ess` counts. Clipping and unscaling belong
    inside the context, which takes the gradients when it closes.

    Under `fully_shard` all ranks see the same gathered sample, so a step is one sample on the
    global batch. Make the optimizer after sharding, and shard the root with
    `reshard_after_forward=True` if samples are used for prediction: by default the root keeps its
    gathered weights after a forward without a backward, and the next one would still see them.
    `full_tensors` gathers mean and precision; `torch.distributed.checkpoint` saves and loads the
    state.

    Parameters of fewer than 32 bits have a float32 master of the mean in `state`, so that small
    steps add up. Their curvature is estimated with the noise that was drawn:
    E[eps g(round(mean + sigma eps))] is exactly sigma times the derivative of the smoothed
    gradient, while the perturbation that rounding leaves adds its own square.

    Args:
        params: Parameters or groups; frozen parameters are left alone.
        lr: Learning rate: of SGD at the start with `rescale_lr`, else of a Newton step.
        ess: Effective sample size lambda, in observations. The size of the data set is untempered
            Bayes.
        hess_init: Start value of h, the Hessian diagonal of the mean loss.
        beta1: Decay of the momentum.
        beta2: Decay of the Hessian; `beta2^steps` of `hess_init` is never forgotten.
        weight_decay: Prior precision over `ess`.
        clip_radius: Bound on each entry of the preconditioned direction.
        mc_samples: Weight samples of a step, an even number if antithetic. `step` takes any
            number of samples from one on.
        rescale_lr: Multiply `lr` by `hess_init + weight_decay`; of a prior, by the median of its
            precision over `ess`.
        debias: Divide the momentum by `1 - beta1^step`.
        seed: Seed of the noise.
        prior: `{parameter: (mean, precision)}`, tensors of the parameter's shape. A mean of None
            is zero, a precision (1/weight^2, a tensor or a number) of None is
            `ess * weight_decay`. With a stored posterior, training goes on where it ended: on
            quadratics, one data set after the other gives what both at once would. Not part of
            `state_dict`; give it again to resume.
        antithetic: Samples 2k - 1 and 2k of a step have noise +eps and -eps, so that on the same
            batches the gradient's own noise cancels in the Hessian: its relative noise a step
            falls from sqrt(ess / batch) to sqrt(2). That holds in float32, and under bf16
            autocast at a moderate ess only.
        restore: "copy" holds the mean (and then noise * gradient) in a third buffer of the
            parameters' size, and restores it exactly. "redraw" holds nothing, and draws the noise
            two or three times. Under a float32 master it is as exact; else adding and subtracting
            leaves rounding in the mean.
        adapt_prior: Move the prior precision of each matrix, at the pace of beta2, to the
            evidence's optimum `weight_decay = 1 / (ess mean_j((m_j - m_p,j)^2 + sigma_j^2))`,
            from `weight_decay` on. It is kept in `state`.
        curvature: "price" is the published estimate, noise * gradient. It still holds
            `beta2^steps` of `hess_init`, and the positivity term turns the noise of the estimate,
            that of all other parameters included, into a bias that grows with kappa =
            (1 - beta2) ess / (2 batch); `health` returns both numbers. "ggn" takes the GGN's
            diagonal from `add_curvature`, every `curvature_every` steps, and has neither this
            bias nor a start to forget. h is then an average from zero, and beta2 its decay per
            estimate (1 - 5 curvature_every / steps); `hess_init` and `rescale_lr` are not used;
            the first step is made at the mean. An entry that no output depends on has a noise that
            `weight_decay` and `damping` bound.
        curvature_every: Steps from one estimate to the next, with `curvature="ggn"`.
        damping: Added to every estimate by "ggn"; no prior, so that it pulls nothing.
        rank_noise: Each rank draws noise of its own for its part of the batch, so that R ranks
            are R samples at the cost of one. The gradients must come unreduced (DDP's `no_sync`
            around every backward, which the Trainer mixin opens): gradient and noise * gradient
            are reduced in `step`. Replicas stay equal bit for bit. `restore="redraw"` would undo
            that, and is allowed beside float32 masters only.

    Raises:
        ValueError: A setting is out of range, or settings do not fit the parameters.
    """

    _mark = "mc_samples"
    _gathers = True
    _settings = (
        *PosteriorOptimizer._settings,
        "curvature",
        "rank_noise",
        "_uses_noise",
        "_gathers",
    )

    def __init__(
        self,
        params: ParamsT,
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
        prior: Priors | None = None,
        antithetic: bool = False,
        restore: str = "copy",
        adapt_prior: bool = False,
        curvature: str = "price",
        curvature_every: int = 8,
        damping: float = 0.0,
        rank_noise: bool = False,
    ) -> None:
        rules = (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("clip_radius", clip_radius, clip_radius > 0),
            ("mc_samples", mc_samples, mc_samples >= 1 and not (antithetic and mc_samples % 2)),
            ("curvature_every", curvature_every, curvature_every >= 1),
            ("damping", damping, damping == 0 or (damping > 0 and curvature == "ggn")),
        )
        check_settings("IVON", rules)
        if curvature not in ("price", "ggn"):
            raise ValueError(f"IVON: curvature={curvature!r} is neither 'price' nor 'ggn'")
        if curvature == "ggn":
            if not weight_decay and not damping and prior is None:
                raise ValueError(
                    "IVON: curvature='ggn' needs weight_decay or damping > 0: where both are zero, "
                    "so is the precision"
                )
            hess_init, rescale_lr = damping, False
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "clip_radius": clip_radius,
            "mc_samples": mc_samples,
            "rescale_lr": rescale_lr,
            "debias": debias,
            "seed": seed,
            "adapt_prior": adapt_prior,
            "curvature_every": curvature_every,
            "damping": damping,
            "ggn": curvature == "ggn",  # torch's checkpoints hold no strings here
        }
        super().__init__(params, defaults, prior=prior, restore=restore)
        for group in self.param_groups if curvature == "ggn" else ():
            group["hess_init"] = group["damping"]  # which a group may have of its own
        self.antithetic = antithetic
        self.curvature = curvature
        self.rank_noise = rank_noise
        self._check_parameters()
        self._uses_noise = curvature == "price"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.rank_noise:
            parameters = [p for group in self.param_groups for p in group["params"]]
            check_replicas(parameters, copies=self.restore == "copy")

    @property
    def _ranks_draw(self) -> bool:
        """Whether every rank draws training noise of its own."""
        return self.rank_noise and dist.is_initialized() and dist.get_world_size() > 1

    def _place(self, parameter: Tensor, draw: Draw) -> int:
        if self._ranks_draw and draw.stream == TRAIN:
            return dist.get_rank()
        return super()._place(parameter, draw)

    @property
    def curvature_due(self) -> bool:
        """Whether the present sample of the step should call `add_curvature`."""
        group = self.param_groups[0]
        is_due = group["steps"] % group["curvature_every"] == 0
        return self.curvature == "ggn" and is_due and self._transient.samples == 0

    def add_curvature(self, projected: Tensor, observations: int) -> None:
        """Add the squared gradient of the randomly projected outputs of one micro-batch.

            g~ = grad sum_n <v_n, z_n>
            F  = sum over micro-batches and ranks of g~^2 / observations

        To be called inside `sampled_params`, before the backward of the loss. With E[v v'] the
        Hessian of the loss in the outputs z (`curvature.ggn.random_root`), F is unbiased for the
        diagonal of the GGN at any batch size. Draw the v of each rank by a seed of its own.

        The v of different observations are independent and have mean zero, so that cross terms
        vanish, and F is also unbiased where gradients are summed over ranks before they are
        squared. Sharded parameters do that, because they have no gradient of one rank: there one
        draw is made of all ranks, with R times the variance.

        Args:
            projected: sum_n <v_n, z_n>, a scalar with its graph, which is kept.
            observations: Number of observations in the sum.

        Raises:
            RuntimeError: Sharded parameters whose gradients are not reduced in every micro-batch.
        """
        add_squares(self._transient.squares, projected, self._trained_parameters())
        self._transient.observations += observations

    def _take(self, moved: Moved) -> None:
        gradient, transient = take_gradient(moved.parameter), self._transient
        if self._uses_noise:
            add_noise_gradient(transient.sampled, moved, gradient, self._noise, transient.buffers)
        else:
            add_gradient(transient.sampled, moved, gradient)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update mean and Hessian from the samples since the last step.

        Parameters without a sample are skipped. Under "ggn" a parameter whose first gradient
        comes between two estimates keeps its mean until it has one.

        Args:
            closure: Computes loss and gradients, and returns the loss. It is evaluated in
                `mc_samples` contexts of its own.

        Returns:
            The loss of the last sample, if there is a closure.

        Raises:
            RuntimeError: Before any change: no curvature was ever given under "ggn", or
                `rank_noise` with gradients that are reduced already.
        """
        loss = None
        if closure is not None:
            for _ in range(int(self.defaults["mc_samples"])):
                with self.sampled_params(train=True), torch.enable_grad():
                    loss = closure()
        self._check_curvature()
        if self._ranks_draw:
            self._find_sampled_on_any_rank()
        squares = damped(mean_squares(*self._transient.take_squares()), self.param_groups)
        noise_sums: list[tuple[Tensor, Group, Tensor, int]] = []
        small: list[Pending] = []
        for parameter, group, state, sampled in self._each_sampled(small):
            if sampled.draws > 1:
                sampled.grad.div_(sampled.draws)
            prior = self._prior_of(parameter, group, state)
            if self.curvature == "ggn":
                square = squares.pop(parameter, None)
                ggn_step(parameter, group, state, sampled.grad, square, prior=prior)
            else:
                lr = self._newton_lr(parameter, group)
                total, count = price_step(
                    parameter, group, state, sampled, lr=lr, prior=prior, noise=self._noise
                )
                noise_sums.append((parameter, group, total, count))
                if sampled.noise_grad is not None:
                    self._transient.buffers.keep(parameter, sampled.noise_grad)
            if group["adapt_prior"] and "weight_decay" in state and state.get("estimates", 1) > 0:
                adapt_prior(parameter, group, state, self._prior.get(parameter, (None, 0.0))[0])
        step_together(small, squares, self._newton_lr, ggn=self.curvature == "ggn")
        for parameter, group, total, number in sum_over_shards(noise_sums):
            self.state[parameter]["noise"].lerp_(total / max(number, 1), 1 - group["beta2"])
        self._transient.forget_step()
        return loss

    def _newton_lr(self, parameter: Tensor, group: Group) -> float:
        if not group["rescale_lr"]:
            return float(group["lr"])
        return float(group["lr"] * (group["hess_init"] + self._typical_decay(parameter, group)))

    def _check_curvature(self) -> None:
        """Raise if the first estimate was due in this step, and none was added."""
        group, transient = self.param_groups[0], self._transient
        is_due = group["steps"] % group["curvature_every"] == 0
        if self.curvature != "ggn" or not transient.sampled or not is_due or transient.squares:
            return
        if not any(state.get("estimates", 0) > 0 for state in self.state.values()):
            raise RuntimeError(
                "IVON: curvature='ggn' has no estimate yet: call add_curvature inside "
                "sampled_params whenever curvature_due is True."
            )

    def _find_sampled_on_any_rank(self) -> None:
        transient, parameters = self._transient, self._trained_parameters()
        transient.sampled_on_any_rank = sampled_on_any_rank(
            parameters, transient.sampled, check=not transient.ranks_differ
        )
        transient.ranks_differ = True

    def _pop_sampled(
        self, parameter: Tensor, group: Group, state: ParameterState
    ) -> Sampled | None:
        sampled = super()._pop_sampled(parameter, group, state)
        if parameter not in self._transient.sampled_on_any_rank:
            return sampled
        return mean_over_ranks(
            Moved(parameter, group, state, (0, 0), None),
            sampled,
            self._noise,
            uses_noise=self._uses_noise,
            copies=self.restore == "copy",
        )

    def _trainable(self, group: Group) -> Iterator[tuple[int, Tensor, ParameterState]]:
        for index, parameter, state in super()._trainable(group):
            # All state is made at the start: torch.distributed.checkpoint loads into what it finds.
            if self.curvature == "ggn" and "estimates" not in state:
                state["estimates"] = torch.zeros((), dtype=torch.float32)
            if self.curvature == "price" and "noise" not in state:
                state["noise"] = torch.zeros((), device=parameter.device)
            if group["adapt_prior"] and parameter.ndim > 1 and "weight_decay" not in state:
                start = self._prior.get(parameter, (None, float(group["weight_decay"])))[1]
                if not isinstance(start, Tensor):  # else every entry has its own prior
                    state["weight_decay"] = torch.full((), start, device=parameter.device)
            yield index, parameter, state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint; state stays float32, where torch would cast it like the parameters.

        Args:
            state_dict: What `state_dict` returned, of any version of this package.

        Raises:
            ValueError: The checkpoint was made with another `prior`, by another optimizer, or
                with the other `curvature`.
        """
        check_curvature(state_dict, self.curvature)
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if "ess" in saved:  # the h of an earlier version has no damping in it
                group["damping"] = saved.get("damping", 0.0)

    def health(self, batch_size: float) -> dict[str, float]:
        """Return numbers that tell how much the posterior can be trusted.

        Args:
            batch_size: Observations that enter one step, over micro-batches and ranks.

        Returns:
            The numbers of every optimizer here, and two more: `kappa` = (1 - beta2) ess /
            (2 batch_size), the noise of h for a diagonal Hessian F, where E[h] = F (1 + kappa)
            at beta2^steps = 0; `hess_noise` =
            0.5 (1 - beta2) E[(f - h)^2 / (h + d)^2], the median over tensors, which also sees the
            noise that comes from the other parameters: above 1, the size of h is noise. Under
            "ggn", which has neither this noise nor a start to forget, both and `init_fraction`
            are 0.
        """
        health = super().health(batch_size)
        if self.curvature == "ggn":
            return {**health, "init_fraction": 0.0, "kappa": 0.0, "hess_noise": 0.0}
        group = self.param_groups[0]
        states = (
            (state, group["beta2"])
            for group in self.param_groups
            for _, _, state in self._trainable(group)
        )
        health["kappa"] = (1 - group["beta2"]) * group["ess"] / (2 * batch_size)
        health["hess_noise"] = curvature_noise(states)
        return health
