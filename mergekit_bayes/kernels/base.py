"""What a pass takes and gives, whoever carries it out."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.gaussian import Gaussian, rebase, select
from mergekit_bayes.methods.base import Method

Array = NDArray[Any]
_U64 = np.uint64


class Kind(NamedTuple):
    """Which pass it is: everything that is decided once a tensor, not once an entry.

    Attributes:
        method: The rule.
        weighs: Precisions are read and written.
        has_base: Model 0 is the base.
        anchored: Some task was pulled to something else than the base posterior.
        removes: Some scale is negative; the guard is then counted.
    """

    method: Method
    weighs: bool
    has_base: bool
    anchored: bool
    removes: bool


class Numbers(NamedTuple):
    """The constants of a pass. Per model, base first; `scales`, `facts` and `keys` per task.

    The likelihood precision of model i at an entry with stored precision x, in row r of the chunk, is
    `max(gain_i * (x - (inside_i + share_i * H_0)) + extra_ir, floor_i)`, with H_0 that of the base.
    """

    scales: tuple[Any, ...]
    facts: tuple[Any, ...]
    gains: tuple[Any, ...]
    insides: tuple[Any, ...]
    shares: tuple[Any, ...]
    floors: tuple[Any, ...]  # of H: 0, or minus infinity for a merge, which may be a removal
    priors: tuple[Any, ...]  # added to H where a model stands alone
    pulls: tuple[Any, ...]  # anchor precision, below zero for the published choice
    decays: tuple[Any, ...]
    keys: tuple[np.uint64, ...]  # of the random numbers

    def cast(self, kind: Any) -> "Numbers":
        """All of them as float32 or float64, as the entries are."""
        return self._replace(**{name: tuple(kind(x) for x in getattr(self, name)) for name in self._fields[:-1]})


class Chunk(NamedTuple):
    """Entries `offset` to `offset + n` of a tensor, and where the result goes.

    Attributes:
        means: (models, n), uint16 for bfloat16 bits, float32 or float64.
        precisions: (models, n), uint16 for bfloat16 bits or float32; (models, 0) without.
        extras: (models, rows), float32: added to H by row.
        first: Entries of the first row that are still to come.
        row: Entries of every other row.
        offset: Index of the first entry in its tensor.
        mean: (n,) uint16, float32 or float64: the merged mean.
        precision: (n,) float32: the merged precision; (0,) without.
    """

    means: Array
    precisions: Array
    extras: Array
    first: int
    row: int
    offset: int
    mean: Array
    precision: Array


@dataclass
class Tally:
    """Sums over entries, for the report.

    Attributes:
        bad_means, bad_precisions: Per model: entries not finite; precisions negative or not finite.
        bad: Merged entries that are not finite after rounding.
        changed, lost: Entries at which some task with a scale differs from the base, and those of them at which
            rounding gave back the base's value.
        guarded: Entries at which the guard acted.
        multiplier: Largest `|scale_t| (H_t + P_t) / S` of a removal.
        stored: Per model: sum of stored precisions.
    """

    models: int
    bad_means: Array = field(init=False)
    bad_precisions: Array = field(init=False)
    stored: Array = field(init=False)
    entries: int = 0
    bad: int = 0
    changed: int = 0
    lost: int = 0
    guarded: int = 0
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        self.bad_means = np.zeros(self.models, np.int64)
        self.bad_precisions = np.zeros(self.models, np.int64)
        self.stored = np.zeros(self.models)


Pass = Callable[[Chunk, Numbers, Tally], None]
# Adds a chunk's statistics to `totals`: (statistics,) of float64 or (statistics, BINS) of int64.
Reduce = Callable[[Chunk, Numbers, Array], None]

LANES = 8  # interleaved partial sums: a fixed order of addition that also vectorises


def likelihood(stored: Any, gain: Any, inside: Any, share: Any, of_base: Any, floor: Any, extra: Any) -> Any:
    """`max(gain (S - (inside + share H_0)) + extra, floor)`: what a model's data added, from its stored precision.

    IVON's h may lie a little below zero, and S below its prior; a gain would stretch that below the prior itself.
    """
    added = gain * (stored - (inside + share * of_base)) + extra
    return select(added < floor, floor, added)


def alone(mean: Any, prior: Any, likelihood: Any) -> Gaussian:
    """A posterior by its own prior: the base, or a model of an average."""
    return Gaussian(mean, prior + likelihood)


def follow(base: Gaussian, mean: Any, likelihood: Any) -> Gaussian:
    """A task by the base posterior as prior, under the published anchor."""
    return Gaussian(mean, base.precision + likelihood)


def follow_anchored(base: Gaussian, mean: Any, likelihood: Any, pull: Any, decay: Any) -> Gaussian:
    """A task under its own anchor; a pull below zero stands for the published one."""
    task = rebase(base, mean, likelihood, pull, decay)
    return Gaussian(select(pull < 0, mean, task.mean), task.precision)


def grow(precision: Any, base: Gaussian, task: Gaussian, scale: Any) -> Any:
    """One term of gradient matching's precision before its guard, by the same operations."""
    return precision + scale * (task.precision - base.precision)


def strength(base: Gaussian, task: Gaussian, pull: Any) -> Any:
    """`H + P`, by which a task's own vector is multiplied (before its scale and the division)."""
    return select(pull < 0, task.precision, task.precision - base.precision + pull)


def task_key(seed: int, tensor: str, task: str) -> np.uint64:
    """The key of a task's random numbers in one tensor; `task` is who it is, not where it stands."""
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{task}".encode()).digest()
    return _U64(int.from_bytes(digest[:8], "little"))


def keyed_draws(key: np.uint64, start: int, n: int) -> Array:
    """Uniform float32 numbers in [0, 1) of entries `start` to `start + n`: 24 bits of SplitMix64 (Steele et al., 2014).

    A number depends on key and entry alone, so that chunks, threads and machines agree.
    """
    with np.errstate(over="ignore"):
        z = key + (np.arange(start, start + n, dtype=_U64) + _U64(1)) * _U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
        z = z ^ (z >> _U64(31))
    return (z >> _U64(40)).astype(np.float32) * np.float32(2.0**-24)
