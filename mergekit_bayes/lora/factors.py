"""Merge adapters factor by factor, or in the space of their products."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.identity import full_hash
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora.adapter import INITIAL_A, Adapter, Factors, Layer
from mergekit_bayes.lora.truncate import Truncated, product_norm

Space = Literal["product", "concat", "factor"]
Weights = Literal["uniform", "precision"]


class WeighedLayer(NamedTuple):
    """An adapter's share of one layer or tensor."""

    owner: int
    layer: Layer


class AdapterMerge(NamedTuple):
    adapters: Sequence[Adapter]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    weights: Weights
    seed: int
    averaged: bool = False  # factors, where not every layer shares one

    def scaled(self, part: WeighedLayer) -> Factors:
        """A and s B of a layer, in float64."""
        a, b = self.adapters[part.owner].factors(part.layer)
        return Factors(a.astype(np.float64), part.layer.scaling * b.astype(np.float64))

    def stacked(self, parts: Sequence[WeighedLayer]) -> tuple[Array, Array]:
        """`[c_1 s_1 B_1, ...]` and `[A_1; ...]`."""
        factors = [self.scaled(part) for part in parts]
        left = [self.scales[part.owner] * f.b for part, f in zip(parts, factors, strict=True)]
        return np.concatenate(left, 1), np.concatenate([f.a for f in factors])


def as_stored(factors: Factors, rank: int, left: Array, right: Array) -> Truncated:
    """Float64 factors as they are stored, padded with zeros to a rank, against the change `left
    right`.
    """
    a, b = np.zeros((rank, right.shape[1]), np.float32), np.zeros((left.shape[0], rank), np.float32)
    a[: len(factors.a)], b[:, : len(factors.a)] = factors.a, factors.b
    norm = product_norm(left, right)
    lacking = product_norm(
        np.concatenate([left, -b.astype(np.float64)], 1), np.concatenate([right, a])
    )
    return Truncated(Factors(a, b), lacking / norm if norm else 0.0, norm)


def _shared(merge: AdapterMerge, parts: Sequence[WeighedLayer]) -> str | None:
    """The factor, `a` or `b`, that is the same in all adapters of a layer."""
    for side in Factors._fields:
        hashes = set()
        for part in parts:
            mean = merge.adapters[part.owner].posterior.mean
            hashes.add((getattr(part.layer, side), full_hash(mean, getattr(part.layer, side))))
        if len({digest for _, digest in hashes}) == 1:
            return side
    return None


def is_linear(
    merge: AdapterMerge, layers: Mapping[str, Sequence[WeighedLayer]], notes: list[str]
) -> bool:
    """True if every layer has a shared factor, False for one start; else the average of factors
    means nothing.
    """
    own = [parts for parts in layers.values() if _shared(merge, parts) is None]
    if not own:
        notes.append(
            "every layer has a factor that all adapters share: the merge is linear in the other"
        )
        return True
    for parts in own:
        if len({part.layer.rank for part in parts}) > 1:
            ranks = ", ".join(
                f"{part.layer.rank} in '{merge.adapters[part.owner].ref}'" for part in parts
            )
            raise MismatchError(
                f"'{parts[0].layer.module}' has rank {ranks}: such factors do not add. {_WAY_OUT}"
            )
    starts = [
        i.training.get(INITIAL_A) if (i := a.posterior.info) is not None else None
        for a in merge.adapters
    ]
    if starts[0] is not None and len(set(starts)) == 1:
        if min(merge.scales) < 0 or not sum(merge.scales):
            raise ConfigError(
                "--space factor averages factors of one start: the scales are shares, none below "
                "zero."
            )
        notes.append(
            "all adapters record one initial A: factors are averaged, with the cross terms as the "
            "error"
        )
        return False
    apart = max(_apart(merge, parts) for parts in own)
    plain = merge._replace(scales=(1.0,) * len(merge.scales), weights="uniform", averaged=True)
    error = max(merge_factors(plain, parts[0].layer.rank, parts).error for parts in own)
    why = "they record different ones" if all(starts) else "no record says so"
    raise MismatchError(
        "the factors of these adapters cannot be averaged: a pair is known only up to an "
        "invertible matrix, "
        f"B A = (B R)(R^-1 A), and that they started from one A is not known ({why}). Their A's "
        "differ by up to "
        f"{apart:.2f} of their norm, and averaged factors would miss the average change by up to "
        f"{error:.0%} of it. "
        f"{_WAY_OUT}"
    )


_WAY_OUT = "Use --space product, or concat."


def _apart(merge: AdapterMerge, parts: Sequence[WeighedLayer]) -> float:
    first, *others = (merge.scaled(part).a for part in parts)
    scale = float(np.linalg.norm(first)) or 1.0
    return max(float(np.linalg.norm(first - a)) / scale for a in others)


def merge_factors(merge: AdapterMerge, rank: int, parts: Sequence[WeighedLayer]) -> Truncated:
    """One factor shared: the other's weighted sum. One start: the weighted average of both."""
    shared = _shared(merge, parts)
    factors = [merge.scaled(part) for part in parts]
    shares = [merge.scales[part.owner] for part in parts]
    precise = merge.weights == "precision"
    found = {}
    for side in Factors._fields:
        values = [getattr(f, side) for f in factors]
        if side == shared:
            found[side] = values[0]
            continue
        strengths = [_strength(merge, part, side) if precise else np.float64(1) for part in parts]
        amounts = [c * w for c, w in zip(shares, strengths, strict=True)]
        total = sum(amounts) if precise or merge.averaged else 1.0
        found[side] = sum(w * v for w, v in zip(amounts, values, strict=True)) / total
    merged = Factors(found["a"], found["b"])
    if shared is not None:
        return as_stored(merged, rank, merged.b, merged.a)
    left, right = merge.stacked(parts)
    return as_stored(merged, rank, left / sum(shares), right)


def _strength(merge: AdapterMerge, part: WeighedLayer, side: str) -> Array:
    """Precision of A or of s B."""
    adapter = merge.adapters[part.owner]
    stored = adapter.counted(getattr(part.layer, side), merge.counts[part.owner])
    if stored is None:
        raise PrecisionError(
            f"no precision for '{getattr(part.layer, side)}' of '{adapter.ref}'. Make a full one "
            "with "
            "`bmerge precision`, or merge with --weights uniform."
        )
    # delta_0 of `gaussian`: entries of no precision anywhere are averaged.
    wide = stored.astype(np.float64) + 1e-12
    return wide / part.layer.scaling**2 if side == "b" else wide
