"""What the optimizers of this folder share: noise, prior, exact restore and float32 state.

All of them keep, per parameter, the mean (the parameter itself, or a float32 master beside one of fewer bits), a
momentum and the Hessian diagonal h of the mean loss, so that the posterior is N(mean, 1 / (ess (h + d))) with d the
prior's precision over ess.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

Prior = Mapping[Tensor, tuple[Tensor | None, Tensor | float | None]]

_SLICE = 1 << 18  # elements; on a CPU the scratch of one slice stays in cache
_GPU_SLICE = 1 << 24  # and on a GPU it does not grow with the largest embedding
_PERIOD = 1 << 17  # of the random factors of a checksum, which checkpoints hold
TRAIN, PREDICT = 0, 1  # streams of noise
_MARKS = {"mc_samples", "rho"}  # settings by which checkpoints of different optimizers are told apart
_COUNTERS = ("step", "estimates")  # of `state`, on the CPU as in torch's optimizers


class Draw(NamedTuple):
    """One draw of the noise by name, so that it can be made again."""

    stream: int
    number: int
    sample: int
    sign: float


@dataclass(slots=True)
class Moved:
    """A parameter while it is away from its mean."""

    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    index: tuple[int, int]
    draw: Draw | None
    saved: Tensor | None = None  # a buffer for the mean, where nothing else holds it
    noise: Tensor | None = None  # the noise drawn, where rounded weights do not tell it
    moved: int = 0  # entries that have left the mean, which is in `saved` or to be found by subtraction
    restored: int = 0  # entries that have been put back, where that goes slice by slice

    def leave(self, weights: Tensor, saved: Tensor | None) -> None:
        """To be called before a slice of the weights is changed."""
        if saved is not None:
            saved.copy_(weights)
        self.moved += max(1, weights.numel())  # an empty shard is put back like those of the other ranks


class PosteriorOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that leave a diagonal Gaussian posterior.

    Training noise is a function of (seed, step, sample, group, parameter, place): a resumed run continues it, a step
    that is made again gets it again, and draws for prediction do not disturb it. Replicas (DDP) draw the same noise,
    shards (DTensor) each their own, and with IVON's `rank_noise` every rank for training. Where `fused` can
    draw it, it is the same on every processor; on GPUs, without numba and for tensors that are not contiguous it comes
    from torch's generators.

    Args:
        params: Parameters or groups; frozen ones are left alone.
        defaults: Of every group; `ess`, `weight_decay`, `hess_init` and `seed` are used here.
        prior: Centre (None is zero) and precision in 1/weight^2 (None is `ess * weight_decay`) of parameters, of
            their shape or a number. Not part of `state_dict`: give it again to resume, which is checked.
        restore: `copy` keeps the mean while the weights are sampled; `redraw` draws the noise again and subtracts it.
    """

    antithetic: bool = False
    _uses_noise: bool = False  # whether the update needs the noise beside the gradient
    restore: str = "copy"
    _mark: str | None = None  # the setting in `_MARKS` that it alone has
    _settings: tuple[str, ...] = ("antithetic", "restore", "_prior")  # what a copy keeps beside torch's own

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, prior: Prior | None = None, restore: str = "copy"
    ) -> None:
        super().__init__(params, {**defaults, "steps": 0, "draws": 0, "prior_sum": 0.0, "prior_order": 0.0})
        if restore not in ("copy", "redraw"):
            raise ValueError(f"{type(self).__name__}: restore={restore!r} is neither 'copy' nor 'redraw'")
        self.restore = restore
        self._prior: dict[Tensor, tuple[Tensor | None, Tensor | float]] = {}
        self._clear()
        left = dict(prior or {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in left:
                    self._prior[parameter] = _entry(parameter, *left.pop(parameter), group, type(self).__name__)
                    size, order = _checksums(self._prior[parameter])
                    group["prior_sum"] += size
                    group["prior_order"] += order * (2 + math.sin(len(self._prior)))  # of parameters too
        if left:
            shapes = [tuple(p.shape) for p in left]
            raise ValueError(f"{type(self).__name__}: the prior names tensors that are not optimized, of {shapes}")

    def _clear(self) -> None:
        """Drop the scratch, which no checkpoint holds."""
        self._samples: dict[Tensor, Any] = {}
        self._sample = 0  # samples taken since the last step
        self._open = False
        self._medians: dict[Tensor, float] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clear()

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Weights drawn from the posterior inside, the mean again outside, also after an exception.

            theta = mean + eps / sqrt(ess (h + d)),   eps ~ N(0, 1)

        Args:
            train: Take the gradients for `step` (`.grad` is None then) when the context closes without exception.
        """
        self._check_parameters()
        draw = self._next_draw(train)
        taking = False
        try:
            with self._away(self._perturb, self._take if train else None, draw):
                yield
                taking = train
            self._sample += train
        except BaseException:
            if taking:
                self._forget_samples()  # or what was taken before an interrupt would count twice
            raise

    def _forget_samples(self) -> None:
        """Forget the samples of the step."""
        self._samples.clear()
        self._sample = 0

    def _check_parameters(self) -> None:
        """Raise for parameters that do not go with the settings; a launcher may exchange them after construction."""
        known = {p for group in self.param_groups for p in group["params"]} if self._prior else set()
        if any(p not in known for p in self._prior):
            raise ValueError(
                f"{type(self).__name__}: the prior names parameters that were replaced since (by shards of them?). "
                "Make the optimizer from the parameters that are trained, after sharding."
            )

    def _next_draw(self, train: bool) -> Draw:
        if not train:
            for group in self.param_groups:
                group["draws"] += 1
            return Draw(PREDICT, self.param_groups[0]["draws"], 0, 1.0)
        number = self.param_groups[0]["steps"]
        if self.antithetic:
            return Draw(TRAIN, number, self._sample // 2, -1.0 if self._sample % 2 else 1.0)
        return Draw(TRAIN, number, self._sample, 1.0)

    @contextmanager
    def _away(
        self, move: Callable[[Moved], None], take: Callable[[Moved], None] | None, draw: Draw | None
    ) -> Iterator[None]:
        """Parameters moved inside and restored outside; `take` sees those with a gradient before that."""
        if self._open:
            raise RuntimeError("sampled_params cannot be nested")
        moved: list[Moved] = []
        try:
            self._open = True
            with torch.no_grad():
                for g, group in enumerate(self.param_groups):
                    for p, parameter, state in self._trainable(group):
                        at = Moved(parameter, group, state, (g, p), draw)
                        if "mean" in state:
                            _adopt(local(parameter), local(state["mean"]))
                        elif self.restore == "copy" or draw is None:
                            at.saved = self._buffer(parameter, local(parameter))
                        moved.append(at)
                        move(at)
            yield
            with torch.no_grad():
                for at in moved:
                    if take is not None and at.parameter.grad is not None:
                        take(at)
        finally:
            try:
                self._restore_all(moved)
            finally:
                self._open = False

    def _buffer(self, parameter: Tensor, like: Tensor) -> Tensor:
        """A third tensor of the parameter's size, between steps kept in `_buffers` on a CPU.

        Fresh memory is zeroed page by page when it is touched, which costs as much as the noise.
        """
        buffer = self._buffers.pop(parameter, None)
        kind = (like.dtype, like.device, like.shape, like.stride())
        if buffer is not None and (buffer.dtype, buffer.device, buffer.shape, buffer.stride()) == kind:
            return buffer
        return torch.empty_like(like)

    def _keep_buffer(self, parameter: Tensor, buffer: Tensor) -> None:
        # Memory of others torch keeps itself; a tensor of inference mode could not be written to outside of it.
        if buffer.device.type == "cpu" and self.restore == "copy" and not buffer.is_inference():
            self._buffers[parameter] = buffer

    def _perturb(self, at: Moved) -> None:
        weights = local(at.parameter)
        if "mean" not in at.state:
            for noise, w, saved in self._noise(at, weights, at.saved):
                at.leave(w, saved)
                w.add_(noise)
            return
        mean = local(at.state["mean"])
        if self._uses_noise and self.restore == "copy" and at.draw is not None and at.draw.stream == TRAIN:
            at.noise = self._buffer(at.parameter, mean)
        for noise, w, m, kept in self._noise(at, weights, mean, at.noise):
            if kept is not None:
                kept.copy_(noise)
            w.copy_(noise.add_(m))

    def _restore_all(self, moved: list[Moved]) -> None:
        """All of them, also if Ctrl-C comes meanwhile, which is raised again at the end."""
        interrupt: BaseException | None = None
        while moved:
            try:
                with torch.no_grad():
                    self._restore(moved[-1])
                moved.pop()
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _restore(self, at: Moved) -> None:
        weights = local(at.parameter)
        if "mean" in at.state:
            weights.copy_(local(at.state["mean"]))
        elif at.saved is not None:
            if at.moved >= weights.numel() and not at.restored:
                weights.copy_(at.saved)
            elif at.restored < at.moved:  # slice by slice, of flat tensors, and interrupted
                part = slice(at.restored, at.moved)
                weights.view(-1)[part].copy_(at.saved.view(-1)[part])
            self._keep_buffer(at.parameter, at.saved)
        elif at.restored < at.moved:
            done = 0
            for noise, w in self._noise(at, weights):
                if done >= at.restored and at.restored < at.moved:
                    w.sub_(noise)
                    at.restored += max(1, w.numel())
                done += w.numel()

    def _take(self, at: Moved) -> None:
        """Add the gradient to those of the step."""
        raise NotImplementedError

    def _noise(self, at: Moved, *others: Any) -> Iterator[tuple[Any, ...]]:
        """The noise in scratch, slice by slice, with the slices of other tensors."""
        assert at.draw is not None
        hess, draw = local(at.state["hess"]), at.draw
        seed = mix(at.group["seed"], draw.stream, draw.number, draw.sample, *at.index, self._place(at))
        # Before the first estimate nothing is known of the curvature, and the sample is the mean itself.
        factor = draw.sign / at.group["ess"] ** 0.5 if at.state.get("estimates", 1) else 0.0
        _, decay = self._prior_of(at.parameter, at.group, at.state)
        passes = fused_passes(hess, decay)
        generator = None if passes else self._generator(hess.device, seed)
        scratch, start = torch.empty(0), 0
        for h, d, *rest in slices(hess, decay, *others):
            if scratch.shape != h.shape or not start:
                scratch = torch.empty_like(h)
            if not factor:
                scratch.zero_()
            elif passes is not None:
                passes.noise(scratch, h, d, factor, seed, start)
            else:
                scratch.normal_(generator=generator).mul_(torch.add(h, d).rsqrt_()).mul_(factor)
            start += h.numel()
            yield scratch, *rest

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(seed)

    def _place(self, at: Moved) -> int:
        """Which of several draws of a parameter's noise is this rank's."""
        return _shard(at.parameter)

    def _prior_of(
        self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | float]:
        """Centre and precision over ess."""
        centre, decay = self._prior.get(parameter, (None, float(group["weight_decay"])))
        if "weight_decay" in state:  # adapted
            decay = state["weight_decay"]
        return (None if centre is None else local(centre)), (local(decay) if isinstance(decay, Tensor) else decay)

    def _typical_decay(self, parameter: Tensor, group: dict[str, Any]) -> float:
        """The median of the prior's precision over ess, where it has one for every entry."""
        decay = self._prior.get(parameter, (None, group["weight_decay"]))[1]
        if not isinstance(decay, Tensor):
            return float(decay)
        if parameter not in self._medians:
            self._medians[parameter] = float((decay.full_tensor() if isinstance(decay, DTensor) else decay).median())
        return self._medians[parameter]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the state stays float32, where torch would cast it to the parameters' dtype.

        Raises:
            ValueError: The run was made with another `prior` than this optimizer has, or with another optimizer.
        """
        for group in state_dict["param_groups"]:
            # One of parameters alone is what torch.distributed.checkpoint makes of a group that it has not found.
            if set(group) != {"params"} and (_MARKS & set(group) != {self._mark} & _MARKS or "ess" not in group):
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint is another optimizer's, whose h and momentum are not the "
                    "same. Resume with that optimizer, or give its posterior as the prior."
                )
        for here, there in zip(self.param_groups, state_dict["param_groups"], strict=False):
            size = max(abs(here["prior_sum"]), abs(there.get("prior_sum", 0.0)))
            for name, unknown in (("prior_sum", 0.0), ("prior_order", here["prior_order"])):
                mine, theirs = here[name], there.get(name, unknown)
                if abs(mine - theirs) > 1e-5 * size:
                    raise ValueError(
                        f"{type(self).__name__}: the checkpoint was made with another prior (checksum {theirs:.9g}, "
                        f"here {mine:.9g}). It is not part of state_dict: give the same `prior` to the constructor."
                    )
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
                if name in _COUNTERS:
                    self.state[parameter][name] = value.to(device="cpu", dtype=torch.float32, copy=True)
                elif isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    def precision(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Posterior precision `ess h + S_p` of every trained parameter, float32, 1/weight^2.

        S_p is the prior's precision, `ess * weight_decay` where no other was given. Of sharded parameters these are
        shards; `full_tensors` makes them whole.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        found = {}
        for name, p in named_parameters:
            if p in groups and "hess" in self.state.get(p, {}):
                decay = self.state[p].get("weight_decay", self._prior.get(p, (None, groups[p]["weight_decay"]))[1])
                found[name] = (self.state[p]["hess"] + decay) * groups[p]["ess"]
        return found

    @torch.no_grad()
    def health(self, batch_size: float) -> dict[str, float]:
        """How much the posterior can be trusted; with sharded parameters a collective over all shards.

        Args:
            batch_size: Observations that enter one step, over micro-batches and ranks.

        Returns:
            `init_fraction` = beta2^steps, the share of `hess_init` still in h; `hess_min`, `hess_median`, `hess_max`;
            `bad_entries`, where `h + d` is not a positive number; `sigma_over_rms`, the median over matrices of
            posterior deviation to weight size, with matrices of zeros left out.
            Quantiles are from at most 65,536 entries a tensor, where it is sharded as many in all.
        """
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
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            values, ratios, bad = _of_all_shards(values, ratios, bad)
        return {
            "init_fraction": self.param_groups[0]["beta2"] ** steps,
            "hess_min": float(values.min()),
            "hess_median": float(values.median()),
            "hess_max": float(values.max()),
            "bad_entries": float(bad),
            "sigma_over_rms": sorted(ratios)[len(ratios) // 2] if ratios else 0.0,
        }

    def _trainable(self, group: dict[str, Any]) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad:
                continue
            state = self.state[parameter]
            if "hess" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["hess"] = torch.full_like(parameter, group["hess_init"], dtype=torch.float32)
            if "mean" not in state and parameter.dtype.itemsize < 4:
                state["mean"] = parameter.detach().to(torch.float32, copy=True)
            yield index, parameter, state


def newton_step(
    mean: Tensor, momentum: Tensor, hess: Tensor, *, lr: float, correction: float, weight_decay: float | Tensor,
    prior_mean: Tensor | None, clip_radius: float, scratch: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Move the mean in place; two buffers are overwritten.

    m <- m - lr clip( (momentum / correction + d (m - m_p)) / (h + d) )
    """
    # The correction is left out of the direction and put into its bound and factor, which saves a pass.
    pull = mean if prior_mean is None else torch.sub(mean, prior_mean)
    if isinstance(weight_decay, Tensor):
        direction = torch.addcmul(momentum, pull, weight_decay, value=correction, out=scratch[0])
    else:
        direction = torch.add(momentum, pull, alpha=weight_decay * correction, out=scratch[0])
    direction.div_(torch.add(hess, weight_decay, out=scratch[1]))
    if math.isfinite(clip_radius):
        direction.clamp_(-clip_radius * correction, clip_radius * correction)
    mean.sub_(direction, alpha=lr / correction)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shards made whole, on the CPU of rank 0; other ranks, which must call this too, get an empty dict.

    One tensor after the other, so that no device holds more than one whole. Under `fully_shard`, mean and posterior:

        mean = full_tensors(model.state_dict())
        precision = full_tensors(optimizer.precision(model.named_parameters()))
    """
    main = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if main:
            found[name] = whole.detach().to("cpu", copy=True)
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_gradient(parameter: Tensor) -> Tensor:
    """Take the gradient away from the parameter, so that no later backward changes it."""
    assert parameter.grad is not None
    gradient = local(parameter.grad)
    parameter.grad = None
    if gradient.untyped_storage().nbytes() > gradient.nbytes or not gradient.is_contiguous():
        return gradient.clone()  # a view, of a bucket of DDP say
    return gradient


def wide(gradient: Tensor) -> Tensor:
    """In float32 at least, to add to it."""
    return gradient.float() if gradient.dtype.itemsize < 4 else gradient


def slices(*items: Any) -> Iterator[tuple[Any, ...]]:
    """Aligned flat views of so many elements; numbers, None and scalars pass; whole where one is not flat."""
    tensors = [t for t in items if isinstance(t, Tensor) and t.ndim > 0]
    size = _SLICE if all(t.device.type == "cpu" for t in tensors) else _GPU_SLICE
    if not tensors or tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        yield items
        return
    flat = [t.view(-1) if isinstance(t, Tensor) and t.ndim > 0 else t for t in items]
    for start in range(0, tensors[0].numel(), size):
        yield tuple(t[start : start + size] if isinstance(t, Tensor) and t.ndim > 0 else t for t in flat)


@cache
def _fused() -> Any:
    try:
        return import_module("mergekit_bayes.optim.fused")
    except ImportError:  # numba is missing, or does not go with what else is installed
        return None


def fused_passes(*items: Any) -> Any:
    """The module of compiled passes if it is there and fits all of the tensors, else None.

    Args:
        items: A tensor, others of its shape, and numbers, which may be tensors without dimensions.
    """
    fused = _fused()
    tensors = [t for i, t in enumerate(items) if isinstance(t, Tensor) and (i == 0 or t.ndim > 0)]
    return fused if fused and fused.fits(*tensors) else None


def mix(*numbers: int) -> int:
    """A 63-bit seed from a few integers, so that neighbouring ones give unrelated streams (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value + 0x9E3779B97F4A7C15 + number) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


def in_range(optimizer: str, rules: Iterable[tuple[str, float, bool]]) -> None:
    """Refuse the first setting whose rule is False."""
    for name, value, good in rules:
        if not good:
            raise ValueError(f"{optimizer}: {name}={value} is out of range")


def _of_all_shards(values: Tensor, ratios: list[float], bad: int) -> tuple[Tensor, list[float], int]:
    """What `health` has found on each rank, put together; of replicas too, which changes no median."""
    few = max(1, values.numel() // 65536)
    mine = (torch.cat([values[::few], values.min()[None], values.max()[None]]).cpu(), ratios, bad)
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return torch.cat([t[0] for t in theirs]), [r for t in theirs for r in t[1]], sum(t[2] for t in theirs)


def _shard(parameter: Tensor) -> int:
    """Which shard of the parameter this rank holds; replicas of a shard agree."""
    if not isinstance(parameter, DTensor):
        return 0
    place = 0
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            mesh = parameter.device_mesh
            place = place * mesh.size(dim) + mesh.get_local_rank(dim)
    return place


def _adopt(weights: Tensor, mean: Tensor) -> None:
    """Let the master follow weights that somebody else has changed, after loading a model say."""
    for w, m in slices(weights, mean):
        m.copy_(torch.where(m.to(w.dtype) == w, m, w.float()))


def _entry(
    parameter: Tensor, centre: Tensor | None, precision: Tensor | float | None, group: dict[str, Any], who: str
) -> tuple[Tensor | None, Tensor | float]:
    """Centre and precision over ess, float32, laid out like the parameter."""
    for name, value in (("mean", centre), ("precision", precision)):
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(f"{who}: the prior's {name} is {list(value.shape)}, its parameter {list(parameter.shape)}")
        if value is not None and not bool(torch.as_tensor(value).isfinite().all()):
            raise ValueError(f"{who}: the prior's {name} has entries that are not finite")
    if precision is not None and bool((torch.as_tensor(precision) < 0).any()):
        raise ValueError(f"{who}: the prior's precision has negative entries")
    if precision is None:
        decay: Tensor | float = group["weight_decay"]
    elif isinstance(precision, Tensor):
        decay = _like(precision, parameter) / group["ess"]
    else:
        decay = precision / group["ess"]
    return (None if centre is None else _like(centre, parameter)), decay


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.detach().to(device=parameter.device, dtype=torch.float32)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value if isinstance(value, DTensor) else value.contiguous()


def _checksums(entry: tuple[Tensor | None, Tensor | float]) -> tuple[float, float]:
    """Size of a prior, and a number that changes with sign and order of its entries; the same however it is sharded."""
    size, order = 1.0, 0.0
    for weight, value in zip((0.5, 1.0), entry, strict=True):
        if isinstance(value, Tensor):
            norm, scattered = _norm_and_order(value)
            size += weight * norm
            order += weight * scattered
        elif value is not None:
            size += weight * abs(value)
    return size, order


def _norm_and_order(value: Tensor) -> tuple[float, float]:
    """Euclidean norm, and a sum of about that size with a random factor for every position."""
    flat = (value.full_tensor() if isinstance(value, DTensor) else value).reshape(-1)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(min(_PERIOD, flat.numel()), generator=generator, dtype=torch.float64).to(flat.device)
    squares = scattered = torch.zeros((), dtype=torch.float64, device=flat.device)
    for k, piece in enumerate(torch.split(flat, _PERIOD)):
        wide_piece = piece.double()
        squares = squares + wide_piece.square().sum()
        scattered = scattered + wide_piece.dot(factors[: piece.numel()]) * (2 + math.sin(k))
    return float(squares) ** 0.5, float(scattered)
