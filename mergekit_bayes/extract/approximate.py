"""The low-rank approximation of the change of one weight, with its rank and what it loses."""

import math
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.extract.settings import Dtype
from mergekit_bayes.extract.sweeps import sweep
from mergekit_bayes.extract.weighting import Weighting, half_square
from mergekit_bayes.lora.truncate import leading_directions

_FIRST = 64  # directions of a large matrix that are looked at first, where no rank is given
_UNIT = 2.0**-24  # half the distance of float32 numbers, relative to them
_TRIES = 8  # ranks that are tried where the precision has one number an entry


class Limits(NamedTuple):
    """What a layer may have and lose.

    Attributes:
        rank: Largest rank; None for any.
        tolerance: Largest share of the loss of leaving the change out; None for as little as the
            rank allows.
        sweeps: Most sweeps where there is no closed form.
        dtype: Number format in which the factors are stored.
    """

    rank: int | None
    tolerance: float | None
    sweeps: int
    dtype: Dtype


class Approximation(NamedTuple):
    """Factors of a change, in the layout of the stored weight.

    Attributes:
        left: F, shape (p, k), float32.
        right: G, shape (k, q), float32.
        change: The loss that leaving the change out costs.
        lost: The loss that the factors cost, as they are stored.
        norm: Frobenius norm of the change.
        lost_norm: Frobenius norm of what the factors lack.
        sweeps: How many sweeps improved them.
    """

    left: Array
    right: Array
    change: float
    lost: float
    norm: float
    lost_norm: float
    sweeps: int

    @property
    def rank(self) -> int:
        """k; 0 where nothing but rounding is left of the change."""
        return int(self.left.shape[1])


class _Candidate(NamedTuple):
    left: Array
    right: Array
    lost: float
    sweeps: int


def approximate(
    change: Array, weighting: Weighting, limits: Limits, *, weight_norm: float, seed: int = 0
) -> Approximation:
    """Approximate a change by factors of the smallest rank that the limits allow.

    Directions that rounding the weights to float32 makes by itself are left out: a random matrix of
    that size has no singular value above `2^-24 rms (sqrt(p) + sqrt(q))` (Bai and Yin, 1993).

    Args:
        change: D = W_tuned - W_base, shape (p, q), finite.
        weighting: What weighs its entries.
        limits: What the layer may have and lose.
        weight_norm: Frobenius norm of the weight, for the size of its rounding.
        seed: Seed of the decomposition of large matrices.

    Raises:
        CheckpointError: The change is beyond float32.
    """
    whole, norm = weighting.loss(change), float(np.sqrt(2 * half_square(change)))
    spectrum = _Spectrum(change, weighting, limits, weight_norm / norm if norm else 0.0, seed)
    chosen = _choose(change, weighting, limits, spectrum, whole)
    left, right = _stored(chosen.left, chosen.right, limits.dtype)
    rest = change - left @ right
    return Approximation(
        left,
        right,
        whole,
        weighting.loss(rest),
        norm,
        float(np.sqrt(2 * half_square(rest))),
        chosen.sweeps,
    )


class _Spectrum:
    """The singular values of a transformed change, as far as they are needed.

    Attributes:
        largest: The largest rank that the limits allow and the change has.
        tail: By rank from 0 on, the share of the squared norm that is lost at it.
    """

    def __init__(
        self, change: Array, weighting: Weighting, limits: Limits, ratio: float, seed: int
    ) -> None:
        self._weighting = weighting
        moved = weighting.transform(change)
        whole = 2 * half_square(moved)
        p, q = change.shape
        edge = _UNIT * ratio * np.sqrt(whole / (p * q)) * (np.sqrt(p) + np.sqrt(q))
        # Products in float32 shall neither overflow nor vanish; a power of two rounds nothing.
        size = 2.0 ** round(math.log2(whole) / 2) if whole else 1.0
        moved = moved / moved.dtype.type(size)
        wanted = min(limits.rank or min(p, q), min(p, q))
        looked_at = wanted if limits.tolerance is None else min(wanted, _FIRST)
        while True:
            self._u, sigma, self._v = leading_directions(moved, looked_at, seed)
            self._sigma = size * sigma
            found = min(wanted, int(np.sum(self._sigma > edge)))
            kept = np.cumsum(np.square(self._sigma[:looked_at]))
            self.tail = np.concatenate([[1.0], 1 - kept / whole]) if whole else np.zeros(1)
            is_enough = limits.tolerance is not None and self.tail[-1] <= limits.tolerance
            if looked_at >= wanted or found < looked_at or is_enough:
                break
            looked_at = min(wanted, 2 * looked_at)
        self.largest = min(found, len(self.tail) - 1)

    def factors(self, rank: int) -> tuple[Array, Array]:
        """The factors of the best approximation of that rank in the transformed norm."""
        root = np.sqrt(self._sigma[:rank])
        return self._weighting.restore(self._u[:, :rank] * root, root[:, None] * self._v[:rank])


def _choose(
    change: Array, weighting: Weighting, limits: Limits, spectrum: _Spectrum, whole: float
) -> _Candidate:
    """The approximation of the smallest rank within the tolerance, or of the largest rank."""
    largest, tolerance = spectrum.largest, limits.tolerance

    def make(rank: int) -> _Candidate:
        left, right = (np.asarray(f, np.float32) for f in spectrum.factors(rank))
        if weighting.entries is None or rank == 0:
            return _Candidate(left, right, weighting.loss(change - left @ right), 0)
        return _Candidate(*sweep(change, weighting.entries, left, right, limits.sweeps))

    if tolerance is None or largest == 0:
        return make(largest)
    within = np.flatnonzero(spectrum.tail[: largest + 1] <= tolerance)
    guess = int(within[0]) if within.size else largest
    if weighting.entries is None and not weighting.terms:
        return make(guess)
    # The spectrum is that of a weighting near the true one, so that the rank is searched for.
    low, high, found = 0, largest, None
    for _ in range(_TRIES):
        candidate = make(guess)
        if candidate.lost <= tolerance * whole:
            high, found = guess, candidate
        else:
            low = guess + 1
        if low >= high:
            break
        guess = (low + high) // 2
    return found if found is not None else make(largest)


def _stored(left: Array, right: Array, dtype: Dtype) -> tuple[Array, Array]:
    """Factors as they are read back, with columns of F as long as the rows of G."""
    lengths = (
        np.linalg.norm(left.astype(np.float64), axis=0),
        np.linalg.norm(right.astype(np.float64), axis=1),
    )
    scale = np.sqrt(np.divide(*lengths[::-1], out=np.ones_like(lengths[0]), where=lengths[0] > 0))
    scale[scale == 0] = 1.0
    balanced = left * scale, right / scale[:, None]
    left, right = (
        decode(np.frombuffer(encode(f.astype(np.float32), dtype), np.uint8), dtype).reshape(f.shape)
        for f in map(np.ascontiguousarray, balanced)
    )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise CheckpointError(f"the change of a layer is beyond {dtype}. Use --dtype F32.")
    return left, right
