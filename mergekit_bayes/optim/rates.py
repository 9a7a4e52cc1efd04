"""The learning rate as a bound on how far one step moves a weight.

IVON clips each entry of its direction to `clip_radius`, so that no weight moves further in a step
than

    bound = lr * clip_radius                                    in general
    bound = lr * (hess_init + weight_decay) * clip_radius       with `rescale_lr`

AdamW moves a weight by about its learning rate, so this bound is the number to compare with it.
The arithmetic is that of decimal numbers as they are written, rounded once: 1e-4 with a clip
radius of 1e-3 is a learning rate of exactly 0.1, and back.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mergekit_bayes.errors import ConfigError

_LARGEST = 0.01  # a weight of a trained model has about this size
_LARGEST_LR = 1e30  # far above any use, and within float32


def rate_from_bound(bound: float, clip_radius: float, scale: float = 1.0) -> float:
    """IVON's learning rate for a bound on the change of a weight in one step.

    Args:
        bound: Largest change of a weight in one step, in units of the weight.
        clip_radius: IVON's `clip_radius`, finite and above 0.
        scale: `hess_init + weight_decay` with `rescale_lr`, else 1.

    Returns:
        The rate; infinite if it is no float.
    """
    return _rounded(_decimal(bound) / (_decimal(clip_radius) * _decimal(scale)))


def checked_rate(bound: float, clip_radius: float, scale: float = 1.0) -> float:
    """`rate_from_bound`, of settings that a user gave.

    Args:
        bound: The setting `learning_rate`.
        clip_radius: As in `rate_from_bound`.
        scale: As in `rate_from_bound`.

    Raises:
        ConfigError: The bound is above 0.01 and so probably a rate of IVON's own, the clip radius
            is infinite, or both together give no rate that IVON can use.
    """
    if not clip_radius < math.inf:
        raise ConfigError(
            "clip_radius: with inf nothing bounds a step, so learning_rate has no meaning. Give a "
            "finite one (1e-3), or use IVON(lr=, clip_radius=inf) in a script of your own."
        )
    if not bound <= _LARGEST:
        message = (
            f"learning_rate: expected at most {_LARGEST:g}, found {bound:g}. With IVON it is the "
            "largest change of a weight in one step, to be chosen like AdamW's rate."
        )
        if bound < math.inf:
            converted = bound_from_rate(bound, clip_radius, scale)
            message += (
                f" Earlier versions took IVON's own lr here: lr {bound:g} with clip_radius "
                f"{clip_radius:g} is learning_rate: {converted:.6g}."
            )
        raise ConfigError(message)
    lr = rate_from_bound(bound, clip_radius, scale)
    if not lr <= _LARGEST_LR:
        raise ConfigError(
            f"clip_radius: {clip_radius:g} with learning_rate {bound:g} makes IVON's lr {lr:g}, "
            "which it cannot use. Give a larger one (1e-3)."
        )
    return lr


def bound_from_rate(lr: float, clip_radius: float, scale: float = 1.0) -> float:
    """The largest change of a weight in one step at a learning rate of IVON.

    Args:
        lr: IVON's learning rate, finite.
        clip_radius: As in `rate_from_bound`.
        scale: As in `rate_from_bound`.

    Returns:
        The bound; infinite if it is no float.
    """
    return _rounded(_decimal(lr) * _decimal(clip_radius) * _decimal(scale))


def step_bound(group: Mapping[str, Any], lr: float) -> float:
    """The largest change of a weight in one step of a parameter group of IVON without a prior.

    Args:
        group: The parameter group, with the settings of IVON.
        lr: The learning rate of the step.
    """
    scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
    return bound_from_rate(lr, group["clip_radius"], scale)


def _decimal(value: float) -> Fraction:
    """The decimal number as which a float is written, not the binary one that it is."""
    return Fraction(repr(float(value)))


def _rounded(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
