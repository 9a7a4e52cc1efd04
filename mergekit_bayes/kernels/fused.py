"""The pass compiled by numba: a method's own function, inlined into one loop over stored bits.

Compiled once a method, number of models and kind of numbers, and cached on disk beside this file (where that cannot be
written, in the user's cache folder). The loop works on blocks that stay in the first caches and is written so that LLVM
vectorises it: two-dimensional inputs, an inner loop from zero, no sum in it. float32 stays float32 and nothing is
reassociated or contracted, so that it gives the bits of `plain_pass`.
"""

import inspect
import zlib
from typing import Any

import llvmlite.binding
import numpy as np
from numba import types
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload

from mergekit_bayes import gaussian
from mergekit_bayes.compiled import compiled, inlined
from mergekit_bayes.gaussian import Gaussian, constant, rebase, select
from mergekit_bayes.kernels import base
from mergekit_bayes.kernels.base import (
    LANES,
    Array,
    Chunk,
    Kind,
    Numbers,
    Pass,
    Reduce,
    Tally,
    alone,
    follow,
    follow_anchored,
    grow,
    likelihood,
    strength,
)
from mergekit_bayes.methods.base import SHIFT, Method

# Loops over models must vanish: an index into a tuple that is known at run time only is a switch, and nothing is
# vectorised around it. LLVM's own threshold gives up at seven models.
llvmlite.binding.set_option("bmerge", "-unroll-threshold=100000")

_BLOCK = 2048  # entries; eight arrays of it fit the first two caches


for _function in (rebase, alone, follow, follow_anchored, grow, likelihood, strength):
    inlined(_function)


@overload(select, jit_options={"forceinline": True})
def _select(condition, yes, no):  # type: ignore[no-untyped-def]
    return lambda condition, yes, no: yes if condition else no


@overload(constant, jit_options={"forceinline": True})
def _constant(value, like):  # type: ignore[no-untyped-def]
    if like == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


def fused_pass(kind: Kind) -> Pass:
    """The pass of `kind`, compiled (or from the cache) when it first runs."""
    if kind not in _KERNELS:
        _KERNELS[kind] = _make(
            inlined(kind.method.combine), _stamp(kind.method), kind.weighs, kind.has_base, kind.anchored, kind.removes,
            kind.method.random,
        )  # fmt: skip
    kernel = _KERNELS[kind]

    def run(chunk: Chunk, numbers: Numbers, tally: Tally) -> None:
        zero = chunk.extras.dtype.type(0)
        template = tuple(Gaussian(zero, zero) for _ in numbers.scales)
        counts, largest = np.zeros(4, np.int64), np.zeros(1)
        kernel(
            chunk.means, chunk.precisions, chunk.extras, chunk.first, chunk.row, np.uint64(chunk.offset),
            numbers.scales, numbers.facts, numbers.gains, numbers.insides, numbers.shares, numbers.floors,
            numbers.priors, numbers.pulls, numbers.decays, numbers.keys, zero, template, chunk.mean, chunk.precision,
            tally.bad_means, tally.bad_precisions, tally.stored, counts, largest,
        )  # fmt: skip
        tally.entries += chunk.mean.size
        tally.bad += int(counts[0])
        tally.changed += int(counts[1])
        tally.lost += int(counts[2])
        tally.guarded += int(counts[3])
        tally.multiplier = max(tally.multiplier, float(largest[0]))

    return run


_KERNELS: dict[Any, Any] = {}


def _stamp(method: Method) -> int:
    """Changes with any source that is compiled into a kernel: numba's cache looks at this file alone."""
    sources = (inspect.getsource(inspect.getmodule(method.combine) or base), inspect.getsource(base),
               inspect.getsource(gaussian))  # fmt: skip
    return zlib.crc32("".join(sources).encode())


# Compiled by type: bfloat16 bits are widened and rounded, anything else is cast to the kind of the arithmetic.
def _widen(stored: Any, zero: Any) -> Any: ...
def _round(value: Any, like: Any) -> Any: ...
def _magnitude(stored: Any) -> Any: ...
def _bits(stored: Any) -> Any: ...
def _infinity(stored: Any) -> Any: ...
def _is_bad(stored: Any) -> Any: ...
def _is_bad_precision(stored: Any) -> Any: ...
def _draw(key: Any, entry: Any, zero: Any) -> Any: ...


