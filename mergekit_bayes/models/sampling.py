"""Weights drawn from a stored posterior into a loaded model, so that predictions can be averaged
over them.

    theta_k = mean + eps_k sqrt(T / S),   eps_k ~ N(0, 1)

S is the stored precision on its own scale, that of the summed loss (`ess` observations); T
multiplies the variance. A precision is streamed from its file tensor by tensor for every draw, and
one copy of the mean is kept, so that memory does not grow with the number of draws. Parameters
without a precision (frozen ones) stay at the mean.

A bare curvature is no posterior: where the data say nothing its variance is infinite. Without a
proper prior in S there is nothing to draw from, and a person must give one.
"""

import hashlib
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.sources import CHECKPOINT, POSTERIOR, resolve
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0, is_bad_precision
from mergekit_bayes.models.places import Place, find_places
from mergekit_bayes.posterior import Posterior, PosteriorInfo, open_posterior
from mergekit_bayes.records import Config

if TYPE_CHECKING:
    from torch import Tensor


WIDE = 0.1  # draws further from the mean than this share of a matrix's RMS rarely predict well
_PROPER = 10 * DELTA_0  # the constant that a merge adds against 0/0 is no prior
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class SamplingReport(Config):
    """What was drawn.

    Attributes:
        prior: Prior precision inside S that was drawn from, 1/weight^2.
        given: True if a person gave that prior in place of the stored one.
        temperature: Variance over that of the posterior.
        estimator, ess, observations: As stored; `ess` is the count by which S is scaled.
        parameters: Drawn entries.
        held: Entries without a precision, which stayed at the mean.
        sigma_over_rms: Median deviation over the RMS of the weights, at the median matrix.
        largest_sigma: In weights.
    """

    samples: int
    seed: int
    temperature: float
    prior: float
    given: bool
    estimator: str | None
    ess: float | None
    observations: float | None
    parameters: int
    held: int
    sigma_over_rms: float
    largest_sigma: float


def not_samplable(info: PosteriorInfo | None) -> str | None:
    """Why nothing can be drawn from a precision of which this is known, or None. Its entries are
    judged when drawn.
    """
    if info is None:
        return "its precision does not say which prior it contains"
    if info.prior.kind == "unknown":
        return "it averages merges whose priors differ, so what prior its precision contains is not known"
    if info.prior.kind == "none" or info.prior.precision <= _PROPER:
        return "its precision is a bare curvature without a proper prior"
    return None


def open_samplable(
    ref: str, *, precision: str | None = None, prior: float | None = None
) -> Posterior:
    """Open a model whose posterior can be drawn from. Reads headers only.

    Args:
        ref: A folder or `org/name[@revision]`; of an adapter its own posterior, its base stays
            fixed.
        precision: Another place for the precision: a file or a folder.
        prior: Prior precision in place of the stored one, 1/weight^2.

    Raises:
        PrecisionError: No precision, one of other weights, or one without a proper prior while
            `prior` is None.
    """
    path = resolve(ref, CHECKPOINT + POSTERIOR)
    adapter = path / _ADAPTER
    place = str(adapter) if (path / _ADAPTER_CONFIG).exists() and adapter.exists() else ref
    posterior = open_posterior(place, precision=precision)
    try:
        if not posterior.has_precision:
            raise PrecisionError(
                f"no precision for '{ref}' (looked for '{precision_path(posterior.path)}'). "
                "Fine-tune it with IVON, "
                f"make one with `bmerge precision {ref} --data TEXTS --prior X`, name one with "
                "--precision PATH, or "
                "leave out --samples."
            )
        if posterior.info is not None and posterior.info.mean.blocks != posterior.identity:
            raise PrecisionError(
                f"the precision of '{ref}' was taken at other weights than these: its record of "
                "them differs. "
                "Use the precision that belongs to them."
            )
        reason = not_samplable(posterior.info)
        if reason is not None and prior is None:
            raise PrecisionError(
                f"'{ref}' cannot be sampled: {reason}. Give a prior precision per entry with "
                "--prior X (1/weight^2, "
                "on the scale of the summed loss), or leave out --samples."
            )
        return posterior
    except BaseException:
        posterior.close()
        raise


