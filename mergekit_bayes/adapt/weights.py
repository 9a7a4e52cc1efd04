"""The weight-space part of a run's K-prior: its precision S_w, and the penalty W.

    W = (theta - theta_0)' S_w (theta - theta_0) / 2,   S_w = max(S_0 - kappa H_M, prior)

S_0 is the precision that is stored beside the start, on the scale of the N_0 observations that the
start stands for, in any form: by entry, row or tensor. H_M is taken in the same form. A parameter
without a precision is free.

With an adapter theta - theta_0 is `s B A` in an adapted weight, so that W is a function of the
factors, without a prior of their own, and the change in a module that is trained as a whole.

theta_0 and S_w take as much memory as the parameters that they belong to, each; the differences
are made again in the backward pass, one tensor at a time. With an adapter there is no theta_0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from mergekit_bayes.adapt.kprior import weight_penalty, weight_precision
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.units import Units, stored_count
from mergekit_bayes.checkpoint.codec import is_bad_precision, read_tensor
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.models.encode import Example
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.modes import differentiable
from mergekit_bayes.models.places import Place, find_places
from mergekit_bayes.posterior import Posterior, PosteriorInfo, open_posterior
from mergekit_bayes.posterior.forms import Form

_ADAPTER = "default"  # the name that peft gives to the only adapter
_LOOKED_AT = 1024  # examples of the memory at most for H_M; the rest is taken to be like them


class Start(NamedTuple):
    """The stored precision of a start.

    Attributes:
        precision: S_0 of each place, by its name on disk, on the scale of N_0 observations.
        prior: The prior inside it, which no data added.
        factor: The factor of what is stored of the data's part.
    """

    precision: dict[str, Tensor]
    prior: float
    factor: float


class Term(NamedTuple):
    """One tensor's part of W.

    Attributes:
        weight: What it is a quadratic of: a parameter itself, or the change by an adapter.
        centre: Where it is zero.
        precision: S_w of it, of its shape or one that broadcasts to it.
        parameter: The trained parameter; None for the change by an adapter.
    """

    weight: Callable[[], Tensor]
    centre: Tensor
    precision: Tensor
    parameter: Tensor | None

    def __call__(self) -> Tensor:
        """Its value, with its graph."""
        return weight_penalty({"": self.weight()}, {"": self.centre}, {"": self.precision})


class WeightPart:
    """W of a model's present weights, with its graph.

    Args:
        model: The model that is adapted, at the start.
        precision: S_w by parameter name; with an adapter under the names of the base's weights.

    Attributes:
        terms: What W is the sum of.
    """

    def __init__(self, model: Module, precision: Mapping[str, Tensor]) -> None:
        self.terms = tuple(_terms(model, precision))

    def __call__(self) -> Tensor:
        """W, in nats of the summed loss: a number."""
        terms = [
            checkpoint(term, use_reentrant=False, preserve_rng_state=False) for term in self.terms
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def chosen_prior(config: AdaptConfig, *, is_stored: bool) -> Literal["stored", "none"] | float:
    """The weight-space part that a run has: the setting, or what `auto` is for this model.

    Args:
        config: The settings.
        is_stored: Whether the model has a stored precision.

    Raises:
        ConfigError: `stored`, and the model has no precision.
    """
    if config.prior == "stored" and not is_stored:
        raise ConfigError(
            f"prior: stored, and '{config.model}' has no precision. Make one with `bmerge "
            f"precision {config.model} --data TEXTS`, or give a number or none."
        )
    if config.prior != "auto":
        return config.prior
    return "stored" if is_stored and not config.has_memory else "none"


def places_of(loaded: Loaded, posterior: Posterior) -> tuple[Place, ...]:
    """Where the tensors of a stored precision belong in a model without an adapter.

    Raises:
        MismatchError: The names or shapes of the precision are not the model's.
        PrecisionError: It was taken at other weights than these.
    """
    if posterior.precision is None:
        return ()
    if posterior.info is not None and posterior.info.mean.blocks != posterior.identity:
        raise PrecisionError(
            f"the precision of '{posterior.ref}' was taken at other weights than these: its record "
            "of them differs. Use the precision that belongs to them."
        )
    return tuple(find_places(loaded.model, posterior))


def read_start(config: AdaptConfig, places: Sequence[Place], unit: str) -> Start:
    """Read the stored precision, on the scale of the observations that the start stands for.

        S_0 = (S - prior) c + prior,    S and the prior times observations / ess as stored

    with c = 1, or the given `base_observations` over those on record. A record that counts in
    another unit tells no c: the same data have another number there.

    Args:
        config: The settings.
        places: Of the stored precision.
        unit: What `base_observations` counts, a token or an example.

    Raises:
        PrecisionError: Entries that are negative or not finite.
    """
    with open_posterior(config.model, precision=config.precision) as posterior:
        counted, prior, data = _scales(posterior.info, config.base_observations, unit)
        precision = {
            place.name: _read(posterior, place)
            .to(place.parameter.device)
            .mul_(counted)
            .sub_(prior)
            .clamp_(min=0)
            .mul_(data)
            .add_(prior)
            for place in places
        }
    return Start(precision, prior, counted * data)


def by_parameter(
    model: Module, places: Sequence[Place], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What belongs to places, by the names of the parameters that hold them.

    A parameter that is stored in parts gets a tensor of its own shape, 0 outside of the parts; of
    any other it is the tensor as it is, in whatever form.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    result: dict[str, Tensor] = {}
    for place in places:
        name = names[id(place.parameter)]
        if place.stride is None:
            result[name] = values[place.name]
            continue
        if name not in result:
            result[name] = torch.zeros_like(place.parameter, dtype=torch.float32)
        place.view(result[name]).copy_(values[place.name])
    return result


def make_weight_part(
    config: AdaptConfig,
    loaded: Loaded,
    places: Sequence[Place],
    units: Units,
    memory: Sequence[Example] | None,
) -> WeightPart | None:
    """The weight-space part of a run; None where it has none.

    Args:
        config: The settings.
        loaded: The model at the start, perhaps with an adapter, on its device.
        places: Of the stored precision.
        units: The weights of the parts.
        memory: The examples of the memory that are trained on; None without one.

    Raises:
        ConfigError: `prior: stored`, and the model has no precision.
        PrecisionError: The stored precision cannot be used.
    """
    prior = chosen_prior(config, is_stored=bool(places))
    if prior == "none" or not units.tau:
        return None
    model = loaded.model
    if not isinstance(prior, str):
        return WeightPart(model, {n: torch.tensor(prior) for n, _ in model.named_parameters()})
    start = read_start(config, places, units.unit)
    precision = {
        place.name: pooled(start.precision[place.name], place.shape, config.pool)
        for place in places
    }
    if memory and units.kappa:
        share = _memory_curvature(config, loaded, memory, places)
        share = {name: _like(values, precision[name]) for name, values in share.items()}
        precision = weight_precision(precision, share, units.kappa, start.prior)
    return WeightPart(model, by_parameter(model, places, precision))


def _memory_curvature(
    config: AdaptConfig, loaded: Loaded, memory: Sequence[Example], places: Sequence[Place]
) -> dict[str, Tensor]:
    """H_M of each place at the start, summed over the memory; estimated on some of a large one."""
    chosen = random_examples(memory, min(len(memory), _LOOKED_AT), config.seed)
    names = {id(p): name for name, p in loaded.model.named_parameters()}
    with differentiable(loaded.model, {id(place.parameter) for place in places}):
        total = estimate_curvature(
            "ggn", loaded, chosen, batch_size=config.batch_size, seed=config.seed
        ).total
    scale = len(memory) / len(chosen)
    return {place.name: place.view(total[names[id(place.parameter)]]) * scale for place in places}


def _like(values: Tensor, precision: Tensor) -> Tensor:
    """The means of entries, in the form that a precision has."""
    axes = [i for i, size in enumerate(precision.shape) if size == 1]
    if not precision.ndim:
        return values.mean()
    return values.mean(axes, keepdim=True) if axes else values


def _terms(model: Module, precision: Mapping[str, Tensor]) -> Iterator[Term]:
    """A term for each changing weight that has a precision."""
    if hasattr(model, "peft_config"):
        yield from _adapter_terms(model, precision)
        return
    for name, parameter in model.named_parameters():
        if name in precision and parameter.requires_grad:
            yield _whole(parameter, parameter.detach().clone(), precision[name])


def _adapter_terms(model: Module, precision: Mapping[str, Tensor]) -> Iterator[Term]:
    """The terms of the adapted weights, and of modules that are trained beside the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    numbers = {id(p): precision[n] for n, p in model.named_parameters() if n in precision}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[_ADAPTER]
            for name, centre in module.original_module.named_parameters():
                if id(centre) in numbers:
                    parameter = trained.get_parameter(name)
                    yield _whole(parameter, centre.detach(), numbers[id(centre)])
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer().weight
            if id(base) in numbers:  # peft knows the layer's kind and how it lies
                change = partial(module.get_delta_weight, _ADAPTER)
                zero = torch.zeros((), device=base.device)
                yield Term(change, zero, numbers[id(base)].to(base.device), None)


