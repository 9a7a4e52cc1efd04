"""Which entries a method kept that drops some at random, recovered from what it wrote.

DARE and DELLA draw other entries in each program, so that outputs are not compared directly.
Instead each entry of an output is explained by the models of which it was kept: of all choices,
the one whose merged value is nearest. If the rule is followed, the nearest is equal to rounding.
The factor of each model, which depends on all that was kept of it, is read where only that model
has changed an entry.
"""

import itertools
from typing import NamedTuple

import numpy as np
from mergekit_expected import Tensor
from mergekit_rules import Array, Mask


class Explained(NamedTuple):
    """What an output says of the draws behind it.

    Attributes:
        value: The tensor that the rule gives with these draws, in float64.
        kept: For each model, the changes that were kept.
        seen: For each model, the changes of which that can be told: those of which the merged
            value depends on it.
        factors: By what the kept changes of each model were multiplied.
        chances: For each model, the probability with which each entry is kept.
    """

    value: Array
    kept: list[Mask]
    seen: list[Mask]
    factors: list[float]
    chances: list[Array]


def explain(tensor: Tensor, output: Array) -> Explained | None:
    """Recover the draws behind an output; None if too few entries were changed by one model alone.

    Args:
        tensor: What was merged.
        output: What the program wrote.
    """
    x = tensor.inputs
    assert x.base is not None
    plain = tensor._replace(inputs=x._replace(settings={**x.settings, "rescale": False}))
    total = output - x.base
    changed = [c != 0 for c in x.changes]
    tiny = 4 * x.unit * np.maximum(np.abs(x.base), np.abs(output))
    alone = []
    for i, mine in enumerate(changed):
        others = [m for j, m in enumerate(changed) if j != i]
        alone.append(mine & ~np.any(others, axis=0) & (np.abs(total) > tiny))
    if not all(mask.any() for mask in alone):
        return None
    first = _nearest(plain, output, _factors(plain, total, alone), changed)
    # The factors once more, where a model is the only one that was kept: these are more entries.
    alone = []
    for i, mine in enumerate(first.kept):
        others = [m for j, m in enumerate(first.kept) if j != i]
        alone.append(mine & ~np.any(others, axis=0) & changed[i])
    return _nearest(plain, output, _factors(plain, total, alone), changed)


def _factors(plain: Tensor, total: Array, alone: list[Mask]) -> list[float]:
    """By what the kept changes of each model were multiplied, from entries of it alone."""
    result = []
    for i, mask in enumerate(alone):
        only = [np.full(total.shape, float(i == j)) for j in range(len(alone))]
        unscaled = plain.merged(only)[0] - plain.inputs.base
        result.append(float(np.abs(total[mask]).sum() / np.abs(unscaled[mask]).sum()))
    return result


def _nearest(tensor: Tensor, output: Array, factors: list[float], changed: list[Mask]) -> Explained:
    """Explain each entry by the choice of models whose value is nearest."""
    x = tensor.inputs
    choices = list(itertools.product((False, True), repeat=len(x.models)))
    values = []
    for choice in choices:
        scaled = [np.full(output.shape, f * c) for f, c in zip(factors, choice, strict=True)]
        values.append(tensor.merged(scaled)[0])
    stacked = np.stack(values)
    best = np.argmin(np.abs(stacked - output), axis=0)
    value = np.take_along_axis(stacked, best[None], axis=0)[0]
    kept = [np.array([c[i] for c in choices])[best] for i in range(len(x.models))]
    far = 16 * x.unit * np.maximum(np.abs(output), np.abs(x.base))
    seen = []
    for i, change in enumerate(changed):
        other = best ^ (1 << (len(x.models) - 1 - i))  # the same choice but for this model
        apart = np.abs(np.take_along_axis(stacked, other[None], axis=0)[0] - value)
        seen.append(change & (apart > far))
    return Explained(value, kept, seen, factors, chances(tensor))


def chances(tensor: Tensor) -> list[Array]:
    """The probability with which each entry of each model is kept."""
    x = tensor.inputs
    densities = x.numbers("density", 1)
    if tensor.method.startswith("dare"):
        return [np.full(c.shape, d) for c, d in zip(x.changes, densities, strict=True)]
    result = []
    for change, density, half in zip(x.changes, densities, x.numbers("epsilon", 0), strict=True):
        axis = 1 if change.ndim > 1 else 0
        rank = np.argsort(np.argsort(np.abs(change), axis=axis, kind="stable"), axis=axis)
        steps = max(change.shape[axis] - 1, 1)
        result.append(density - half + 2 * half * rank / steps)
    return result


class Share(NamedTuple):
    """How many of the visible entries were kept, summed over tensors.

    Attributes:
        kept: Number of entries.
        expected: The sum of their probabilities.
        variance: That of the number.
        entries: Number of visible entries.
    """

    kept: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    entries: int = 0

    def add(self, draws: Explained) -> "Share":
        """Add the draws of a tensor."""
        kept, expected, variance, entries = self
        for k, s, p in zip(draws.kept, draws.seen, draws.chances, strict=True):
            kept += float(np.sum(k & s))
            expected += float(np.sum(p[s]))
            variance += float(np.sum(p[s] * (1 - p[s])))
            entries += int(s.sum())
        return Share(kept, expected, variance, entries)

    @property
    def deviations(self) -> float:
        """How many standard deviations the number is from what is expected."""
        return (self.kept - self.expected) / max(self.variance, 1e-300) ** 0.5