class PosteriorDraws:
    """Weights drawn into a model, one draw at a time.

        with PosteriorDraws(model, posterior, 16) as draws:
            for k in draws:
                ...  # the model's weights are the k-th draw
        ...          # the exact mean again, also after an exception

    Iterating again gives the same draws. Each depends on the seed, its number and the tensor's name
    in the precision only (and on the kind of device, whose generator is used), so models of one
    architecture see the same noise. In half precision a draw is rounded, and noise below the
    rounding is lost.

    Args:
        model: A loaded model, or any torch module whose parameters bear the posterior's names.
        posterior: From `open_samplable`; stays open and belongs to the caller.
        samples: K, how many draws.
        prior: Precision in place of the prior inside S, 1/weight^2.
        temperature: Variance over that of the posterior.
        seed: Of the noise.

    Raises:
        ConfigError: A number out of range.
        MismatchError: A precision whose names or shapes are not the model's.
        PrecisionError: Entries that are negative, not finite, or too small to be drawn from.
    """

    def __init__(
        self,
        model: Any,
        posterior: Posterior,
        samples: int,
        *,
        prior: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        for name, value, good, least in (
            ("samples", samples, samples >= 1, "1 or more"),
            (
                "prior",
                prior,
                prior is None or _PROPER < prior < np.inf,
                f"a number above {_PROPER:g}",
            ),
            ("temperature", temperature, 0 < temperature < np.inf, "a positive number"),
        ):
            if not good:
                raise ConfigError(f"{name} {value}: expected {least}.")
        self._posterior, self._samples, self._temperature, self._seed = (
            posterior,
            samples,
            temperature,
            seed,
        )
        self._prior = prior
        inside = posterior.info.prior if posterior.info is not None else None
        self._contained = (
            inside.precision if inside is not None and inside.kind in ("isotropic", "base") else 0.0
        )
        self._places = find_places(model, posterior)
        self._saved: list[tuple[Tensor, Tensor]] | None = None
        self.report = self._describe(model)

    def __len__(self) -> int:
        return self._samples

    def __enter__(self) -> Self:
        if self._saved is not None:
            raise RuntimeError("these draws are in use already")
        self._saved = [
            (p, p.detach().clone())
            for p in {id(x.parameter): x.parameter for x in self._places}.values()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch

        saved, self._saved = self._saved or [], None
        with torch.no_grad():
            for parameter, mean in saved:
                parameter.copy_(mean)

    def __iter__(self) -> Iterator[int]:
        for k in range(self._samples):
            self._put(k)
            yield k

    def _put(self, k: int) -> None:
        import torch

        if self._saved is None:
            raise RuntimeError("draws need their context: `with PosteriorDraws(...) as draws`")
        means = {id(parameter): mean for parameter, mean in self._saved}
        with torch.no_grad():
            for place in self._places:
                weights = place.view(place.parameter)
                kind = torch.promote_types(weights.dtype, torch.float32)
                generator = torch.Generator(weights.device).manual_seed(
                    _stream(self._seed, k, place.name)
                )
                noise = torch.empty(place.shape, dtype=kind, device=weights.device).normal_(
                    generator=generator
                )
                deviation = torch.from_numpy(self._deviation(place)).to(noise)
                weights.copy_(noise.mul_(deviation).add_(place.view(means[id(place.parameter)])))

    def _deviation(self, place: "Place") -> Array:
        """sqrt(T / S) in a shape that broadcasts to the tensor's."""
        source = self._posterior.precision
        assert source is not None
        stored = read_tensor(source, place.name)
        bad = int(np.count_nonzero(is_bad_precision(stored)))
        if bad:
            raise PrecisionError(
                f"{source.where(place.name)}: the precision of '{place.name}' has {bad} entries "
                "that are negative or "
                "not finite. Make it anew."
            )
        precision = (
            stored if self._prior is None else np.maximum(stored - self._contained, 0) + self._prior
        )
        flat = int(np.count_nonzero(precision <= _PROPER))
        if flat:
            raise PrecisionError(
                f"{source.where(place.name)}: the precision of '{place.name}' has {flat} entries "
                f"of {_PROPER:g} or "
                "less, which have no width to draw from. Give a prior precision per entry with "
                "--prior X (1/weight^2)."
            )
        return np.asarray(
            np.sqrt(np.float32(self._temperature) / precision)
        )  # a scalar tensor stays an array

    def _describe(self, model: Any) -> SamplingReport:
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
            prior=self._contained if self._prior is None else self._prior,
            given=self._prior is not None,
            estimator=info.estimator if info else None,
            ess=info.ess if info else None,
            observations=info.observations if info else None,
            parameters=drawn,
            held=sum(p.numel() for p in model.parameters()) - drawn,
            sigma_over_rms=float(np.median(ratios)) if ratios else 0.0,
            largest_sigma=largest,
        )


def _stream(seed: int, k: int, name: str) -> int:
    """A 63-bit seed of its own for each draw and tensor."""
    digest = hashlib.sha256(f"{seed}\0{k}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
