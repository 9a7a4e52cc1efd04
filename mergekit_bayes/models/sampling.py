"""Draw weights from a stored posterior into a loaded model, so that predictions can be averaged.

    theta_k = mean + eps_k sqrt(T / S),   eps_k ~ N(0, 1)

S is the stored precision at its own scale, that of the loss summed over `ess` observations, and T
multiplies the variance. The record of a fine-tune names a prior and a temperature by which the
draws have the noise of its training (`Predictive`); they are taken where the user names none. Each
draw streams the precision from its file, tensor by tensor, and one copy of the mean is kept, so
that memory does not grow with the number of draws. Parameters without a precision (frozen ones)
stay at the mean.

A bare curvature is not a posterior: its variance is infinite where the data say nothing. Without a
proper prior in S there is nothing to draw from, and the user must name one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field

from mergekit_bayes.checkpoint.codec import is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, resolve
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import ConfigError, NoDrawsError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.models.places import Place, find_places
from mergekit_bayes.posterior import Posterior, PosteriorInfo, Predictive, open_posterior
from mergekit_bayes.records import Frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WIDE = 0.3  # draws further from the mean than this share of a matrix's RMS rarely predict well
_PROPER = 10 * DELTA_0  # the constant that a merge adds against 0/0 is not a prior
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class SamplingReport(Frozen):
    """What was drawn, and how wide.

    Attributes:
        samples: Number of draws.
        seed: Seed of the noise.
        temperature: Factor on the variance of the posterior.
        prior: Prior precision inside S that was drawn from, 1/weight^2.
        given: Whether the user gave that prior in place of the stored one.
        recorded: Whether it is the one that the record names for drawing.
        estimator: Where the curvature comes from, as stored.
        ess: Number of observations by which S is scaled, as stored.
        observations: Number of observations that S stands for, as stored.
        parameters: Number of entries that were drawn.
        held: Number of entries without a precision, which stayed at the mean.
        sigma_over_rms: Median deviation over the RMS of the weights, at the median matrix.
        largest_sigma: Largest deviation, in units of the weights.
        components: Of a mixture, number of draws of each of its components; the numbers on priors,
            data and deviations are those of the first one that is drawn. Others have no such key.
        runs: Of a mixture, what its record calls these components. Others have no such key.
    """

    samples: int
    seed: int
    temperature: float
    prior: float
    given: bool
    recorded: bool = False
    estimator: str | None
    ess: float | None
    observations: float | None
    parameters: int
    held: int
    sigma_over_rms: float
    largest_sigma: float
    components: tuple[int, ...] | None = Field(
        default=None, exclude_if=lambda counts: counts is None
    )
    runs: tuple[str, ...] | None = Field(default=None, exclude_if=lambda runs: runs is None)


# Why nothing is drawn from matrices, in the words of `sampling_obstacle`.
MATRICES = "it has matrices for linear layers, and draws are made entry by entry"


def sampling_obstacle(info: PosteriorInfo | None) -> str | None:
    """Why nothing can be drawn from a precision, judged by its record; None if that is in order.

    The entries themselves are checked when they are drawn.
    """
    if info is not None and info.predictive is not None:
        return None
    return prior_obstacle(info)


def prior_obstacle(info: PosteriorInfo | None) -> str | None:
    """Why a precision as it is stored gives no variance, judged by its record; None if it does."""
    if info is None:
        return "its precision does not say which prior it contains"
    if info.prior.kind == "unknown":
        return (
            "it averages merges whose priors differ, so what prior its precision contains is not "
            "known"
        )
    if info.prior.kind == "none" or info.prior.precision <= _PROPER:
        return "its precision is a bare curvature without a proper prior"
    return None


def open_samplable(
    ref: str, *, precision: str | None = None, prior: float | None = None
) -> Posterior:
    """Open a model whose posterior can be drawn from. Reads headers only.

    Args:
        ref: A folder or `org/name[@revision]`. Of an adapter its own posterior is drawn from, and
            its base stays fixed.
        precision: Another place for the precision: a file or a folder.
        prior: Prior precision in place of the stored one, 1/weight^2.

    Returns:
        The open posterior, which the caller closes.

    Raises:
        NoDrawsError: No precision, or one without a proper prior while `prior` is None.
        PrecisionError: A precision of other weights.
    """
    path = resolve(ref, CHECKPOINT + POSTERIOR)
    adapter = path / _ADAPTER
    is_adapter = (path / _ADAPTER_CONFIG).exists() and adapter.exists()
    with ExitStack() as stack:
        posterior = stack.enter_context(
            open_posterior(str(adapter) if is_adapter else ref, precision=precision)
        )
        if not posterior.has_precision:
            raise NoDrawsError(
                f"no precision for '{ref}' (looked for '{precision_path(posterior.path)}'). "
                f"Fine-tune it with IVON, make one with `bmerge precision {ref} --data TEXTS "
                "--prior X`, name one with --precision PATH, or leave out --samples.",
                reason="it has no precision",
            )
        if posterior.info is not None and posterior.info.mean.blocks != posterior.identity:
            raise PrecisionError(
                f"the precision of '{ref}' was taken at other weights than these: its record of "
                "them differs. Use the precision that belongs to them."
            )
        obstacle = sampling_obstacle(posterior.info)
        if obstacle is not None and prior is None:
            raise NoDrawsError(
                f"'{ref}' cannot be sampled: {obstacle}. Give a prior precision per entry with "
                "--prior X (1/weight^2, on the scale of the summed loss), or leave out --samples.",
                reason=obstacle,
            )
        stack.pop_all()
    return posterior


class PosteriorDraws:
    """Weights drawn into a model, one draw at a time.

        with PosteriorDraws(model, posterior, 16) as draws:
            for k in draws:
                ...  # the model's weights are the k-th draw
        ...          # the exact mean again, also after an exception

    Iterating again gives the same draws. A draw depends only on the seed, its number, the tensor's
    name in the precision file and the kind of device, whose generator is used. So models of one
    architecture get the same noise. In half precision a draw is rounded, and noise below the
    rounding is lost.

    Args:
        model: A loaded model, or any torch module whose parameters have the posterior's names.
        posterior: From `open_samplable`; the caller keeps it open and closes it.
        samples: Number of draws.
        prior: Prior precision in place of the one inside S, 1/weight^2; None for what the record
            says.
        temperature: Factor on the variance of the posterior; None for what the record says, which
            belongs to the record's prior, or 1.
        seed: Seed of the noise.

    Attributes:
        report: What is drawn, and how wide.

    Raises:
        ConfigError: A number out of range.
        MismatchError: A precision whose names or shapes are not the model's.
        PrecisionError: Entries that are negative, not finite, or too small to be drawn from.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        posterior: Posterior,
        samples: int,
        *,
        prior: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        self._given = prior is not None
        recorded = posterior.info.predictive if posterior.info is not None else None
        self._recorded = recorded is not None and not self._given
        prior, temperature = _width(recorded, prior, temperature)
        proper = prior is None or _PROPER < prior < np.inf
        for name, value, is_good, expected in (
            ("samples", samples, samples >= 1, "1 or more"),
            ("prior", prior, proper, f"a number above {_PROPER:g}"),
            ("temperature", temperature, 0 < temperature < np.inf, "a positive number"),
        ):
            if not is_good:
                raise ConfigError(f"{name} {value}: expected {expected}.")
        self._posterior = posterior
        self._samples = samples
        self._temperature = temperature
        self._seed = seed
        self._prior = prior
        self._stored_prior = stored_prior(posterior.info)
        self._places = find_places(model, posterior)
        self._means: list[tuple[Tensor, Tensor]] | None = None  # parameter, copy of its mean
        self.report = self._describe(model)

    def __len__(self) -> int:
        return self._samples

    def __enter__(self) -> Self:
        if self._means is not None:
            raise RuntimeError("these draws are in use already")
        parameters = {id(place.parameter): place.parameter for place in self._places}
        self._means = [(p, p.detach().clone()) for p in parameters.values()]
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        means, self._means = self._means or [], None
        with torch.no_grad():
            for parameter, mean in means:
                parameter.copy_(mean)

    def __iter__(self) -> Iterator[int]:
        for k in range(self._samples):
            self._draw(k)
            yield k

    def _draw(self, k: int) -> None:
        """Write the k-th draw into the model."""
        import torch

        if self._means is None:
            raise RuntimeError("draws need their context: `with PosteriorDraws(...) as draws`")
        means = {id(parameter): mean for parameter, mean in self._means}
        with torch.no_grad():
            for place in self._places:
                weights = place.view(place.parameter)
                dtype = torch.promote_types(weights.dtype, torch.float32)
                seed = _noise_seed(self._seed, k, place.name)
                generator = torch.Generator(weights.device).manual_seed(seed)
                noise = torch.empty(place.shape, dtype=dtype, device=weights.device)
                noise.normal_(generator=generator)
                deviation = torch.from_numpy(self._deviation(place)).to(noise)
                mean = place.view(means[id(place.parameter)])
                weights.copy_(noise.mul_(deviation).add_(mean))

    def _deviation(self, place: Place) -> Array:
        """sqrt(T / S), in a shape that broadcasts to the tensor's."""
        source = self._posterior.precision
        assert source is not None
        stored = read_tensor(source, place.name)
        bad = int(np.count_nonzero(is_bad_precision(stored)))
        if bad:
            raise PrecisionError(
                f"{source.where(place.name)}: the precision of '{place.name}' has {bad} entries "
                "that are negative or not finite. Estimate it again."
            )
        precision = stored
        if self._prior is not None:
            precision = np.maximum(stored - self._stored_prior, 0) + self._prior
        flat = int(np.count_nonzero(precision <= _PROPER))
        if flat:
            raise PrecisionError(
                f"{source.where(place.name)}: the precision of '{place.name}' has {flat} entries "
                f"of {_PROPER:g} or less, which have no width to draw from. Give a prior precision "
                "per entry with --prior X (1/weight^2)."
            )
        # The square root of a tensor without axes is a number, which must become an array again.
        return np.asarray(np.sqrt(np.float32(self._temperature) / precision))

    def _describe(self, model: "torch.nn.Module") -> SamplingReport:
        ratios, largest, drawn = [], 0.0, 0
        for place in self._places:
            deviation = self._deviation(place)
            weights = place.view(place.parameter.detach())
            drawn += weights.numel()
            if not weights.numel():
                continue
            largest = max(largest, float(deviation.max()))
            rms = float(weights.float().square().mean().sqrt())
            if rms > 0 and weights.ndim > 1:  # biases are near zero and would always alarm
                flat = deviation.reshape(-1)
                ratios.append(float(np.median(flat[:: max(1, flat.size // 65536)])) / rms)
        info = self._posterior.info
        return SamplingReport(
            samples=self._samples,
            seed=self._seed,
            temperature=self._temperature,
            prior=self._stored_prior if self._prior is None else self._prior,
            given=self._given,
            recorded=self._recorded,
            estimator=info.estimator if info else None,
            ess=info.ess if info else None,
            observations=info.observations if info else None,
            parameters=drawn,
            held=sum(p.numel() for p in model.parameters()) - drawn,
            sigma_over_rms=float(np.median(ratios)) if ratios else 0.0,
            largest_sigma=largest,
        )


def _width(
    recorded: Predictive | None, prior: float | None, temperature: float | None
) -> tuple[float | None, float]:
    """Prior and temperature to draw with: those given, else those of the record."""
    if recorded is not None and prior is None:
        return recorded.prior, recorded.temperature if temperature is None else temperature
    return prior, 1.0 if temperature is None else temperature


def stored_prior(info: PosteriorInfo | None) -> float:
    """The prior precision that every entry of S contains; 0 where that is not one number."""
    if info is None or info.prior.kind not in ("isotropic", "base"):
        return 0.0
    return info.prior.precision


def _noise_seed(seed: int, k: int, name: str) -> int:
    """A 63-bit seed for one draw of one tensor."""
    digest = hashlib.sha256(f"{seed}\0{k}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
