"""Merge arrays in memory by any method that weighs no entries, in float64.

A merge of files goes through passes over chunks of what is stored. Where all that is merged of a
tensor is small and in memory, a rule is called on it as it is: an elementwise one on whole arrays,
one for matrices on a matrix, one for tensors on pieces that are all of it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Array, keyed_draws
from mergekit_bayes.kernels.plain import names_the_rule
from mergekit_bayes.methods.base import FactInputs, Facts, Method, Settings
from mergekit_bayes.methods.histogram import BINS, bin_of
from mergekit_bayes.methods.measuring import combine_whole
from mergekit_bayes.methods.tensors import Tensors


class Arrays(NamedTuple):
    """One tensor of all models.

    Attributes:
        base: The base's; None for a method that takes none.
        tasks: Those of the tasks, each of the base's shape, in units of the weights.
    """

    base: Array | None
    tasks: tuple[Array, ...]


def totals_of(method: Method, tensors: Iterable[Arrays]) -> Array:
    """What the first pass of a method adds up over some tensors.

    Args:
        method: The method.
        tensors: The tensors.

    Returns:
        (statistics,) in float64, or (statistics, BINS) in int64 of magnitudes in float32; empty for
        a method without a first pass.
    """
    reduction, totals = method.reduction, np.zeros(0)
    if reduction is None:
        return totals
    for arrays in tensors:
        base, tasks = _gaussians(arrays)
        count = reduction.count(len(tasks))
        if not totals.size:
            is_sum = reduction.kind == "sum"
            totals = np.zeros(count) if is_sum else np.zeros((count, BINS), np.int64)
        with np.errstate(all="ignore"), names_the_rule(method):
            for k in range(count):
                values = reduction.statistic(base if base is not None else tasks[0], tasks, k)
                if reduction.kind == "sum":
                    totals[k] += np.sum(values, dtype=np.float64)
                else:
                    bins = bin_of(np.asarray(values, np.float32).reshape(-1))
                    totals[k] += np.bincount(bins, minlength=BINS)
    return totals


def facts_of(method: Method, settings: Settings, tasks: int, totals: Array) -> Facts:
    """What a method's rule is given beside the models.

    Args:
        method: The method.
        settings: Its settings, checked.
        tasks: Number of tasks.
        totals: What its first pass added up.

    Raises:
        ConfigError: The settings do not go together, or with this number of tasks.
    """
    if method.facts is None:
        return None
    # No guard acts, and no observations count, where no precision weighs.
    return method.facts(FactInputs(settings, 1.0, (1.0,) * tasks, totals))


def merge_arrays(
    method: Method,
    settings: Settings,
    arrays: Arrays,
    scales: Sequence[float],
    facts: Facts = None,
    keys: Sequence[np.uint64] = (),
) -> Array:
    """Merge one tensor.

    Args:
        method: A method that needs no precision.
        settings: Its settings, checked.
        arrays: The tensor; a matrix (outputs, inputs) where the method has a rule for matrices.
        scales: One per task, dimensionless.
        facts: From `facts_of`.
        keys: Key of the random numbers of each task; empty unless the method draws.

    Returns:
        The merged tensor in float64.

    Raises:
        ArithmeticError: What the rule cannot merge; LinAlgError likewise.
    """

    def draws(task: int) -> Array:
        return keyed_draws(keys[task], 0, arrays.tasks[task].size).reshape(arrays.tasks[0].shape)

    with np.errstate(all="ignore"), names_the_rule(method):
        if method.tensor is not None:
            tensors = Tensors(
                arrays.base,
                arrays.tasks,
                tuple(map(float, scales)),
                settings,
                products=_products(arrays) if method.tensor.needs(settings) == "products" else None,
                draws=draws if method.random else None,
            )
            return np.asarray(combine_whole(method.tensor, tensors), np.float64)
        base, tasks = _gaussians(arrays)
        rule = method.combine if method.matrix is None else method.matrix
        drawn = (tuple(draws(t) for t in range(len(tasks))),) if method.random else ()
        merged = rule(base, tasks, tuple(map(np.float64, scales)), facts, *drawn)
    return np.asarray(merged.mean, np.float64)


def _gaussians(arrays: Arrays) -> tuple[Gaussian | None, tuple[Gaussian, ...]]:
    """The models as rules are given them; a rule that weighs no entries hands precisions on."""
    tasks = tuple(Gaussian(task, task) for task in arrays.tasks)
    return (None if arrays.base is None else Gaussian(arrays.base, arrays.base)), tasks


def _products(arrays: Arrays) -> Array:
    """The products of each two models, the base first."""
    models = arrays.tasks if arrays.base is None else (arrays.base, *arrays.tasks)
    flat = np.array([np.asarray(model, np.float64).reshape(-1) for model in models])
    return np.asarray(flat @ flat.T)