def _whole(parameter: Tensor, centre: Tensor, precision: Tensor) -> Term:
    """The term of a parameter that is trained as a whole."""
    return Term(lambda: parameter, centre, precision.to(centre.device), parameter)


def _scales(
    info: PosteriorInfo | None, base: float | None, unit: str
) -> tuple[float, float, float]:
    """The factor of what is stored, the prior inside it after that, and c of `read_start`.

    The record of a merge has nothing to scale by: its precisions are scaled already.
    """
    if info is None:
        return 1.0, 0.0, 1.0
    counted = 1.0
    if info.merge is None and info.ess and info.observations:
        counted = info.observations / info.ess
    prior = info.prior.precision if info.prior.kind in ("isotropic", "base") else 0.0
    count = stored_count(info) if info.unit in (None, unit) else None
    return counted, prior * counted, base / count if base and count else 1.0


def _read(posterior: Posterior, place: Place) -> Tensor:
    """A stored precision as float32, in the shape in which it is stored."""
    source = posterior.precision
    assert source is not None
    stored = read_tensor(source, place.name)
    if bad := int(np.count_nonzero(is_bad_precision(stored))):
        raise PrecisionError(
            f"{source.where(place.name)}: the precision of '{place.name}' has {bad} entries that "
            "are negative or not finite. Estimate it again."
        )
    return torch.tensor(stored, dtype=torch.float32)


def pooled(values: Tensor, mean: tuple[int, ...], pool: Literal["tensor", "row"] | None) -> Tensor:
    """Means of a precision over each row or the tensor; as it is without `pool`.

    Args:
        values: In any form.
        mean: Shape of the weights that it belongs to.
        pool: What a mean is taken over.
    """
    shape = Form.ENTRY.pooled(pool).shape_of(mean)
    axes = [i for i, size in enumerate(shape) if size < values.shape[i]] if values.ndim else []
    return values.mean(axes, keepdim=True) if axes else values
