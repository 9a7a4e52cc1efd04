"""Merge adapters factor by factor, where an average of factors is an average of their changes.

A pair of factors is known only up to an invertible matrix, `B A = (B R)(R^-1 A)`, so that an
average of factors is in general not the average of the changes. It is where one factor is the same
in all adapters, since the change is linear in the other; and it is close to it where all runs
started from one A.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.identity import full_hash
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora.adapter import INITIAL_A
from mergekit_bayes.lora.dense import VARIANCE_FLOOR
from mergekit_bayes.lora.inputs import AdapterMerge, LayerCopy, Layers
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.lora.products import weighted_change
from mergekit_bayes.lora.truncate import Truncated, as_stored, as_stored_dense

_WAY_OUT = "Use --space product, or concat."


class Averaging(NamedTuple):
    """How factors may be averaged.

    Attributes:
        is_linear: Whether every layer has a factor that all its adapters share. If not, the
            adapters started from one A, so that averages of factors are close.
        reason: Why, for the report.
    """

    is_linear: bool
    reason: str


def choose_averaging(merge: AdapterMerge, layers: Layers) -> Averaging:
    """Decide how the factors of adapters may be averaged.

    Args:
        merge: The adapters.
        layers: Their layers.

    Raises:
        ConfigError: The scales are not shares, which averages of factors need, or there are
            stacked experts.
        MismatchError: No average is close; the message says by how much the factors differ.
    """
    stack = next((c[0].layer for c in layers.values() if c[0].layer.expert is not None), None)
    if stack is not None:
        raise ConfigError(
            f"--space factor does not merge stacked experts ('{stack.tensor}'). {_WAY_OUT}"
        )
    unshared = [copies for copies in layers.values() if _shared_factor(merge, copies) is None]
    if not unshared:
        return Averaging(
            is_linear=True,
            reason="every layer has a factor that all adapters share: the merge is linear in the "
            "other",
        )
    for copies in unshared:
        if len({copy.layer.rank for copy in copies}) > 1:
            ranks = ", ".join(
                f"{copy.layer.rank} in '{merge.adapters[copy.owner].ref}'" for copy in copies
            )
            raise MismatchError(
                f"'{copies[0].layer.module}' has rank {ranks}: such factors do not add. {_WAY_OUT}"
            )
    infos = [adapter.posterior.info for adapter in merge.adapters]
    starts = [info.training.get(INITIAL_A) if info is not None else None for info in infos]
    if starts[0] is not None and len(set(starts)) == 1:
        if min(merge.scales) < 0 or not sum(merge.scales):
            raise ConfigError(
                "--space factor averages factors of one start: the scales are shares, none below "
                "zero."
            )
        error = (
            "the distance from the average of the changes by precision"
            if merge.weights == "precision"
            else "the cross terms"
        )
        return Averaging(
            is_linear=False,
            reason=f"all adapters record one initial A: factors are averaged, with {error} as the "
            "error",
        )
    why = "they record different ones" if all(starts) else "no record says so"
    raise _not_averaged(merge, unshared, why)


def merge_factors(merge: AdapterMerge, rank: int, copies: Sequence[LayerCopy]) -> Truncated:
    """Merge the factors of one layer.

    With a shared factor the result is the weighted sum of the other, which is exact, so that the
    error is that of rounding. With one start it is the weighted average of both, and the error is
    the distance from what it stands for: the average of the changes, `sum_t c_t s_t B_t A_t / sum_t
    c_t`, or, where factors are weighed, that weighted by the precision of the products, as in
    product space.

    Raises:
        PrecisionError: The factors are weighed, and a precision is missing.
    """
    shared = _shared_factor(merge, copies)
    factors = [merge.scaled(copy) for copy in copies]
    shares = [merge.scales[copy.owner] for copy in copies]
    is_weighed = merge.weights == "precision"
    if (is_weighed or merge.averaged) and not any(shares):  # of nothing there is no average
        none = Factors(*map(np.zeros_like, factors[0]))
        return as_stored(none, rank, none.b, none.a)
    results: dict[str, Array] = {}
    for side in Factors._fields:
        values = [getattr(f, side) for f in factors]
        if side == shared:
            results[side] = values[0]
            continue
        weights = [
            _factor_precision(merge, copy, side) if is_weighed else np.float64(1) for copy in copies
        ]
        amounts = [c * w for c, w in zip(shares, weights, strict=True)]
        total = sum(amounts) if is_weighed or merge.averaged else 1.0
        results[side] = sum(w * v for w, v in zip(amounts, values, strict=True)) / total
    merged = Factors(results["a"], results["b"])
    if shared is not None:
        return as_stored(merged, rank, merged.b, merged.a)
    if is_weighed:
        return as_stored_dense(merged, rank, weighted_change(merge, copies))
    left, right = merge.stacked(copies)
    return as_stored(merged, rank, left / sum(shares), right)


def _shared_factor(merge: AdapterMerge, copies: Sequence[LayerCopy]) -> str | None:
    """The factor, `a` or `b`, that is the same in all adapters of a layer."""
    for side in Factors._fields:
        names = [getattr(copy.layer, side) for copy in copies]
        means = [merge.adapters[copy.owner].posterior.mean for copy in copies]
        if len({full_hash(m, name) for m, name in zip(means, names, strict=True)}) == 1:
            return side
    return None


def _not_averaged(
    merge: AdapterMerge, unshared: Sequence[Sequence[LayerCopy]], why: str
) -> MismatchError:
    """The error for adapters that did not start from one A, with what an average would miss."""
    apart = max(_difference_of_starts(merge, copies) for copies in unshared)
    plain = merge._replace(scales=(1.0,) * len(merge.scales), weights="uniform", averaged=True)
    error = max(merge_factors(plain, copies[0].layer.rank, copies).error for copies in unshared)
    return MismatchError(
        "the factors of these adapters cannot be averaged: a pair is known only up to an "
        "invertible matrix, B A = (B R)(R^-1 A), and that they started from one A is not known "
        f"({why}). Their A's differ by up to {apart:.2f} of their norm, and averaged factors would "
        f"miss the average change by up to {error:.0%} of it. {_WAY_OUT}"
    )


def _difference_of_starts(merge: AdapterMerge, copies: Sequence[LayerCopy]) -> float:
    """The largest distance of an A from the first one, relative to the first one's norm."""
    first, *others = (merge.scaled(copy).a for copy in copies)
    scale = float(np.linalg.norm(first)) or 1.0
    return max(float(np.linalg.norm(first - a)) / scale for a in others)


def _factor_precision(merge: AdapterMerge, copy: LayerCopy, side: str) -> Array:
    """Precision of A, or of `s B`, in float64."""
    adapter, name = merge.adapters[copy.owner], getattr(copy.layer, side)
    precisions = adapter.precisions(copy.layer, merge.counts[copy.owner])
    stored = precisions[Factors._fields.index(side)]
    if stored is None:
        raise PrecisionError(
            f"no precision for '{name}' of '{adapter.ref}'. Make a full one with `bmerge "
            "precision`, or merge with --weights uniform."
        )
    # DELTA_0 makes an average of entries that have no precision in any adapter.
    precision = stored.astype(np.float64) + DELTA_0
    return precision / max(copy.layer.scaling**2, VARIANCE_FLOOR) if side == "b" else precision
