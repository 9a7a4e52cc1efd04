"""What a pass takes and gives, whichever library carries it out, and the steps that both share.

The one convention about the base: wherever something is listed per model (`Chunk.means`,
`Numbers.gains`, `Tally.stored`), the base comes first, as model 0, and the tasks follow; without a
base, model 0 is the first task. What is listed per task (`Numbers.scales`, `Numbers.keys`) leaves
the base out.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.draws import word
from mergekit_bayes.gaussian import Gaussian, Number, rebase, select
from mergekit_bayes.methods.base import Facts, Method

Array: TypeAlias = NDArray[Any]
Constants: TypeAlias = tuple[Number, ...]

BLOCK = 2048  # entries that a compiled pass works on at a time: eight arrays fit the first caches
LANES = 8  # interleaved partial sums: a fixed order of addition that also vectorises


class Kind(NamedTuple):
    """Which pass it is: everything that is decided once per tensor, not once per entry.

    Attributes:
        method: The rule.
        weighs: Whether precisions are read and written.
        has_base: Whether model 0 is the base.
        anchored: Whether some task was pulled to something other than the base posterior.
        removes: Whether the guard on removal may act; it is then counted.
        pulled: Whether the record of some model tells of a pull, whose products are then summed.
    """

    method: Method
    weighs: bool
    has_base: bool
    anchored: bool
    removes: bool
    pulled: bool = False


class Numbers(NamedTuple):
    """The constants of a pass.

    The likelihood precision of model i at an entry with stored precision S, in row r of the chunk:

        H_i = max(gain_i (S - (contained_i + base_share_i H_0)) + extra_ir, floor_i)

    with H_0 that of the base.

    Attributes:
        scales: Per task.
        facts: What the method's first pass and settings told it.
        gains: Per model: observations that count, over those by which S is scaled.
        contained: Per model: the scalar prior inside S.
        base_shares: Per model: multiple of H_0 inside S; 0 for a model that is not a merge.
        floors: Per model: 0, or minus infinity for a merge, which may itself be a removal.
        priors: Per model: added to H where a posterior stands on its own.
        anchors: Per model: precision of the pull to the base in training; below zero for the
            published choice, the base's own precision.
        decays: Per model: precision of the pull to zero in training.
        keys: Per task: key of its random numbers; empty unless the method draws.
    """

    scales: Constants
    facts: Facts
    gains: Constants
    contained: Constants
    base_shares: Constants
    floors: Constants
    priors: Constants
    anchors: Constants
    decays: Constants
    keys: tuple[np.uint64, ...]

    def cast(self, dtype: type[np.floating[Any]]) -> "Numbers":
        """The same numbers as float32 or float64, as the entries are; keys stay integers."""
        with np.errstate(over="ignore"):  # a merge that is not finite is refused as such
            numbers: Numbers = _cast(self._replace(keys=()), dtype)
        return numbers._replace(keys=self.keys)


def _cast(value: Any, dtype: type[np.floating[Any]]) -> Any:
    if value is None:
        return None
    if not isinstance(value, tuple):
        return dtype(value)
    items = [_cast(item, dtype) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


class Chunk(NamedTuple):
    """Entries `offset` to `offset + n` of a tensor, and where the result goes.

    Attributes:
        means: (models, n), uint16 for bfloat16 bits, float32 or float64.
        precisions: (models, n), uint16 for bfloat16 bits or float32; (models, 0) without.
        extras: (models, rows), float32 or float64 as the arithmetic: added to H by row.
        first: Entries left in the row with which the chunk begins.
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
        models: Number of models.
        bad_means: Per model, entries that are not finite.
        bad_precisions: Per model, precisions that are negative or not finite.
        stored: Per model, sum of stored precisions.
        entries: Entries merged.
        bad: Merged entries that are not finite after rounding.
        changed: Entries at which some task with a scale differs from the base.
        lost: Those of the changed at which rounding gave back the base's value.
        guarded: Entries at which the guard acted.
        multiplier: Largest `|scale_t| (H_t + P_t) / S` of a removal.
        distances: Per model, sums of `H (m* - m)^2` and of `H (m0 - m)^2`, with the merged mean m*
            as it is stored, the base's m0 (without a base zero) and H without what shrinkage adds.
            Of precisions only.
        products: Per model, sums of `(m - m0) (m* - m)` and of `m (m* - m)`, where `Kind.pulled`.
    """

    models: int
    bad_means: Array = field(init=False)
    bad_precisions: Array = field(init=False)
    stored: Array = field(init=False)
    distances: Array = field(init=False)
    products: Array = field(init=False)
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
        self.distances = np.zeros((self.models, 2))
        self.products = np.zeros((self.models, 2))


Pass: TypeAlias = Callable[[Chunk, Numbers, Tally], None]
# Adds a chunk's statistics to `totals`: (statistics,) of float64 or (statistics, BINS) of int64.
Reduce: TypeAlias = Callable[[Chunk, Numbers, Array], None]


def likelihood_precision(
    numbers: Numbers, model: int, stored: Number, of_base: Number, extra: Number
) -> Number:
    """H, what a model's data added, from its stored precision; see `Numbers`.

    IVON's h may lie a little below zero, and S below its prior; a gain would stretch that below the
    prior itself.

    Args:
        numbers: The constants of the pass.
        model: Index of the model.
        stored: S, its stored precision.
        of_base: H_0, that of the base; for the base itself, zero.
        extra: Added by row.
    """
    contained = numbers.contained[model] + numbers.base_shares[model] * of_base
    added = numbers.gains[model] * (stored - contained) + extra
    floor = numbers.floors[model]
    return select(added < floor, floor, added)


def base_likelihood(
    numbers: Numbers, stored: Array | Sequence[Array], extras: Array | Sequence[Array]
) -> Number:
    """H_0, the likelihood precision of model 0.

    Args:
        numbers: The constants of the pass.
        stored: Per model, its stored precision.
        extras: Per model, what is added by row.
    """
    return likelihood_precision(numbers, 0, stored[0], 0, extras[0])


def single_precision(numbers: Numbers, model: int, stored: Number, extra: Number) -> Number:
    """The precision of one model with its own prior, where no other has the entry.

    Args:
        numbers: The constants of the pass.
        model: Index of the model.
        stored: Its stored precision.
        extra: What is added to its H by row.
    """
    likelihood = likelihood_precision(numbers, model, stored, 0, extra)
    return own_posterior(np.float32(0), numbers.priors[model], likelihood).precision


def unchanged_precision(numbers: Numbers, model: int, of_base: Number, extra: Number) -> Number:
    """The stored precision at which a model's data added nothing: its likelihood precision is 0.

    Args:
        numbers: The constants of the pass.
        model: Index of the model.
        of_base: H_0, that of the base.
        extra: What is added to the model's H by row.
    """
    contained = numbers.contained[model] + numbers.base_shares[model] * of_base
    return contained - extra / numbers.gains[model]


def own_posterior(mean: Number, prior: Number, likelihood: Number) -> Gaussian:
    """The posterior of a model with its own prior: the base, or a model of an average."""
    return Gaussian(mean, prior + likelihood)


def task_posterior(base: Gaussian, mean: Number, likelihood: Number) -> Gaussian:
    """The posterior of a task with the base posterior as prior, under the published anchor."""
    return Gaussian(mean, base.precision + likelihood)


def anchored_task_posterior(
    base: Gaussian, mean: Number, likelihood: Number, anchor: Number, decay: Number
) -> Gaussian:
    """The posterior of a task under its own anchor; one below zero stands for the published."""
    task = rebase(base, mean, likelihood, anchor, decay)
    return Gaussian(select(anchor < 0, mean, task.mean), task.precision)


def removal_multiplier(
    base: Gaussian, task: Gaussian, scale: Number, anchor: Number, precision: Number
) -> Number:
    """`-scale (H + P) / S`: the multiple of its task vector by which a removal moves the mean.

    Args:
        base: The base posterior.
        task: The task's posterior, re-based.
        scale: Below zero.
        anchor: P; below zero for the published choice.
        precision: S, the merged precision.
    """
    pulled = select(anchor < 0, task.precision, task.precision - base.precision + anchor)
    return -scale * pulled / precision


def task_key(seed: int, tensor: str, task: str) -> np.uint64:
    """The key of a task's random numbers in one tensor.

    Args:
        seed: The merge's seed.
        tensor: Name of the tensor.
        task: The identity of the task's mean, so that the order of tasks does not matter.
    """
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{task}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def keyed_draws(key: np.uint64, start: int, n: int) -> Array:
    """Uniform float32 numbers in [0, 1) of entries `start` to `start + n`: 24 bits of each word."""
    counters = np.arange(start, start + n, dtype=np.uint64) + np.uint64(1)
    bits: NDArray[np.uint64] = word(key, counters) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)
