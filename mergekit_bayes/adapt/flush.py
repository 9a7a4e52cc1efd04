"""The precision that an adaptation leaves: that of the edited data, at the new mean.

    D = max(D_0 + H_add - H_remove,  guard (D_0 + H_add + H_remove)),     S = D + prior

D_0 is the data's part of the start's stored precision, on the scale of its N_0 observations. Where
there is none it is `kappa H_M` at the new mean, of the memory that stands for the base's data.
Every H is the root-GGN diagonal of the summed loss at the new mean. For removed rows that are in
the base's data, S is the precision of training without them; that `npo` leaves the weights where
such a training would have is not so, and the guard keeps S positive where it fails.

S stands for `N_0 + N_add - N_remove` observations, under the same guard; without a stored precision
N_0 is kappa times the memory's. Contrast rows count as added ones, all together like the removed
ones. So S is the precision of a model with other data and the same prior, and merges like one.

An adapter gets none: what is removed takes precision from the weights of the base, and an adapter
stores no numbers for those.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.adapt.data import Run
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.weights import by_parameter, read_start
from mergekit_bayes.models.encode import observations
from mergekit_bayes.models.estimate import estimate_curvature, random_examples
from mergekit_bayes.posterior import Prior

ESTIMATOR = "ggn"


class Flushed(NamedTuple):
    """The precision of the edited data.

    Attributes:
        precision: S by parameter name, 1/weight^2, float32, on the scale of the observations.
        observations: What it stands for.
        prior: The prior inside it.
        sampled: Examples that the curvatures were taken over.
        guarded_share: Share of entries that the guard held up.
        start_count: The factor before the data's part of the start's stored precision; None if
            that is not in it.
    """

    precision: dict[str, Tensor]
    observations: float
    prior: Prior
    sampled: int
    guarded_share: float
    start_count: float | None


def why_none(config: AdaptConfig, *, is_stored: bool) -> str | None:
    """Why no precision is stored after a run; None if one is.

    Args:
        config: The settings.
        is_stored: Whether the model has a stored precision.
    """
    if config.posterior == "none":
        return "the settings ask for none"
    if config.lora is not None:
        return (
            "an adapter has no numbers for the base's weights, from which removed rows take "
            "precision"
        )
    if not is_stored and (not config.has_memory or config.kappa == 0):
        return "there is neither a stored precision of the start nor a memory that counts"
    return None


def flushed_parts(places: Collection[object], parts: Collection[str]) -> set[str]:
    """The parts of a run whose curvature the stored precision takes.

    Args:
        places: Of the start's stored precision.
        parts: The names of all.
    """
    return {part for part in parts if part != "memory" or not places}


def flush(run: Run) -> Flushed:
    """The precision of the edited data at the model's present weights.

    Only for a run of which `why_none` says None.

    Args:
        run: The run, whose model is adapted now.

    Raises:
        PrecisionError: The start's precision holds entries that are no precision.
    """
    base, prior, start_count = _base_part(run)
    units, guard = run.units, run.config.guard
    added, removed = dict[str, Tensor](), dict[str, Tensor]()
    sampled = sum(_examples(run, part) for part in flushed_parts(run.places, run.parts))
    for part in (name for name in run.parts if name != "memory"):
        total = removed if part == "remove" else added
        for name, values in _curvature(run, part).items():
            values *= units.weight_of(part)
            total[name] = total[name] + values if name in total else values
    precision, held, entries = {}, 0, 0
    for name, parameter in run.loaded.model.named_parameters():
        if not parameter.requires_grad:
            continue
        zero = torch.zeros_like(parameter, dtype=torch.float32)
        more = base.get(name, zero) + added.get(name, zero)
        less = removed.get(name, zero)
        exact, bound = more - less, guard * (more + less)
        held += int((bound > exact).sum())
        entries += exact.numel()
        precision[name] = exact.maximum(bound) + prior.precision
    stands_for = units.base if run.places else units.kappa * units.memory
    count = stands_for + units.added + (units.removed if units.contrast else 0)
    return Flushed(
        precision=precision,
        observations=max(count - units.removed, guard * (count + units.removed)),
        prior=prior,
        sampled=sampled,
        guarded_share=held / entries,
        start_count=start_count,
    )


def _base_part(run: Run) -> tuple[Mapping[str, Tensor], Prior, float | None]:
    """D_0, the prior beside it, and the factor before what the start stores of it."""
    if run.places:
        start = read_start(run.config, run.places, run.units.unit)
        data = {name: values.sub_(start.prior) for name, values in start.precision.items()}
        named = by_parameter(run.loaded.model, run.places, data)
        return named, _prior_of(run, start.prior), start.factor
    number = run.config.prior if isinstance(run.config.prior, float) else 0.0
    prior = Prior(kind="isotropic", centre="base", precision=number) if number else Prior()
    memory = _curvature(run, "memory")
    return {n: values * run.units.kappa for n, values in memory.items()}, prior, None


def _prior_of(run: Run, precision: float) -> Prior:
    """The start's prior, on the scale of what is stored now.

    What a merge calls its base is data like any other here.
    """
    recorded = run.info.prior if run.info is not None else Prior()
    if recorded.kind == "unknown":
        return recorded
    if not precision:
        return Prior()
    return Prior(kind="isotropic", centre=recorded.centre, precision=precision)


def _examples(run: Run, part: str) -> int:
    return min(len(run.parts[part]), run.config.flush_batches * run.config.batch_size)


def _curvature(run: Run, part: str) -> dict[str, Tensor]:
    """Curvature of the loss summed over a part, from random batches of it."""
    config, examples = run.config, run.parts[part]
    chosen = random_examples(examples, config.flush_batches * config.batch_size, config.seed)
    curvature = estimate_curvature(
        ESTIMATOR, run.loaded, chosen, batch_size=config.batch_size, seed=config.seed
    )
    scale = observations(examples, run.loaded.task) / curvature.observations
    return {name: values.mul_(scale) for name, values in curvature.total.items()}
