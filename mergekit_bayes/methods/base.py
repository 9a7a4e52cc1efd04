"""What every merging rule looks like."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.gaussian import Gaussian

# (base, tasks, scales, facts) -> Gaussian; a random method gets `draws` as its fifth argument.
Combine = Callable[..., Gaussian]
Totals = NDArray[Any]  # (statistics,) of float64, or (statistics, BINS) of int64
Settings = Mapping[str, float | str]

# A histogram of magnitudes bins a float32 by its upper 19 bits without the sign: the exponent and 11 bits of the
# mantissa, so that an edge is known to one part in 2,048.
SHIFT = 12
BINS = 1 << (31 - SHIFT)


class Parameter(NamedTuple):
    """One setting of a method: `--param name=value`.

    Attributes:
        default: An int where only whole numbers are allowed.
        meaning: One line, with the unit.
        low, high: Bounds of a number, both allowed.
        choices: The words allowed, for a setting that is no number.
    """

    name: str
    default: float | str
    meaning: str
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()


class Reduction(NamedTuple):
    """A first pass over all entries of a tensor (or of the model), for what a method must know beforehand.

    Attributes:
        kind: `sum` adds the statistic up in float64; `histogram` counts its magnitudes by `bin_of`.
        statistic: `(base, tasks, k) -> value`, elementwise and pure; statistic k of an entry.
        count: Number of statistics for this many tasks.
        facts: `(totals, settings, counts) -> numbers` that `combine` gets. `counts` holds the observations that each
            task's precision stands for (1 where nobody knows).
        scope: Over each `tensor` or over the whole `model`; a method may let `--param scope=` override it.
    """

    kind: Literal["sum", "histogram"]
    statistic: Callable[[Any, tuple[Gaussian, ...], int], Any]
    count: Callable[[int], int]
    facts: Callable[[Totals, Settings, tuple[float, ...]], tuple[float, ...]]
    scope: Literal["tensor", "model"]


class Method(NamedTuple):
    """A merging rule.

    Attributes:
        combine: `(base, tasks, scales, facts) -> Gaussian`, elementwise and pure; a `random` method takes a fifth
            argument `draws`, one uniform number in [0, 1) per task and entry. `base` is None for a method that needs
            none. A method that needs no precision passes on what it was given.
        needs_base, needs_precision: What it cannot do without; what it does not need it is not given.
        summary: One line for `bmerge methods`, with the paper.
        example: A command line.
        parameters: Its settings.
        reduction: The first pass that it needs, if any.
        random: It takes `draws`.
        is_posterior: The precision that it returns is one, to be written and merged again.
        tasks: How many it takes; None for any number.
    """

    name: str
    combine: Combine
    needs_base: bool
    needs_precision: bool
    summary: str
    example: str
    parameters: tuple[Parameter, ...] = ()
    reduction: Reduction | None = None
    random: bool = False
    is_posterior: bool = False
    tasks: int | None = None


def bin_of(magnitude: NDArray[np.float32]) -> NDArray[Any]:
    """The histogram bin of non-negative float32 values; bins are in order of magnitude."""
    return (np.ascontiguousarray(magnitude, np.float32).view(np.uint32) & 0x7FFFFFFF) >> SHIFT


def edge(index: int) -> float:
    """The smallest magnitude in a bin."""
    return float(np.array(index << SHIFT, np.uint32).view(np.float32))


def threshold(histogram: NDArray[np.int64], density: float) -> float:
    """The magnitude of the last entry among the share `density` of largest ones, down to the edge of its bin.

    Kept is at least that share, and what lies within one part in 2,048 below the exact threshold. Entries tied at the
    threshold are all kept, as published: changes of a bfloat16 model have few magnitudes, and the share then grows.
    """
    kept = histogram[::-1].cumsum()[::-1]  # entries in this bin and above
    least = max(1, round(density * int(kept[0])))
    return edge(max(0, int(np.searchsorted(-kept, -least, side="right")) - 1))
