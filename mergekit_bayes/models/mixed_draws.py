"""Draw weights from a mixture into a loaded model: first a component, then from its posterior.

    theta_k = m_c + eps_k sqrt(T / S_c),   c ~ pi,   eps_k ~ N(0, 1)

The components of K draws are taken by one number u that is uniform in [0, 1): draw k is of the one
whose range of cumulated weights holds (k + u) / K. Each draw has component c with probability pi_c,
as if drawn by itself, and the shares are as near to the weights as K draws allow.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.draws import mix
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.places import find_parameters
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.mixture import OpenComponent, open_components, read_mixture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHOICE = 0  # number of the seed that chooses components; those of their noise follow


def open_samplable_components(
    plain: Posterior, stack: ExitStack, *, precision: str | None = None, prior: float | None = None
) -> tuple[OpenComponent, ...]:
    """Open the components of a mixture whose posteriors can be drawn from.

    Args:
        plain: The mixture's plain model, from `open_samplable`.
        stack: Closes the other components.
        precision: Another place for the precision, which a mixture cannot have.
        prior: As of `open_samplable`.

    Returns:
        Its components in order; none for any other model, and for a mixture of one.

    Raises:
        CheckpointError: The record of the mixture cannot be read, or a component is missing.
        ConfigError: A precision was named.
        MismatchError: A component has other weights than the record says.
        PrecisionError: A component cannot be drawn from.
    """
    mixture = read_mixture(plain.path)
    if mixture is None or len(mixture.components) == 1:
        return ()
    if precision is not None:
        raise ConfigError(
            f"--precision {precision}: '{plain.ref}' is a mixture, and each of its runs has a "
            "precision of its own. Drop it."
        )
    components = open_components(mixture, plain, stack)
    for component in components:
        open_samplable(component.posterior.ref, prior=prior).close()
    return components


class MixtureDraws:
    """Weights of a mixture drawn into a model; used as `PosteriorDraws`.

    The draws come component by component, whose means are read from their files one tensor at a
    time. Two copies of the model's parameters are kept: its own weights, and the component's mean.

    Args:
        model: A loaded model.
        components: From `open_samplable_components`; the caller keeps them open.
        samples: Number of draws.
        prior: As of `PosteriorDraws`; so are those that follow.
        temperature: Factor on the variance of each posterior.
        seed: Seed of the components and of the noise.

    Attributes:
        report: What is drawn from the first component that is drawn, and how many of each.

    Raises:
        ConfigError: A number out of range.
        MismatchError: A component whose names or shapes are not the model's.
        PrecisionError: Entries that cannot be drawn from.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        components: Sequence[OpenComponent],
        samples: int,
        *,
        prior: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if samples < 1:
            raise ConfigError(f"samples {samples}: expected 1 or more.")
        self._model, self._samples = model, samples
        self._components = components
        weights = [component.weight for component in components]
        self.counts = component_counts(weights, samples, seed)
        self._draws = {
            number: PosteriorDraws(
                model,
                components[number].posterior,
                count,
                prior=prior,
                temperature=temperature,
                seed=mix(seed, number + 1),
            )
            for number, count in enumerate(self.counts)
            if count
        }
        self._own: list[tuple[Tensor, Tensor]] | None = None  # parameter, copy of its weights
        first, *_ = self._draws.values()
        runs = tuple(component.run for component in components)
        update = {"samples": samples, "seed": seed, "components": self.counts, "runs": runs}
        self.report = first.report.model_copy(update=update)

    def __len__(self) -> int:
        return self._samples

    def __enter__(self) -> Self:
        self._own = [(p, p.detach().clone()) for p in self._model.parameters()]
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        own, self._own = self._own or [], None
        with torch.no_grad():
            for parameter, weights in own:
                parameter.copy_(weights)

    def __iter__(self) -> Iterator[int]:
        if self._own is None:
            raise RuntimeError("draws need their context: `with MixtureDraws(...) as draws`")
        done = 0
        for number, draws in self._draws.items():
            self._load(self._components[number].posterior)
            with draws:
                for k in draws:
                    yield done + k
            done += len(draws)

    def _load(self, posterior: Posterior) -> None:
        """Give the model's parameters the mean of a component."""
        import torch

        with torch.no_grad():
            for name, place in find_parameters(self._model, posterior.mean.specs).items():
                weights = np.asarray(read_tensor(posterior.mean, name))
                place.view(place.parameter).copy_(torch.from_numpy(weights))


def component_counts(weights: Sequence[float], samples: int, seed: int) -> tuple[int, ...]:
    """How many of some draws are of each component.

    Args:
        weights: Those of the components, which sum to one.
        samples: Number of draws.
        seed: Decides what the weights leave open.
    """
    u = np.random.default_rng(mix(seed, _CHOICE)).random()
    ends = np.ceil(np.cumsum(weights) * samples - u)  # draws k with (k + u) / samples below
    ends[-1] = samples
    return tuple(int(count) for count in np.diff(ends.clip(0, samples), prepend=0.0))
