"""IVON, the improved variational online Newton method (Shen et al., ICML 2024).

One run gives a mean, used like ordinary weights, and a diagonal posterior precision, at about Adam's cost. It
minimises `ess * E_q[mean loss] + KL(q, p)` over Gaussians q, with prior p = N(0, 1 / (ess * weight_decay)).
State lives per parameter, in float32 whatever the parameter's dtype, so mixed dtypes, sharding, resuming and
frozen parameters work by the ordinary means of `torch.optim`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_SLICE = 1 << 17  # elements; the scratch of one slice stays in cache


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
    weight_decay: float,
    clip_radius: float,
    debias: bool,
) -> None:
    """One step of IVON, elementwise and in place on `mean`, `momentum` and `hess`; overwrites `noise_grad`.

        f = ess (h + d) * noise_grad                              curvature seen by the samples
        g <- b1 g + (1 - b1) grad
        h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d))      old h on the right
        m <- m - lr clip( (g / (1 - b1^step) + d m) / (h + d) )         new h

    The last term of the Hessian keeps `h + d` at least half of what it was, for any f.

    Args:
        mean, momentum, hess: float32 state of one shape; weight, mean-loss/weight, mean-loss/weight^2.
        grad: Gradient of the mean loss, averaged over samples.
        noise_grad: `(sample - mean) * gradient`, averaged over samples.
        step: Steps made including this one, for the debiasing of the momentum.
        lr: Already rescaled, if it is to be.
    """
    momentum.lerp_(grad, 1 - beta1)
    curvature = hess + weight_decay
    change = noise_grad.mul_(curvature).mul_(ess).sub_(hess)  # f - h
    hess.add_(change, alpha=1 - beta2)
    hess.addcdiv_(change.square_(), curvature, value=0.5 * (1 - beta2) ** 2)
    correction = 1 - beta1**step if debias else 1.0
    direction = (momentum / correction).add_(mean, alpha=weight_decay).div_(hess + weight_decay)
    if math.isfinite(clip_radius):
        direction.clamp_(-clip_radius, clip_radius)
    mean.sub_(direction, alpha=lr)


class _Sampled(NamedTuple):
    """What the samples of one step have left for one parameter."""

    draws: int
    grad: Tensor
    noise_grad: Tensor


class IVON(torch.optim.Optimizer):
    """IVON as published, with per-parameter float32 state.

        for batch in loader:
            for _ in range(mc_samples):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
            optimizer.step()

    The loss is a mean over the observations that `ess` counts. Clipping and unscaling belong inside the context,
    which takes the gradients when it closes. Replicas (DDP) draw the same noise; shards (DTensor) each their own.

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
        rescale_lr: Multiply `lr` by `hess_init + weight_decay`.
        debias: Divide the momentum by `1 - beta1^step`.
        seed: Of the noise; one stream a (seed, draw, group, shard), so a resumed run continues it.
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
    ) -> None:
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("ess", ess, ess > 0),
            ("hess_init", hess_init, hess_init > 0),
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("clip_radius", clip_radius, clip_radius > 0),
            ("mc_samples", mc_samples, mc_samples >= 1),
        ):
            if not good:
                raise ValueError(f"IVON: {name}={value} is out of range")
        defaults = {
            "lr": lr, "ess": ess, "hess_init": hess_init, "beta1": beta1, "beta2": beta2,
            "weight_decay": weight_decay, "clip_radius": clip_radius, "mc_samples": mc_samples,
            "rescale_lr": rescale_lr, "debias": debias, "seed": seed, "draws": 0,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._samples: dict[Tensor, _Sampled] = {}  # not in `state`: checkpoints hold no scratch
        self._open = False

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Weights drawn from the posterior inside, the exact mean again outside, also after an exception.

            theta = mean + eps / sqrt(ess (h + weight_decay)),   eps ~ N(0, 1)

        Args:
            train: Collect gradient and noise * gradient for `step` when the context closes without exception.
        """
        if self._open:
            raise RuntimeError("sampled_params cannot be nested")
        self._open = True
        saved: list[tuple[Tensor, Tensor]] = []
        completed = False
        try:
            with torch.no_grad():
                for index, group in enumerate(self.param_groups):
                    self._perturb(group, index, saved)
            yield
            completed = True
        finally:
            self._open = False
            with torch.no_grad():
                for parameter, mean in saved:
                    self._restore(parameter, mean, collect=train and completed)

    def _perturb(self, group: dict[str, Any], index: int, saved: list[tuple[Tensor, Tensor]]) -> None:
        group["draws"] += 1  # a scalar of the group, so it is in every checkpoint
        generator: torch.Generator | None = None
        for parameter, state in self._trainable(group):
            weights, hess = _local(parameter), _local(state["hess"])
            if generator is None:
                shard = dist.get_rank() if isinstance(parameter, DTensor) else 0
                generator = torch.Generator(weights.device).manual_seed(
                    _mix(group["seed"], group["draws"], index, shard)
                )
            saved.append((parameter, weights.clone()))
            for w, h in _slices(weights, hess):
                noise = torch.empty_like(h).normal_(generator=generator)
                deviation = (h + group["weight_decay"]).mul_(group["ess"]).rsqrt_()
                w.copy_(noise.mul_(deviation).add_(w))

    def _restore(self, parameter: Tensor, mean: Tensor, *, collect: bool) -> None:
        weights = _local(parameter)
        if collect and parameter.grad is not None:
            gradient = _local(parameter.grad).float()
            # The perturbation that was really applied, rounding included.
            noise_grad = (weights.float() - mean.float()).mul_(gradient)
            before = self._samples.get(parameter)
            if before is None:
                self._samples[parameter] = _Sampled(1, gradient.clone(), noise_grad)
            else:
                self._samples[parameter] = _Sampled(
                    before.draws + 1, before.grad.add_(gradient), before.noise_grad.add_(noise_grad)
                )
        weights.copy_(mean)

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
            scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
            for parameter, state in self._trainable(group):
                sampled = self._samples.pop(parameter, None)
                if sampled is None:
                    continue
                state["step"] += 1
                tensors = (
                    _local(parameter),
                    _local(state["momentum"]),
                    _local(state["hess"]),
                    sampled.grad.div_(sampled.draws),
                    sampled.noise_grad.div_(sampled.draws),
                )
                for weights, momentum, hess, grad, noise_grad in _slices(*tensors):
                    mean = weights if weights.dtype == torch.float32 else weights.float()
                    ivon_update(
                        mean, momentum, hess, grad, noise_grad,
                        step=int(state["step"]), lr=group["lr"] * scale, ess=group["ess"],
                        beta1=group["beta1"], beta2=group["beta2"], weight_decay=group["weight_decay"],
                        clip_radius=group["clip_radius"], debias=group["debias"],
                    )  # fmt: skip
                    if mean is not weights:
                        weights.copy_(mean)
        self._samples.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; the state stays float32, where torch would cast it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name in ("momentum", "hess"):
                value = state_dict["state"].get(index, {}).get(name)
                if value is not None:
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=torch.float32, copy=True)

    def precision(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Posterior precision `ess * (h + weight_decay)` of every trained parameter, float32, 1/weight^2."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        return {
            name: (self.state[p]["hess"] + groups[p]["weight_decay"]) * groups[p]["ess"]
            for name, p in named_parameters
            if p in groups and "hess" in self.state.get(p, {})
        }

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
            for parameter, state in self._trainable(group):
                hess, weights = _local(state["hess"]).flatten(), _local(parameter).float()
                steps = max(steps, int(state["step"]))
                curvature = hess + group["weight_decay"]
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

    def _trainable(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            state = self.state[parameter]
            if "hess" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["hess"] = torch.full_like(parameter, group["hess_init"], dtype=torch.float32)
            yield parameter, state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned flat views of at most `_SLICE` elements; whole tensors where one has no flat view."""
    if tensors[0].numel() <= _SLICE or not all(t.is_contiguous() for t in tensors) or tensors[0].is_cuda:
        yield tensors
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _SLICE):
        yield tuple(t[start : start + _SLICE] for t in flat)


def _mix(*numbers: int) -> int:
    """A 63-bit seed from a few integers, so that neighbouring ones give unrelated streams (splitmix64)."""
    value = 0
    for number in numbers:
        value = (value + 0x9E3779B97F4A7C15 + number) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1
