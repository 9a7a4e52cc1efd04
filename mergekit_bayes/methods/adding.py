"""How task vectors are added to the base once they are sparse: mergekit's way, and the papers'."""

from collections.abc import Iterable

import numpy as np

from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.methods.base import Parameter, Tasks
from mergekit_bayes.methods.election import elect
from mergekit_bayes.methods.tensors import Array, Tensors

_NO_SUM = 1e-8  # weights whose sum is smaller are not divided by it
_CANCELLED = 1e-6  # times all weights: what is left of weights that cancel is rounding


def adding_parameters(*, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    """The settings that all methods of mergekit which add task vectors share.

    Args:
        normalize: Whether the sum is divided by that of the weights by default.
        rescale: Whether a sparse task vector gets the size of the whole one by default.
    """
    return (
        Parameter("lambda", 1.0, "by what the sum of task vectors is multiplied"),
        Parameter("normalize", int(normalize), "1 divides the sum by that of the weights", 0, 1),
        Parameter("rescale", int(rescale), "1 gives what is kept the L1 norm of all", 0, 1),
        Parameter("int8_mask", 0, "changes no number; mergekit saves memory by it", 0, 1),
    )


def add(tensors: Tensors, changes: Iterable[Array]) -> Array:
    """The base plus the weighed task vectors.

        mean = m0 + lambda sum_t w_t d_t / (sum_t w_t if `normalize`)

    As in mergekit, weights whose sum is below 1e-8 are not divided by it.

    Args:
        tensors: With the weights, dimensionless, and the settings `lambda` and `normalize`.
        changes: d_t of each task in turn, changed in place.
    """
    base = np.asarray(tensors.base)
    total = np.zeros_like(base)
    for weight, change in zip(tensors.weights, changes, strict=True):
        if weight != 0:
            change *= weight
            total += change
    divisor = sum(tensors.weights) if tensors.settings["normalize"] else 1.0
    if abs(divisor) < _NO_SUM:
        divisor = 1.0
    total *= tensors.number("lambda") / divisor
    return np.asarray(base + total)


def add_elected(tensors: Tensors, changes: Iterable[Array]) -> Array:
    """The base plus those weighed task vectors that agree in sign with the sum of all.

        x_t  = w_t d_t,  s = + where sum_t x_t >= 0, else -
        mean = m0 + lambda sum_t [sign x_t = s] x_t / (sum_t [sign x_t = s] w_t if `normalize`)

    Signs are elected on weighed task vectors, as in mergekit, where TIES (Yadav et al., 2023) sums
    those without weights: they differ where weights differ. What cancels exactly counts as
    positive, as there. A task of weight zero has no vote, nor has an entry of zero. Where the
    weights of those that agree cancel (1 and -1, of task vectors of unlike signs), the sum is not
    divided; mergekit divides by what rounding leaves of them, if that is not zero.

    Args:
        tensors: With the weights, dimensionless, and the settings `lambda` and `normalize`.
        changes: d_t of each task in turn, changed in place.
    """
    base, weights = np.asarray(tensors.base), [w for w in tensors.weights if w != 0]
    weighed = []
    for weight, change in zip(tensors.weights, changes, strict=True):
        if weight != 0:
            change *= weight
            weighed.append(change)
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    for change in weighed:
        total += change
    is_positive = total >= 0
    total[...] = 0
    for weight, change in zip(weights, weighed, strict=True):
        agrees = np.where(is_positive, change > 0, change < 0)
        np.add(total, change, out=total, where=agrees)
        np.add(divisor, base.dtype.type(weight), out=divisor, where=agrees)
    if tensors.settings["normalize"]:
        is_mixed = any(w > 0 for w in weights) and any(w < 0 for w in weights)
        least = _CANCELLED * sum(abs(w) for w in weights) if is_mixed else 0.0
        np.divide(total, divisor, out=total, where=np.abs(divisor) > least)
    total *= tensors.number("lambda")
    return np.asarray(base + total)


def add_scaled(tensors: Tensors, changes: Iterable[Array]) -> Array:
    """The base plus the scaled task vectors, as published.

        mean = m0 + sum_t scale_t d_t

    Args:
        tensors: With the scales as weights, dimensionless.
        changes: d_t of each task in turn, changed in place.
    """
    total = np.asarray(tensors.base).copy()
    for scale, change in zip(tensors.weights, changes, strict=True):
        if scale != 0:
            change *= scale
            total += change
    return total


def add_majority(tensors: Tensors, changes: Iterable[Array]) -> Array:
    """The base plus the mean of those task vectors that agree with the majority's sign.

    As published for TIES; `election.elect` states it.

    Args:
        tensors: With the scales as weights, dimensionless.
        changes: d_t of each task in turn.
    """
    base = np.asarray(tensors.base)
    deltas = tuple(Gaussian(change, change) for change in changes)
    return np.asarray(
        elect(Gaussian(base, base), deltas, tensors.weights, _itself, None).mean
    ).astype(base.dtype, copy=False)


def _itself(base: Gaussian, tasks: Tasks, facts: None, t: int) -> tuple[Number, Number]:
    return tasks[t].mean, np.True_
