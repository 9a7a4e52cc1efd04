"""The pass in numpy: what the fused one must equal bit for bit, and what runs where numba is missing."""

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode
from mergekit_bayes.gaussian import Gaussian
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
    keyed_draws,
    likelihood,
    strength,
)
from mergekit_bayes.methods.base import BINS, bin_of


def plain_pass(kind: Kind) -> Pass:
    """The pass of `kind` in numpy."""

    def run(chunk: Chunk, numbers: Numbers, tally: Tally) -> None:
        _count_bad(chunk, tally)
        with np.errstate(all="ignore"):
            base, tasks = _gaussians(kind, chunk, numbers)
            scales, facts = numbers.scales, numbers.facts
            if kind.method.random:
                n = chunk.mean.size
                draws = tuple(keyed_draws(key, chunk.offset, n) for key in numbers.keys)
                merged = kind.method.combine(base, tasks, scales, facts, draws)
            else:
                merged = kind.method.combine(base, tasks, scales, facts)
            chunk.mean[:] = _rounded(merged.mean, chunk.mean)
            if kind.weighs:
                chunk.precision[:] = merged.precision
            _count(kind, chunk, numbers, base, tasks, merged, tally)

    return run


def plain_reduction(kind: Kind) -> Reduce:
    """The method's first pass in numpy."""
    reduction = kind.method.reduction
    assert reduction is not None

    def run(chunk: Chunk, numbers: Numbers, totals: Array) -> None:
        with np.errstate(all="ignore"):
            base, tasks = _gaussians(kind, chunk, numbers)
            for k in range(len(totals)):
                values = reduction.statistic(base if base is not None else tasks[0], tasks, k)
                if reduction.kind == "sum":
                    for lane in _lanes(values):
                        totals[k] += lane
                else:
                    totals[k] += np.bincount(bin_of(values), minlength=BINS)

    return run


def plain_sums(stored: Array, row: int, sums: Array) -> None:
    """Sums of consecutive rows of `row` entries, in float64, into `sums` (rows,); `stored` as in a `Chunk`."""
    values = _widened(stored).reshape(len(sums), row).astype(np.float64)
    whole = row // LANES * LANES
    lanes = values[:, :whole].reshape(len(sums), -1, LANES)
    parts = np.add.reduce(lanes, axis=1) if whole else np.zeros((len(sums), LANES))
    sums[:] = 0.0
    for lane in range(LANES):
        sums += parts[:, lane]
    for j in range(whole, row):
        sums += values[:, j]


def _lanes(values: Array) -> Array:
    padded = np.zeros(-(-values.size // LANES) * LANES)
    padded[: values.size] = values
    lanes: Array = np.add.reduce(padded.reshape(-1, LANES), axis=0)
    return lanes


def _widened(stored: Array) -> Array:
    values: Array = decode(stored, "BF16") if stored.dtype == np.uint16 else stored
    return values


def _rounded(values: Array, like: Array) -> Array:
    return np.frombuffer(encode(values, "BF16"), np.uint16) if like.dtype == np.uint16 else values


def _gaussians(kind: Kind, chunk: Chunk, numbers: Numbers) -> tuple[Gaussian | None, tuple[Gaussian, ...]]:
    means = [_widened(m) for m in chunk.means]
    if not kind.weighs:
        all_of_them = [Gaussian(m, m) for m in means]
        return (all_of_them[0] if kind.has_base else None), tuple(all_of_them[kind.has_base :])
    stored = [_widened(p).astype(chunk.means.dtype if means[0].dtype == np.float64 else np.float32, copy=False)
              for p in chunk.precisions]  # fmt: skip
    extras = _by_entry(chunk)
    of_base = stored[0] - stored[0]
    data = []
    for i, x in enumerate(stored):
        h = likelihood(
            x, numbers.gains[i], numbers.insides[i], numbers.shares[i], of_base, numbers.floors[i], extras[i]
        )  # fmt: skip
        of_base = h if i == 0 else of_base
        data.append(h)
    if not kind.has_base:
        return None, tuple(alone(m, p, h) for m, p, h in zip(means, numbers.priors, data, strict=True))
    base = alone(means[0], numbers.priors[0], data[0])
    if not kind.anchored:
        return base, tuple(follow(base, m, h) for m, h in zip(means[1:], data[1:], strict=True))
    rest = zip(means[1:], data[1:], numbers.pulls[1:], numbers.decays[1:], strict=True)
    return base, tuple(follow_anchored(base, m, h, p, d) for m, h, p, d in rest)


def _by_entry(chunk: Chunk) -> Array:
    if chunk.extras.shape[1] == 1:
        return chunk.extras
    n = chunk.means.shape[1]
    rows = (np.arange(n) + chunk.row - chunk.first) // chunk.row
    by_entry: Array = chunk.extras[:, rows]
    return by_entry


def _count_bad(chunk: Chunk, tally: Tally) -> None:
    tally.entries += chunk.mean.size
    for i in range(len(chunk.means)):
        tally.bad_means[i] += np.count_nonzero(~np.isfinite(_widened(chunk.means[i])))
        if chunk.precisions.size:
            stored = _widened(chunk.precisions[i])
            tally.bad_precisions[i] += np.count_nonzero(~(np.isfinite(stored) & (stored >= 0)))
            tally.stored[i] += float(stored.sum(dtype=np.float64))


def _count(
    kind: Kind, chunk: Chunk, numbers: Numbers, base: Gaussian | None, tasks: tuple[Gaussian, ...], merged: Gaussian,
    tally: Tally,
) -> None:  # fmt: skip
    tally.bad += int(np.count_nonzero(~np.isfinite(_widened(chunk.mean))))
    if base is None:
        return
    moved = np.zeros(chunk.mean.size, bool)
    for scale, mean in zip(numbers.scales, chunk.means[1:], strict=True):
        if scale != 0:
            moved |= mean != chunk.means[0]  # as stored: an anchor moves a task's centre, not what it learnt
    tally.changed += int(np.count_nonzero(moved))
    tally.lost += int(np.count_nonzero(moved & (chunk.mean == _rounded(base.mean, chunk.mean))))
    if not (kind.weighs and kind.removes):
        return
    exact = base.precision
    for scale, task in zip(numbers.scales, tasks, strict=True):
        exact = grow(exact, base, task, scale)
    tally.guarded += int(np.count_nonzero(merged.precision > exact))
    for i, task in enumerate(tasks):
        if numbers.scales[i] < 0:
            stretched = -numbers.scales[i] * strength(base, task, numbers.pulls[i + 1]) / merged.precision
            tally.multiplier = max(tally.multiplier, float(np.fmax.reduce(stretched, initial=0.0)))
