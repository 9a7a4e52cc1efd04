"""How many observations each precision stands for, as recorded and as used in this merge."""

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.plan.inputs import Inputs, precision_info
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Posterior


def common_count(config: MergeConfig, inputs: Inputs) -> float | None:
    """The count that `--counts equal` gives to every likelihood precision; None if unknown.

    It is the base's own, so that the result is the same whether models are merged at once or one
    after another, and the base posterior stays what it is. Where the base records no count, it is
    that of the first merge among the models. Without either it is the smallest on record, so that
    no model becomes more certain than its data. A model whose count is set by hand is left out
    then.
    """
    if inputs.base is not None:
        if count := recorded_count(inputs.base.posterior):
            return count
        for model in inputs:
            info = model.posterior.info
            is_merge = info is not None and info.merge is not None
            if is_merge and (count := recorded_count(model.posterior)):
                return count
    recorded = [
        count
        for model in inputs
        if not _is_number(config.observations.get(model.ref, "x"))
        and (count := recorded_count(model.posterior))
    ]
    return min(recorded, default=None)


def recorded_count(model: Posterior) -> float | None:
    """Observations that a precision stands for; those of one term at scale 1 for a merge."""
    info = precision_info(model)
    if info is None:
        return None
    return info.merge.common_count if info.merge else info.observations


def adapter_count(config: MergeConfig, model: Posterior, common: float | None) -> float | None:
    """Observations that the precision of `BASE+ADAPTER` is to stand for.

    The precision of the product follows from factors that are counted already, so that this count
    must be known before a tensor is read. None for other models, and if unknown.

    Args:
        config: The settings.
        model: The model.
        common: The count of `common_count`.
    """
    recorded = recorded_count(model)
    if model.info is not None or recorded is None:
        return None
    factor = count_factor(config, model)
    if factor is None:
        return float(requested_count(config, model))
    return factor * (recorded if config.counts == "recorded" else common or recorded)


def requested_count(config: MergeConfig, model: Posterior) -> str:
    """What `--observations` says of a model; `1x` by default."""
    return config.observations.get(model.ref, "1x")


def count_factor(config: MergeConfig, model: Posterior) -> float | None:
    """The multiple that `--observations MODEL=3x` asks for; None for a plain count.

    Raises:
        ConfigError: Neither a multiple nor a count.
    """
    requested = requested_count(config, model)
    number = requested.removesuffix("x")
    if not _is_number(number) or float(number) <= 0:
        raise ConfigError(
            f"--observations {model.ref}={requested}: expected a multiple like 3x, or a positive "
            "count."
        )
    return float(number) if requested.endswith("x") else None


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
