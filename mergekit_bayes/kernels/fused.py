"""The pass compiled by numba: a method's own function, inlined into one loop over stored bits.

It is compiled once for each method, number of models and type of numbers, and cached on disk beside
this file, or in the user's cache folder where that cannot be written. The loop works on blocks that
stay in the first two caches and is written so that LLVM vectorises it: two-dimensional inputs, an
inner loop from zero, no sum in it. float32 stays float32 and nothing is reassociated or contracted,
so that the results have the bits of `plain_pass`.
"""

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from numba.cpython.unsafe.tuple import tuple_setitem

from mergekit_bayes.compiled import compiled, inlined
from mergekit_bayes.gaussian import Gaussian, select
from mergekit_bayes.kernels.base import (
    BLOCK,
    LANES,
    Kind,
    Numbers,
    anchored_task_posterior,
    likelihood_precision,
    own_posterior,
    removal_multiplier,
    task_posterior,
)
from mergekit_bayes.kernels.bits import (
    draw,
    infinity,
    is_bad,
    is_bad_precision,
    magnitude,
    precision_bits,
    rounded,
    unwidened,
    widen,
)
from mergekit_bayes.kernels.increase import add_moves
from mergekit_bayes.kernels.inlining import facts_maker, inline
from mergekit_bayes.kernels.sources import stamp
from mergekit_bayes.methods.histogram import SHIFT

# Loops over models must vanish: an index into a tuple that is known at run time only is a switch,
# and nothing is vectorised around it. LLVM's own threshold gives up at seven models.
llvmlite.binding.set_option("bmerge", "-unroll-threshold=100000")


@compiled(fastmath={"reassoc"})
def _tally(
    start,
    stop,
    means,
    precisions,
    scales,
    mean,
    zero,
    has_base,
    bad_means,
    bad_precisions,
    stored,
    counts,
):
    """Count over one block. Sums are float32 within a block: enough for the report's ratios."""
    # A maximum of bits is several times cheaper than a count, which follows only where needed.
    for i in range(means.shape[0]):
        worst = magnitude(means[i, start])
        for j in range(start, stop):
            worst = max(worst, magnitude(means[i, j]))
        if worst >= infinity(means[i, start]):
            for j in range(start, stop):
                bad_means[i] += is_bad(means[i, j])
        if precisions.shape[1] > 0:
            highest, total = precision_bits(precisions[i, start]), zero
            for j in range(start, stop):
                highest = max(highest, precision_bits(precisions[i, j]))
                total += widen(precisions[i, j], zero)
            stored[i] += total
            if highest >= infinity(precisions[i, start]):
                for j in range(start, stop):
                    bad_precisions[i] += is_bad_precision(precisions[i, j])
    worst = magnitude(mean[start])
    for j in range(start, stop):
        worst = max(worst, magnitude(mean[j]))
    if worst >= infinity(mean[start]):
        for j in range(start, stop):
            counts[0] += is_bad(mean[j])
    if has_base:
        changed, lost = np.uint16(0), np.uint16(0)  # a block has fewer entries
        for j in range(start, stop):
            moved = False
            for t in range(len(scales)):
                moved |= (means[t + 1, j] != means[0, j]) & (scales[t] != 0)
            unmoved = moved & (mean[j] == rounded(widen(means[0, j], zero), mean[j]))
            changed = np.uint16(changed + np.uint16(moved))
            lost = np.uint16(lost + np.uint16(unmoved))
        counts[1] += changed
        counts[2] += lost