@overload(_widen, jit_options={"forceinline": True})
def _widen_by_type(stored, zero):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):
        if zero == types.float32:
            return lambda stored, zero: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
        return lambda stored, zero: np.float64(np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32))
    if zero == types.float32:
        return lambda stored, zero: np.float32(stored)
    return lambda stored, zero: np.float64(stored)


@overload(_round, jit_options={"forceinline": True})
def _round_by_type(value, like):  # type: ignore[no-untyped-def]
    if isinstance(like, types.Integer):

        def to_nearest_even(value, like):  # type: ignore[no-untyped-def]
            bits = np.float32(value).view(np.uint32)
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return to_nearest_even
    if like == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


@overload(_is_bad, jit_options={"forceinline": True})
def _is_bad_by_type(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):
        return lambda stored: (np.uint32(stored) & np.uint32(0x7F80)) == np.uint32(0x7F80)
    if stored == types.float32:
        return lambda stored: (np.float32(stored).view(np.uint32) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return lambda stored: not np.isfinite(stored)


@overload(_is_bad_precision, jit_options={"forceinline": True})
def _is_bad_precision_by_type(stored):  # type: ignore[no-untyped-def]
    # As integers, the good ones lie below infinity; minus zero is good, too.
    if isinstance(stored, types.Integer):
        return lambda stored: (np.uint32(stored) >= np.uint32(0x7F80)) & (np.uint32(stored) != np.uint32(0x8000))
    return lambda stored: (
        (np.float32(stored).view(np.uint32) >= np.uint32(0x7F800000))
        & (np.float32(stored).view(np.uint32) != np.uint32(0x80000000))
    )


# The bits without the sign: in order of magnitude, infinity and NaN last.
@overload(_magnitude, jit_options={"forceinline": True})
def _magnitude_by_type(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):
        return lambda stored: np.uint16(np.uint32(stored) & np.uint32(0x7FFF))
    if stored == types.float32:
        return lambda stored: np.uint32(np.float32(stored).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return lambda stored: np.uint64(np.float64(stored).view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))


@overload(_bits, jit_options={"forceinline": True})
def _bits_by_type(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):
        return lambda stored: stored
    return lambda stored: np.float32(stored).view(np.uint32)


@overload(_infinity, jit_options={"forceinline": True})
def _infinity_by_type(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):
        return lambda stored: np.uint16(0x7F80)
    if stored == types.float32:
        return lambda stored: np.uint32(0x7F800000)
    return lambda stored: np.uint64(0x7FF0000000000000)


@overload(_draw, jit_options={"forceinline": True})
def _draw_by_type(key, entry, zero):  # type: ignore[no-untyped-def]
    kind = np.float32 if zero == types.float32 else np.float64

    def draw(key, entry, zero):  # type: ignore[no-untyped-def]
        z = key + (entry + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        return kind(np.float32(z >> np.uint64(40)) * np.float32(2.0**-24))

    return draw


@compiled(fastmath={"reassoc"})
def _tally(  # type: ignore[no-untyped-def]
    start, stop, means, precisions, scales, mean, zero, has_base, bad_means, bad_precisions, stored, counts
):
    """Count over one block. Sums are float32 within a block, which is enough for the report's ratios."""
    # A maximum of bits is several times cheaper than a count; the count follows only where it can be above zero.
    for i in range(means.shape[0]):
        worst = _magnitude(means[i, start])
        for j in range(start, stop):
            worst = max(worst, _magnitude(means[i, j]))
        if worst >= _infinity(means[i, start]):
            for j in range(start, stop):
                bad_means[i] += _is_bad(means[i, j])
        if precisions.shape[1] > 0:
            highest, total = _bits(precisions[i, start]), zero
            for j in range(start, stop):
                highest = max(highest, _bits(precisions[i, j]))
                total += _widen(precisions[i, j], zero)
            stored[i] += total
            if highest >= _infinity(precisions[i, start]):
                for j in range(start, stop):
                    bad_precisions[i] += _is_bad_precision(precisions[i, j])
    worst = _magnitude(mean[start])
    for j in range(start, stop):
        worst = max(worst, _magnitude(mean[j]))
    if worst >= _infinity(mean[start]):
        for j in range(start, stop):
            counts[0] += _is_bad(mean[j])
    if has_base:
        changed, lost = 0, 0
        for j in range(start, stop):
            moved = False
            for t in range(len(scales)):
                moved |= (means[t + 1, j] != means[0, j]) & (scales[t] != 0)
            changed += moved
            lost += moved & (mean[j] == _round(_widen(means[0, j], zero), mean[j]))
        counts[1] += changed
        counts[2] += lost


@inlined
def _entry(  # type: ignore[no-untyped-def]
    j, means, precisions, extra, gains, insides, shares, floors, priors, pulls, decays, zero, template, weighs,
    has_base, anchored,
):  # fmt: skip
    """The base (or the first task) and the tasks at entry j of a chunk."""
    tasks = template
    if not weighs:
        m = _widen(means[0, j], zero)
        for t in range(len(template)):
            task = _widen(means[t + has_base, j], zero)
            tasks = tuple_setitem(tasks, t, Gaussian(task, task))
        return Gaussian(m, m), tasks
    x = _widen(precisions[0, j], zero)
    of_base = likelihood(x, gains[0], insides[0], shares[0], x - x, floors[0], extra[0])
    centre = alone(_widen(means[0, j], zero), priors[0], of_base)
    for t in range(len(template)):
        i = t + has_base
        m, x = _widen(means[i, j], zero), _widen(precisions[i, j], zero)
        h = likelihood(x, gains[i], insides[i], shares[i], of_base, floors[i], extra[i])
        if not has_base:
            task = alone(m, priors[i], h)
        elif anchored:
            task = follow_anchored(centre, m, h, pulls[i], decays[i])
        else:
            task = follow(centre, m, h)
        tasks = tuple_setitem(tasks, t, task)
    return centre, tasks


def _make(  # type: ignore[no-untyped-def]
    combine: Any, stamp: int, weighs: bool, has_base: bool, anchored: bool, removes: bool, random: bool
):
    @compiled(error_model="numpy")
    def kernel(  # type: ignore[no-untyped-def]
        means, precisions, extras, first, row, offset, scales, facts, gains, insides, shares, floors, priors, pulls,
        decays, keys, zero, template, mean, precision, bad_means, bad_precisions, stored, counts, largest,
    ):  # fmt: skip
        _ = stamp
        entries = mean.size
        begin, segment, r = 0, min(first, entries), 0
        while begin < entries:
            end = min(begin + _BLOCK, segment)
            # Unsigned: an index that might be negative would be wrapped around, and the loop not vectorised.
            start, stop = np.uint64(begin), np.uint64(end)
            extra = gains
            for i in range(len(gains)):
                extra = tuple_setitem(extra, i, extras[i, r])
            for j in range(start, stop):
                centre, tasks = _entry(
                    j, means, precisions, extra, gains, insides, shares, floors, priors, pulls, decays, zero, template,
                    weighs, has_base, anchored,
                )  # fmt: skip
                if random:
                    draws = scales
                    for t in range(len(scales)):
                        draws = tuple_setitem(draws, t, _draw(keys[t], offset + j, zero))
                    merged = combine(centre, tasks, scales, facts, draws)
                else:
                    merged = combine(centre, tasks, scales, facts)
                mean[j] = _round(merged.mean, mean[j])
                if weighs:
                    precision[j] = merged.precision
            _tally(
                start, stop, means, precisions, scales, mean, zero, has_base, bad_means, bad_precisions, stored, counts
            )
            if removes:
                guarded, most = 0, np.uint32(0)
                for j in range(start, stop):
                    centre, tasks = _entry(
                        j, means, precisions, extra, gains, insides, shares, floors, priors, pulls, decays, zero,
                        template, weighs, has_base, anchored,
                    )  # fmt: skip
                    exact = centre.precision
                    # Not what was stored: that is float32 whatever the arithmetic.
                    guard = combine(centre, tasks, scales, facts).precision
                    for t in range(len(scales)):
                        exact = grow(exact, centre, tasks[t], scales[t])
                        if scales[t] < 0:
                            stretched = -scales[t] * strength(centre, tasks[t], pulls[t + 1]) / guard
                            # The bits of positive numbers are in their order, and their maximum vectorises.
                            most = max(most, np.float32(select(stretched > 0, stretched, zero)).view(np.uint32))
                    guarded += guard > exact
                counts[3] += guarded
                largest[0] = max(largest[0], np.float64(np.uint32(most).view(np.float32)))
            begin = end
            if end == segment:
                segment, r = min(segment + row, entries), r + 1

    return kernel


def fused_reduction(kind: Kind) -> Reduce:
    """The method's first pass, compiled (or from the cache) when it first runs."""
    reduction = kind.method.reduction
    assert reduction is not None
    if (kind, "first") not in _KERNELS:
        _KERNELS[kind, "first"] = _make_reduction(
            inlined(reduction.statistic), _stamp(kind.method), kind.weighs, kind.has_base, kind.anchored,
            reduction.kind == "sum",
        )  # fmt: skip
    kernel = _KERNELS[kind, "first"]

    def run(chunk: Chunk, numbers: Numbers, totals: Array) -> None:
        zero = chunk.extras.dtype.type(0)
        template = tuple(Gaussian(zero, zero) for _ in numbers.scales)
        kernel(
            chunk.means, chunk.precisions, chunk.extras, chunk.first, chunk.row, numbers.gains, numbers.insides,
            numbers.shares, numbers.floors, numbers.priors, numbers.pulls, numbers.decays, zero, template,
            len(totals), totals,
        )  # fmt: skip

    return run


def _make_reduction(  # type: ignore[no-untyped-def]
    statistic: Any, stamp: int, weighs: bool, has_base: bool, anchored: bool, adds: bool
):
    @compiled(error_model="numpy")
    def kernel(  # type: ignore[no-untyped-def]
        means, precisions, extras, first, row, gains, insides, shares, floors, priors, pulls, decays, zero, template,
        count, totals,
    ):  # fmt: skip
        _ = stamp
        entries = means.shape[1]
        lanes = np.zeros((count, LANES))
        start, stop, r = np.uint64(0), np.uint64(min(first, entries)), 0
        while start < entries:
            extra = gains
            for i in range(len(gains)):
                extra = tuple_setitem(extra, i, extras[i, r])
            for j in range(start, stop):
                centre, tasks = _entry(
                    j, means, precisions, extra, gains, insides, shares, floors, priors, pulls, decays, zero,
                    template, weighs, has_base, anchored,
                )  # fmt: skip
                for k in range(count):
                    value = statistic(centre, tasks, k)
                    if adds:
                        lanes[k, j % np.uint64(LANES)] += value
                    else:
                        totals[k, (np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(SHIFT)] += 1
            start, stop, r = stop, np.uint64(min(stop + np.uint64(row), np.uint64(entries))), r + 1
        if adds:
            for k in range(count):
                for lane in range(LANES):
                    totals[k] += lanes[k, lane]

    return kernel


@compiled()
def fused_sums(stored, row, sums):  # type: ignore[no-untyped-def]
    """`row_sums`, compiled."""
    zero = np.float32(0)
    for r in range(sums.size):
        begin, end = np.uint64(r * row), np.uint64((r + 1) * row)
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        e, f, g, h = 0.0, 0.0, 0.0, 0.0
        whole = begin + (end - begin) // np.uint64(LANES) * np.uint64(LANES)
        for j in range(begin, whole, np.uint64(LANES)):
            a += _widen(stored[j], zero)
            b += _widen(stored[j + np.uint64(1)], zero)
            c += _widen(stored[j + np.uint64(2)], zero)
            d += _widen(stored[j + np.uint64(3)], zero)
            e += _widen(stored[j + np.uint64(4)], zero)
            f += _widen(stored[j + np.uint64(5)], zero)
            g += _widen(stored[j + np.uint64(6)], zero)
            h += _widen(stored[j + np.uint64(7)], zero)
        total = a + b + c + d + e + f + g + h
        for j in range(whole, end):
            total += _widen(stored[j], zero)
        sums[r] = total
