"""Whose precision is it, and how much does it count? Stored precisions become comparable likelihood
precisions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora import AdaptedSource, ProductPrecision
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Identity, Posterior, PosteriorInfo, Prior


class Pull(NamedTuple):
    """What a task's training pulled towards, in the units of its counted precision.

    `precision` None is the published choice P = S0, under which re-basing leaves the mean where it is.
    """

    precision: float | None = None
    decay: float = 0.0


@dataclass(frozen=True)
class Weighing:
    """How a likelihood precision follows from a stored one: `H = gain * (S - contained)`, then shrink.

    Attributes:
        gain: Count used, over the count by which S is scaled.
        contained: The scalar prior inside S, on S's own scale.
        prior: The same prior in units of one full data set; it is added back and never counted.
        contains_base: For a merge: S contains the base posterior with its H at this gain (else
            None).
        reshape: False for a merge, which was pooled and shrunk when it was made.
        count: Observations that H stands for after counting; None if nobody knows.
        inner: Of an adapter: the gain of its factors' precision, which the product of them has in
            it already.
    """

    gain: float = 1.0
    contained: float = 0.0
    prior: float = 0.0
    contains_base: float | None = None
    reshape: bool = True
    count: float | None = None
    pull: Pull = field(default_factory=Pull)
    inner: float = 1.0


def known_info(model: Posterior) -> PosteriorInfo | None:
    """What is known about a model's precision; of `BASE+ADAPTER`, about the adapter's."""
    if isinstance(model.mean, AdaptedSource) and isinstance(model.precision, ProductPrecision):
        return model.mean.adapter.posterior.info
    return model.info


def weigh(config: MergeConfig, models: list[Posterior], notes: list[str]) -> list[Weighing]:
    """How each model's stored precision counts.

    The precision of an adapter counts before the product is made of it; such models are replaced in
    `models`.
    """
    base = models[0] if config.base is not None else None
    common = common_count(config, models)
    for i, model in enumerate(models):
        count = _adapters_count(config, model, common)
        if count is not None and isinstance(model.mean, AdaptedSource):
            models[i] = replace(model, precision=ProductPrecision(model.mean, count))
    result: list[Weighing] = []
    for model in models:
        base_gain = result[0].gain if base is not None and result else 1.0
        result.append(_weigh_one(config, model, base, base_gain, common, notes))
    return result


def common_count(config: MergeConfig, models: Sequence[Posterior]) -> float | None:
    """The count that `--counts equal` gives to every likelihood precision.

    The base's own, so that it is the same whether models are merged at once or one after another,
    and the base posterior stays what it is. Where the base records none, that of the first merge;
    without either the smallest on record, so that nobody is made surer than their data. A count set
    by hand does not vote among tasks.
    """
    if config.base is not None and (own := _own_count(models[0])):
        return own
    merges = [
        own
        for m in models
        if m.info is not None and m.info.merge is not None and (own := _own_count(m))
    ]
    if config.base is not None and merges:
        return merges[0]
    free = [m for m in models if not _is_number(config.observations.get(m.ref, "x"))]
    return min((own for m in free if (own := _own_count(m))), default=None)


def _own_count(model: Posterior) -> float | None:
    """Observations that a precision stands for; of a merge, those that one term at scale 1 stands
    for.
    """
    info = known_info(model)
    if info is None:
        return None
    return info.merge.common_count if info.merge else info.observations


def _adapters_count(config: MergeConfig, model: Posterior, common: float | None) -> float | None:
    """Observations that an adapter's precision shall stand for; None for other models, and where
    nobody knows.
    """
    own = _own_count(model)
    if model.info is not None or own is None:
        return None
    wanted = config.observations.get(model.ref, "1x")
    factor = _factor(wanted, model)
    return (
        float(wanted)
        if factor is None
        else factor * (own if config.counts == "recorded" else common or own)
    )


def _weigh_one(
    config: MergeConfig,
    model: Posterior,
    base: Posterior | None,
    base_gain: float,
    common: float | None,
    notes: list[str],
) -> Weighing:
    wanted = config.observations.get(model.ref, "1x")
    factor = _factor(wanted, model)
    info = model.info
    if info is None:
        if (counted := _adapters_count(config, model, common)) is not None:
            return Weighing(
                count=counted,
                pull=_pull(config, model, 1.0),
                inner=counted / (_own_count(model) or 1.0),
            )
        if factor is None:
            raise ConfigError(
                f"--observations {model.ref}={wanted}: its precision records no count to set. "
                "Multiply it instead: "
                f"{model.ref}=3x."
            )
        return Weighing(gain=factor, pull=_pull(config, model, factor))
    trace = info.merge
    unit = (trace.common_count if trace else info.ess) or 1.0  # the count by which S is scaled
    own = _own_count(model) or unit
    # A merge counts as the sum of its scales (of either sign), anything else as 1.
    held = info.observations / own if trace and info.observations is not None else 1.0
    usual = own if config.counts == "recorded" or common is None else common
    if factor is None:
        if held <= 0:
            raise ConfigError(
                f"--observations {model.ref}={wanted}: it is a removal and stands for "
                f"{info.observations:g} "
                f"observations, which no number can set. Multiply it instead: {model.ref}=3x."
            )
        count = float(wanted) / held
    else:
        count = factor * usual
    gain = count / unit
    if trace is None:
        scalar = info.prior.precision if info.prior.kind == "isotropic" else 0.0
        return Weighing(
            gain=gain,
            contained=scalar,
            prior=scalar * own / unit,
            count=count,
            pull=_pull(config, model, gain),
        )
    if base is not None and model is not base and info.prior.kind == "base":
        _check_frame(model, info.prior, base, base_gain, usual / unit)
    return _weigh_merge(config, model, info, base, gain, count * held, notes)


def _weigh_merge(
    config: MergeConfig,
    model: Posterior,
    info: PosteriorInfo,
    base: Posterior | None,
    gain: float,
    count: float,
    notes: list[str],
) -> Weighing:
    assert info.merge is not None
    if (info.merge.shrink, info.merge.pool) != (config.shrink, config.pool):
        raise MismatchError(
            f"'{model.ref}' was merged with --shrink {info.merge.shrink} --pool {info.merge.pool}, "
            "this merge has "
            f"--shrink {config.shrink} --pool {config.pool}. Use the same, so that all count alike."
        )
    prior = info.prior
    if config.anchor != "h0":
        notes.append(f"'{model.ref}' is a merge and carries its terms' anchors already")
    if gain != 1 and prior.precision > 0 and prior.kind == "isotropic":
        notes.append(f"'{model.ref}' counts otherwise than when it was merged; its prior does not")
    if prior.kind == "isotropic":
        return Weighing(gain, prior.precision, prior.precision, reshape=False, count=count)
    if prior.kind == "none":
        return Weighing(gain, reshape=False, count=count)
    if base is None or model is base:
        # The base inside cannot be told apart here, or is the history of a new base: S counts as a
        # whole.
        return Weighing(gain, reshape=False, count=count)
    if prior.kind == "unknown":
        raise MismatchError(
            f"'{model.ref}' is an average of merges in different frames; what its data added to "
            f"'{base.ref}' cannot be "
            "told. Merge its terms instead."
        )
    return Weighing(
        gain, prior.precision, contains_base=prior.base_count, reshape=False, count=count
    )


def _check_frame(
    model: Posterior, prior: Prior, base: Posterior, base_gain: float, gain: float
) -> None:
    """The base inside a merge must be today's and count as it does today, or the chain would not be
    exact.
    """
    if prior.base != Identity(blocks=base.identity) or prior.base_precision != precision_identity(
        base
    ):
        raise MismatchError(
            f"'{model.ref}' is a merge in the frame of another base or base precision than "
            f"'{base.ref}'. "
            "Chains stay exact only in one frame: use the base that it was merged with."
        )
    inside = (prior.base_count or 1.0) * gain
    if not math.isclose(inside, base_gain, rel_tol=1e-6) or (
        prior.precision > 0 and not math.isclose(gain, 1)
    ):
        factor = (prior.base_count or 1.0) / base_gain
        raise MismatchError(
            f"'{model.ref}' was merged with '{base.ref}' counted {factor:g} times as often as "
            "here. "
            "Chains stay exact only in one frame: use the --observations and --counts of that "
            "merge, such as "
            f"--observations {base.ref}={factor:g}x."
        )


def _factor(wanted: str, model: Posterior) -> float | None:
    """The multiple that `3x` asks for; None for a plain number."""
    text = wanted.removesuffix("x")
    if not _is_number(text) or float(text) <= 0:
        raise ConfigError(
            f"--observations {model.ref}={wanted}: expected a multiple like 3x, or a positive "
            "count."
        )
    return float(text) if wanted.endswith("x") else None


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def _pull(config: MergeConfig, model: Posterior, gain: float) -> Pull:
    if config.anchor == "h0" or model.ref == config.base:
        return Pull()
    if config.anchor == "none":
        return Pull(0.0)
    if config.anchor not in ("recorded", "zero-decay"):
        return Pull(float(config.anchor))
    stored = model.info.anchor if model.info is not None else None
    if (
        stored is None
        or stored.precision is None
        or (config.anchor == "zero-decay" and stored.kind != "zero")
    ):
        raise PrecisionError(
            f"--anchor {config.anchor}: '{model.ref}' does not record a quadratic pull"
            f"{' to zero' if config.anchor == 'zero-decay' else ''}. Use --anchor h0, none or a "
            "number."
        )
    if stored.kind == "zero":
        return Pull(0.0, decay=gain * stored.precision)
    return Pull(gain * stored.precision)


def precision_identity(model: Posterior) -> Identity:
    return Identity(blocks=model.precision_identity)
