"""The unit of the learning rate: the largest change of a weight in one step.

With IVON no weight moves further than `learning_rate` in a step, whatever `clip_radius` is. Earlier
versions took IVON's own `lr` under the same name: 0.1, where it is 1e-4 now. Their settings are
refused with the number converted, and their checkpoints are compared in the present unit.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.optim.rates import bound_from_rate, checked_rate, rate_from_bound

_SHORT = 100  # steps up to which a classifier's bound is that of other models


def learning_rate(config: FinetuneConfig, steps: int = 0, task: str = "causal-lm") -> float:
    """The learning rate at the start: the setting, or the default for whole weights or adapters.

    Most weights move by all of IVON's bound in each step, so that a classifier would go the further
    from its base, and the deeper into its training rows, the longer it is trained. Beyond 100 steps
    its bound falls with their number, down to a tenth: 0.01 / steps, of an adapter 0.1 / steps.

    Args:
        config: Settings of the run.
        steps: Optimizer steps of the whole run.
        task: What is trained.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    rate = 1e-4 if config.lora is None else 1e-3
    if config.optimizer != "ivon" or task != "classification" or steps <= _SHORT:
        return rate
    return max(rate / 10, rate * _SHORT / steps)


def optimizer_rate(config: FinetuneConfig, rate: float | None = None) -> float:
    """The `lr` of the optimizer at the start, which IVON takes in the published unit.

    Args:
        config: Settings of the run.
        rate: The learning rate; by default that of the settings.
    """
    rate = learning_rate(config) if rate is None else rate
    if config.optimizer != "ivon":
        return rate
    return rate_from_bound(rate, config.clip_radius, _scale(config))


def refuse_rate(config: FinetuneConfig) -> None:
    """Refuse a learning rate of IVON that bounds nothing, or that is meant in another unit.

    AdamW's unit has not changed, and its rate is left to the user.

    Raises:
        ConfigError: As `checked_rate`.
    """
    if config.optimizer == "ivon":
        checked_rate(learning_rate(config), config.clip_radius, _scale(config))


def in_present_unit(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, with `learning_rate` in the present unit.

    An earlier version stored IVON's `lr` under both names, and no `learning_rate` where none was
    given. An adaptation keeps `lr` among its units, and its clip radius is the default.

    Args:
        stored: What the checkpoint holds. Values that no version has written are left alone.
    """
    units = stored.get("units")
    holder, is_adaptation = (units, True) if isinstance(units, Mapping) else (stored, False)
    lr, rate = holder.get("lr"), stored.get("learning_rate")
    is_old = rate == lr or (rate is None and not is_adaptation)
    if not is_old or not _is_number(lr):
        return dict(stored)
    if stored.get("optimizer") != "ivon":
        return {**stored, "learning_rate": lr}
    fields = FinetuneConfig.model_fields
    clip, start, decay = (
        stored.get(name, fields[name].default)
        for name in ("clip_radius", "hess_init", "weight_decay")
    )
    if not all(map(_is_number, (clip, start, decay))):
        return dict(stored)
    is_rescaled = stored.get("rescale_lr") and stored.get("curvature") == "price"
    bound = bound_from_rate(lr, clip, start + decay if is_rescaled else 1.0)
    return {**stored, "learning_rate": bound}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and 0 <= value < float("inf")


def _scale(config: FinetuneConfig) -> float:
    """What IVON multiplies its `lr` by: `hess_init + weight_decay` with `rescale_lr`, else 1."""
    is_rescaled = config.rescale_lr and config.curvature == "price"
    return config.hess_init + config.weight_decay if is_rescaled else 1.0