@inlined
def _entry(j, means, precisions, extra, numbers, template, flags):
    """The base (or the first task) and the tasks at entry j of a chunk."""
    weighs, has_base, anchored = flags
    tasks, zero = template, template[0].mean
    if not weighs:
        m = widen(means[0, j], zero)
        for t in range(len(template)):
            task = widen(means[t + has_base, j], zero)
            tasks = tuple_setitem(tasks, t, Gaussian(task, task))
        return Gaussian(m, m), tasks
    x = widen(precisions[0, j], zero)
    of_base = likelihood_precision(numbers, 0, x, x - x, extra[0])
    centre = own_posterior(widen(means[0, j], zero), numbers.priors[0], of_base)
    for t in range(len(template)):
        i = t + has_base
        m, x = widen(means[i, j], zero), widen(precisions[i, j], zero)
        h = likelihood_precision(numbers, i, x, of_base, extra[i])
        if not has_base:
            task = own_posterior(m, numbers.priors[i], h)
        elif anchored:
            task = anchored_task_posterior(centre, m, h, numbers.anchors[i], numbers.decays[i])
        else:
            task = task_posterior(centre, m, h)
        tasks = tuple_setitem(tasks, t, task)
    return centre, tasks


def _never_guarded(base, tasks, scales):
    return base.precision


@cache
def make_pass(kind: Kind, facts_type: type) -> Any:
    """numba's dispatcher of the pass of `kind`, for a method whose facts have that type."""
    # All of this is in the kernel's closure, and so in the key of numba's cache: nothing may be a
    # function or class that was made here, since no two processes pickle such a thing alike.
    method, weighs, has_base, anchored, removes, pulled = kind
    random, sources, flags = method.random, stamp(method, facts_type), (weighs, has_base, anchored)
    facts_of, combine = facts_maker(facts_type), inline(method.combine)
    unguarded_precision = inline(method.unguarded_precision or _never_guarded)

    @compiled(error_model="numpy")
    def kernel(
        chunk,
        constants,
        zero,
        template,
        bad_means,
        bad_precisions,
        stored,
        distances,
        products,
        counts,
        largest,
    ):
        _ = sources
        means, precisions, extras, first, row, offset, mean, precision = chunk
        numbers = Numbers(*constants)
        scales, facts = numbers.scales, facts_of(*numbers.facts)
        entries = mean.size
        begin, segment, r = 0, min(first, entries), 0
        while begin < entries:
            end = min(begin + BLOCK, segment)
            # Unsigned: a signed index would be wrapped around, and the loop not vectorised.
            start, stop = np.uint64(begin), np.uint64(end)
            extra = numbers.gains
            for i in range(len(extra)):
                extra = tuple_setitem(extra, i, extras[i, r])
            for j in range(start, stop):
                centre, tasks = _entry(j, means, precisions, extra, numbers, template, flags)
                if random:
                    draws = scales
                    for t in range(len(scales)):
                        draws = tuple_setitem(
                            draws, t, draw(numbers.keys[t], np.uint64(offset) + j, zero)
                        )
                    merged = combine(centre, tasks, scales, facts, draws)
                else:
                    merged = combine(centre, tasks, scales, facts)
                mean[j] = rounded(unwidened(merged.mean, zero), mean[j])
                if weighs:
                    precision[j] = unwidened(merged.precision, zero)
            _tally(
                start,
                stop,
                means,
                precisions,
                scales,
                mean,
                zero,
                has_base,
                bad_means,
                bad_precisions,
                stored,
                counts,
            )
            if weighs:
                add_moves(
                    start,
                    stop,
                    means,
                    precisions,
                    extra[0],
                    constants,
                    mean,
                    zero,
                    has_base,
                    pulled,
                    distances,
                    products,
                )
            if removes:
                guarded, most = 0, np.uint32(0)
                for j in range(start, stop):
                    centre, tasks = _entry(j, means, precisions, extra, numbers, template, flags)
                    # Computed again, since what was stored is float32 whatever the arithmetic.
                    guard = combine(centre, tasks, scales, facts).precision
                    for t in range(len(scales)):
                        if scales[t] < 0:
                            multiplier = removal_multiplier(
                                centre, tasks[t], scales[t], numbers.anchors[t + 1], guard
                            )
                            # Bits of positive numbers are in their order; their maximum vectorises.
                            positive = np.float32(select(multiplier > 0, multiplier, zero))
                            most = max(most, positive.view(np.uint32))
                    guarded += guard > unguarded_precision(centre, tasks, scales)
                counts[3] += guarded
                largest[0] = max(largest[0], np.float64(np.uint32(most).view(np.float32)))
            begin = end
            if end == segment:
                segment, r = min(segment + row, entries), r + 1

    return kernel


