"""What all optimizers here share: noise, prior, exact restore and float32 state.

Each keeps, per parameter, the mean (the parameter itself, or a float32 master beside one of fewer
bits), a momentum and the Hessian diagonal h of the mean loss. The posterior is
N(mean, 1 / (ess (h + d))), with d the prior's precision over ess.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT, StateDict

from mergekit_bayes.draws import mix
from mergekit_bayes.optim.health import Entry, gradient_norm, posterior_health
from mergekit_bayes.optim.moves import (
    Buffers,
    Moved,
    add_noise,
    follow_weights,
    restore,
    restore_all,
)
from mergekit_bayes.optim.noise import PREDICT, TRAIN, Draw, noise_slices
from mergekit_bayes.optim.prior import Priors, PriorTerm, check_prior, prior_terms
from mergekit_bayes.optim.ranges import check_settings
from mergekit_bayes.optim.samples import Sampled
from mergekit_bayes.optim.shards import local, shard_index
from mergekit_bayes.optim.slicing import Items
from mergekit_bayes.optim.state import COUNTERS, Group, ParameterState, check_shapes, undamped
from mergekit_bayes.optim.steps_together import Pending
from mergekit_bayes.optim.together import Gathered, Member, Together, goes_together
from mergekit_bayes.optim.transient import Transient

_MARKS = {"mc_samples", "rho"}  # settings by which the optimizer of a checkpoint is told


class PosteriorOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that leave a diagonal Gaussian posterior.

    Training noise is a function of (seed, step, sample, group, parameter, shard or rank). So a
    resumed run continues it, a step that is made again gets the same noise, and samples for
    prediction do not disturb it. Replicas (DDP) draw the same noise, shards (DTensor) each their
    own, and with IVON's `rank_noise` every rank its own for training. The compiled pass draws it
    alike on every processor; where that does not fit, torch's generators draw it.

    A subclass has `_take`, which adds the gradient of a sample to the sums of the step, and
    `step`, which goes through `_each_sampled`. Its state is `state.ParameterState`, which
    checkpoints hold, and `transient.Transient`, which they do not.

    Args:
        params: Parameters or groups; frozen parameters are left alone.
        defaults: Settings of every group. `ess`, `weight_decay`, `hess_init` and `seed` are used
            here.
        prior: Mean (None is zero) and precision in 1/weight^2 (None is `ess * weight_decay`) of
            parameters, of their shape or a number. Not part of `state_dict`: give it again to
            resume, which is checked.
        restore: "copy" keeps the mean while the weights are sampled. "redraw" draws the noise
            again and subtracts it.

    Raises:
        ValueError: Unknown `restore`, or a prior that does not fit.
    """

    antithetic: bool = False
    restore: str = "copy"
    _gathers: bool = False  # whether small parameters are sampled and stepped together
    _uses_noise: bool = False  # whether the update needs the noise beside the gradient
    _mark: str | None = None  # the setting in `_MARKS` that this optimizer has
    _settings: tuple[str, ...] = ("antithetic", "restore", "_prior")  # kept in a copy

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        prior: Priors | None = None,
        restore: str = "copy",
    ) -> None:
        counters = {"steps": 0, "draws": 0, "prior_sum": 0.0, "prior_order": 0.0}
        super().__init__(params, {**defaults, **counters})
        name = type(self).__name__
        if restore not in ("copy", "redraw"):
            raise ValueError(f"{name}: restore={restore!r} is neither 'copy' nor 'redraw'")
        self.restore = restore
        self._prior = prior_terms(dict(prior or {}), self.param_groups, name)
        self._clear()

    def _clear(self) -> None:
        self._transient = Transient(buffers=Buffers(keeps=self.restore == "copy"))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clear()

    @contextmanager
    def sampled_params(self, train: bool = False, *, temperature: float = 1.0) -> Iterator[None]:
        """Set the weights to a sample of the posterior, and back to the mean on leaving.

            theta = mean + eps sqrt(T / (ess (h + d))),   eps ~ N(0, 1)

        Args:
            train: Take the gradients for `step` when the context closes without an exception;
                `.grad` is None then. Otherwise the sample is one for prediction.
            temperature: T, for samples of prediction only; 3 in the record of a fine-tune.

        Raises:
            RuntimeError: The context is opened inside another one.
            ValueError: Parameters that were exchanged and no longer fit the settings, or a
                temperature that is not a positive number, or not 1 in training.
        """
        self._check_parameters()
        draw = self._next_draw(train, temperature)
        taking = False
        try:
            with self._away(self._add_noise, self._take if train else None, draw):
                yield
                taking = train
            self._transient.samples += train
        except BaseException:
            if taking:
                # What was taken before an interrupt would count twice.
                self._transient.forget_step()
            raise

    @property
    def has_prior(self) -> bool:
        """Whether a prior was given by `prior`, besides `weight_decay`."""
        return bool(self._prior)

    def forget_samples(self) -> None:
        """Forget the samples since the last step, so that the next `step` changes nothing."""
        self._transient.forget_step()

    def _check_parameters(self) -> None:
        """Raise for parameters that do not fit the settings; a launcher may exchange them."""
        if not self._prior:
            return
        parameters = {p for group in self.param_groups for p in group["params"]}
        if any(p not in parameters for p in self._prior):
            raise ValueError(
                f"{type(self).__name__}: the prior names parameters that were replaced since (by "
                "shards of them?). Make the optimizer from the parameters that are trained, after "
                "sharding."
            )

    def _next_draw(self, train: bool, temperature: float) -> Draw:
        fits = 0 < temperature < math.inf and (temperature == 1 or not train)
        check_settings(type(self).__name__, [("temperature", temperature, fits)])
        if not train:
            for group in self.param_groups:
                group["draws"] += 1
            return Draw(PREDICT, self.param_groups[0]["draws"], 0, temperature**0.5)
        step, sample = self.param_groups[0]["steps"], self._transient.samples
        if self.antithetic:
            return Draw(TRAIN, step, sample // 2, -1.0 if sample % 2 else 1.0)
        return Draw(TRAIN, step, sample, 1.0)

    @contextmanager
    def _away(
        self,
        displace: Callable[[Moved], None],
        take: Callable[[Moved], None] | None,
        draw: Draw | None,
    ) -> Iterator[None]:
        """Move all parameters, and restore them on leaving; `take` sees those with a gradient."""
        transient = self._transient
        if transient.is_open:
            raise RuntimeError("sampled_params cannot be nested")
        all_moved: list[Moved | Together] = []
        gathers = self._gathers and self.restore == "copy"
        small = Gathered(draw, transient.arenas, self._uses_noise) if gathers and draw else None
        try:
            transient.is_open = True
            with torch.no_grad():
                for g, group in enumerate(self.param_groups):
                    for p, parameter, state in self._trainable(group):
                        member = Member(parameter, group, state, (g, p))
                        if small and parameter not in self._prior and small.accepts(member):
                            continue
                        moved = Moved(parameter, group, state, (g, p), draw)
                        if "mean" in state:
                            follow_weights(local(parameter), local(state["mean"]))
                        elif self.restore == "copy" or draw is None:
                            moved.saved = transient.buffers.take(parameter, local(parameter))
                        all_moved.append(moved)
                        displace(moved)
                for together in small.all() if small else ():
                    all_moved.append(together)
                    together.leave(self._place, transient.generators)
            yield
            with torch.no_grad():
                for away in all_moved if take else ():
                    if isinstance(away, Together):
                        away.take(transient.sampled, uses_noise=self._uses_noise)
                    elif take and away.parameter.grad is not None:
                        take(away)
        finally:
            try:
                restore_all(all_moved, self._restore)
            finally:
                transient.is_open = False

    def _add_noise(self, moved: Moved) -> None:
        is_training = moved.draw is not None and moved.draw.stream == TRAIN
        if "mean" in moved.state and self._uses_noise and self.restore == "copy" and is_training:
            moved.noise = self._transient.buffers.take(moved.parameter, local(moved.state["mean"]))
        add_noise(moved, self._noise)

    def _restore(self, moved: Moved | Together) -> None:
        if isinstance(moved, Together):
            moved.restore()
            return
        restore(moved, self._noise, self._transient.buffers)

    def _take(self, moved: Moved) -> None:
        """Add the gradient of a sample to the sums of the step."""
        raise NotImplementedError

    def _noise(self, moved: Moved, *others: Tensor | float | None) -> Iterator[Items]:
        """Return the slices of the noise, and of other tensors along with it."""
        draw, group, state = moved.draw, moved.group, moved.state
        assert draw is not None
        place = self._place(moved.parameter, draw)
        seed = mix(group["seed"], draw.stream, draw.number, draw.sample, *moved.index, place)
        # Before the first estimate nothing is known of the curvature: the sample is the mean.
        factor = draw.scale / group["ess"] ** 0.5 if state.get("estimates", 1) else 0.0
        _, decay = self._prior_of(moved.parameter, group, state)
        generators = self._transient.generators
        return noise_slices(local(state["hess"]), decay, factor, seed, generators, *others)

    def _place(self, parameter: Tensor, draw: Draw) -> int:
        """Return the number that tells this rank's noise of a parameter from that of others."""
        return shard_index(parameter)

    def _prior_of(self, parameter: Tensor, group: Group, state: ParameterState) -> PriorTerm:
        """Return centre and precision over ess of a prior, of this rank's shard."""
        centre, decay = self._prior.get(parameter, (None, float(group["weight_decay"])))
        if "weight_decay" in state:  # adapted
            decay = state["weight_decay"]
        return (
            None if centre is None else local(centre),
            local(decay) if isinstance(decay, Tensor) else decay,
        )

    def _typical_decay(self, parameter: Tensor, group: Group) -> float:
        """Return the prior's precision over ess; its median where every entry has its own."""
        decay = self._prior.get(parameter, (None, group["weight_decay"]))[1]
        if not isinstance(decay, Tensor):
            return float(decay)
        medians = self._transient.medians
        if parameter not in medians:
            full = decay.full_tensor() if isinstance(decay, DTensor) else decay
            medians[parameter] = float(full.median())
        return medians[parameter]

    def _trainable(self, group: Group) -> Iterator[tuple[int, Tensor, ParameterState]]:
        """Yield number, parameter and state of a group's trained parameters, all state made."""
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad:
                continue
            state: ParameterState = self.state[parameter]
            if "hess" not in state:
                start = group["hess_init"]
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["hess"] = torch.full_like(parameter, start, dtype=torch.float32)
            if "mean" not in state and parameter.dtype.itemsize < 4:
                state["mean"] = parameter.detach().to(torch.float32, copy=True)
            yield index, parameter, state

    def _trained_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for _, p, _ in self._trainable(group)]

    def _each_sampled(
        self, together: list[Pending] | None = None
    ) -> Iterator[tuple[Tensor, Group, ParameterState, Sampled]]:
        """Count the step, and yield each parameter that it changes with the sums of its samples.

        Args:
            together: Gets the parameters that are stepped together, instead; they are not counted.
        """
        for group in self.param_groups:
            group["steps"] += bool(self._transient.samples)
            for _, parameter, state in self._trainable(group):
                sampled = self._pop_sampled(parameter, group, state)
                if sampled is None:
                    continue
                if together is not None and goes_together(parameter, state, sampled):
                    together.append(Pending(parameter, group, state, sampled))
                    continue
                state["step"] += 1
                yield parameter, group, state, sampled

    def _pop_sampled(
        self, parameter: Tensor, group: Group, state: ParameterState
    ) -> Sampled | None:
        """Return the sums over a parameter's samples, and forget them; None if it had no sample."""
        return self._transient.sampled.pop(parameter, None)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint; state stays float32, where torch would cast it like the parameters.

        Args:
            state_dict: What `state_dict` returned, of any version of this package.

        Raises:
            ValueError: The checkpoint was made with another `prior`, by another optimizer, or for
                parameters of other shapes.
        """
        for group in state_dict["param_groups"]:
            # torch.distributed.checkpoint makes a group of "params" alone if it finds none.
            is_ours = _MARKS & set(group) == {self._mark} & _MARKS and "ess" in group
            if set(group) != {"params"} and not is_ours:
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is another optimizer's, whose h and "
                    "momentum are not the same. Resume with that optimizer, or give its posterior "
                    "as the prior."
                )
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            check_prior(group, saved, type(self).__name__)
        check_shapes(self.param_groups, state_dict, type(self).__name__)
        orders = [group["prior_order"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, order in zip(self.param_groups, orders, strict=True):
            group["prior_order"] = order  # which older checkpoints do not have
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if name in COUNTERS else parameter.device
                    self.state[parameter][name] = value.to(device, torch.float32, copy=True)

    @torch.no_grad()
    def precision(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the posterior precision `ess h + S_p` of every trained parameter, by name.

        S_p is the prior's precision, `ess * weight_decay` where no other was given, and h is
        without IVON's damping, which no data have said. The tensors are float32, in 1/weight^2. Of
        sharded parameters they are shards, which `full_tensors` gathers.

        Args:
            named_parameters: As `model.named_parameters()`; those not trained are left out.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        precisions = {}
        for name, p in named_parameters:
            if p in groups and "hess" in self.state.get(p, {}):
                weight_decay = groups[p]["weight_decay"]
                given = self._prior.get(p, (None, weight_decay))[1]
                decay = self.state[p].get("weight_decay", given)
                hess = undamped(self.state[p]["hess"], groups[p])
                precisions[name] = (hess + decay) * groups[p]["ess"]
        return precisions

    @torch.no_grad()
    def health(self, batch_size: float) -> dict[str, float]:
        """Return numbers that tell how much the posterior can be trusted.

        With sharded parameters this is a collective over all shards. Quantiles are of at most
        65,536 entries a tensor, and of as many in all where tensors are sharded.

        Args:
            batch_size: Observations that enter one step, over micro-batches and ranks.

        Returns:
            `init_fraction` = beta2^steps, the share of `hess_init` still in h; `hess_min`,
            `hess_median` and `hess_max`; `bad_entries`, the number of entries where `h + d` is
            not a positive number; `sigma_over_rms`, the posterior deviation over the size of the
            weights, median over matrices that are not zero.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        sharded = any(isinstance(p, DTensor) for p in parameters)
        return posterior_health(self._entries(), self.param_groups[0]["beta2"], sharded)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Norm of the mean over the samples of the gradients since the last step.

        With sharded parameters this is a collective over all shards.
        """
        sampled = self._transient.sampled
        return gradient_norm(sampled, sharded=any(isinstance(p, DTensor) for p in sampled))

    def _entries(self) -> Iterator[Entry]:
        for group in self.param_groups:
            for _, parameter, state in self._trainable(group):
                _, decay = self._prior_of(parameter, group, state)
                yield Entry(parameter, state, decay, group["ess"])