@cache
def make_reduction(kind: Kind) -> Any:
    """numba's dispatcher of a method's first pass that adds up."""
    reduction = kind.method.reduction
    assert reduction is not None
    sources = stamp(kind.method)
    flags, statistic = (kind.weighs, kind.has_base, kind.anchored), inline(reduction.statistic)

    @compiled(error_model="numpy")
    def kernel(chunk, constants, zero, template, lanes, totals):
        _ = sources
        means, precisions, extras, first, row = chunk[:5]
        numbers = Numbers(*constants)
        entries = means.shape[1]
        count = len(lanes)
        start, stop, r = np.uint64(0), np.uint64(min(first, entries)), 0
        while start < entries:
            extra = numbers.gains
            for i in range(len(extra)):
                extra = tuple_setitem(extra, i, extras[i, r])
            for j in range(start, stop):
                centre, tasks = _entry(j, means, precisions, extra, numbers, template, flags)
                for k in range(count):
                    value = unwidened(statistic(centre, tasks, k), zero)
                    lanes[k, j % np.uint64(LANES)] += value
            start, stop, r = stop, min(stop + np.uint64(row), np.uint64(entries)), r + 1
        for k in range(count):
            for lane in range(LANES):
                totals[k] += lanes[k, lane]

    return kernel


@cache
def make_histogram(kind: Kind) -> Any:
    """numba's dispatcher of a method's first pass that counts magnitudes.

    The bins of a block are computed first, in vectors. `bins` has an array of `BLOCK` for each
    statistic, in a tuple, whose length is known when the loop over them is unrolled.
    """
    reduction = kind.method.reduction
    assert reduction is not None
    sources = stamp(kind.method)
    flags, statistic = (kind.weighs, kind.has_base, kind.anchored), inline(reduction.statistic)

    @compiled(error_model="numpy")
    def kernel(chunk, constants, zero, template, bins, totals):
        _ = sources
        means, precisions, extras, first, row = chunk[:5]
        numbers = Numbers(*constants)
        entries = means.shape[1]
        begin, segment, r = 0, min(first, entries), 0
        while begin < entries:
            end = min(begin + BLOCK, segment)
            start, stop = np.uint64(begin), np.uint64(end)
            extra = numbers.gains
            for i in range(len(extra)):
                extra = tuple_setitem(extra, i, extras[i, r])
            for k in range(len(bins)):
                for j in range(start, stop):
                    centre, tasks = _entry(j, means, precisions, extra, numbers, template, flags)
                    value = unwidened(statistic(centre, tasks, k), zero)
                    pattern = np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF)
                    bins[k][j - start] = pattern >> np.uint32(SHIFT)
            for k in range(len(bins)):
                for j in range(stop - start):
                    totals[k, bins[k][j]] += 1
            begin = end
            if end == segment:
                segment, r = min(segment + row, entries), r + 1

    return kernel


@compiled()
def fused_sums(stored, row, sums):
    """`plain_sums`, compiled."""
    zero = np.float32(0)
    for r in range(sums.size):
        begin, end = np.uint64(r * row), np.uint64((r + 1) * row)
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        e, f, g, h = 0.0, 0.0, 0.0, 0.0
        in_lanes = begin + (end - begin) // np.uint64(LANES) * np.uint64(LANES)
        for j in range(begin, in_lanes, np.uint64(LANES)):
            a += widen(stored[j], zero)
            b += widen(stored[j + np.uint64(1)], zero)
            c += widen(stored[j + np.uint64(2)], zero)
            d += widen(stored[j + np.uint64(3)], zero)
            e += widen(stored[j + np.uint64(4)], zero)
            f += widen(stored[j + np.uint64(5)], zero)
            g += widen(stored[j + np.uint64(6)], zero)
            h += widen(stored[j + np.uint64(7)], zero)
        total = a + b + c + d + e + f + g + h
        for j in range(in_lanes, end):
            total += widen(stored[j], zero)
        sums[r] = total
