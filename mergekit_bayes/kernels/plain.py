"""The pass in numpy, which runs without numba and whose bits the compiled pass must give."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, is_bad_precision
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.kernels.base import (
    LANES,
    Array,
    Chunk,
    Kind,
    Numbers,
    Pass,
    Reduce,
    Tally,
    anchored_task_posterior,
    base_likelihood,
    keyed_draws,
    likelihood_precision,
    own_posterior,
    removal_multiplier,
    task_posterior,
)
from mergekit_bayes.methods.base import RULE, Draws, Method, Tasks
from mergekit_bayes.methods.histogram import BINS, bin_of

_BLOCK = 2048  # entries whose products are summed in the arithmetic's dtype
_PIECE = 8 * _BLOCK  # entries whose temporaries stay in the cache, and in memory that is reused


def plain_pass(kind: Kind) -> Pass:
    """The pass of `kind` in numpy."""

    def run(chunk: Chunk, numbers: Numbers, tally: Tally) -> None:
        _count_bad(chunk, tally)
        with np.errstate(all="ignore"):
            base, tasks = gaussians(kind, chunk, numbers)
            scales, facts = numbers.scales, numbers.facts
            draws: tuple[Draws, ...] = ()
            if kind.method.random:
                n = chunk.mean.size
                draws = (tuple(keyed_draws(key, chunk.offset, n) for key in numbers.keys),)
            with names_the_rule(kind.method):
                merged = kind.method.combine(base, tasks, scales, facts, *draws)
            chunk.mean[:] = _rounded(merged.mean, chunk.mean)
            if kind.weighs:
                chunk.precision[:] = merged.precision
                _add_moves(kind, chunk, numbers, tally)
            tally.bad += int(np.count_nonzero(~np.isfinite(_widened(chunk.mean))))
            if base is not None:
                _count_changed(chunk, numbers, base, tally)
                if kind.removes:
                    _count_guarded(kind, numbers, base, tasks, merged, tally)

    return run


def plain_reduction(kind: Kind) -> Reduce:
    """The method's first pass in numpy."""
    reduction = kind.method.reduction
    assert reduction is not None

    def run(chunk: Chunk, numbers: Numbers, totals: Array) -> None:
        with np.errstate(all="ignore"):
            base, tasks = gaussians(kind, chunk, numbers)
            for k in range(len(totals)):
                with names_the_rule(kind.method):
                    values = reduction.statistic(base if base is not None else tasks[0], tasks, k)
                if reduction.kind == "sum":
                    for lane in _lanes(values):
                        totals[k] += lane
                else:
                    totals[k] += np.bincount(bin_of(values), minlength=BINS)

    return run


def plain_sums(stored: Array, row: int, sums: Array) -> None:
    """Sums of consecutive rows of stored numbers, in float64 and a fixed order.

    Args:
        stored: (rows * row,), as in a `Chunk`.
        row: Entries of a row.
        sums: (rows,), where the result goes.
    """
    values = _widened(stored).reshape(len(sums), row).astype(np.float64)
    in_lanes = row // LANES * LANES
    lanes = values[:, :in_lanes].reshape(len(sums), -1, LANES)
    parts = np.add.reduce(lanes, axis=1) if in_lanes else np.zeros((len(sums), LANES))
    sums[:] = 0.0
    for lane in range(LANES):
        sums += parts[:, lane]
    for j in range(in_lanes, row):
        sums += values[:, j]


@contextmanager
def names_the_rule(method: Method) -> Iterator[None]:
    """Raise what a method's own function raises on arrays as an error that names the contract."""
    try:
        yield
    except (ArithmeticError, BmergeError, MemoryError, np.linalg.LinAlgError):
        raise  # the fault of the numbers, or of their size
    except Exception as error:
        raise TypeError(
            f"method '{method.name}' cannot run on arrays ({type(error).__name__}: {error}). {RULE}"
        ) from error


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


def gaussians(kind: Kind, chunk: Chunk, numbers: Numbers) -> tuple[Gaussian | None, Tasks]:
    """The posteriors of a chunk that a method combines: that of the base, if any, and the tasks'.

    They are of the dtype of the means, and re-based on the base.
    """
    means = [_widened(m) for m in chunk.means]
    if not kind.weighs:
        models = [Gaussian(m, m) for m in means]
        return (models[0] if kind.has_base else None), tuple(models[kind.has_base :])
    stored, extras = _stored(chunk.precisions, means[0]), _by_entry(chunk)
    of_base: Number = stored[0] - stored[0]
    likelihoods: list[Array] = []
    for i, precision in enumerate(stored):
        h = likelihood_precision(numbers, i, precision, of_base, extras[i])
        of_base = h if i == 0 else of_base
        likelihoods.append(h)
    if not kind.has_base:
        alone = zip(means, numbers.priors, likelihoods, strict=True)
        return None, tuple(own_posterior(m, p, h) for m, p, h in alone)
    base = own_posterior(means[0], numbers.priors[0], likelihoods[0])
    if not kind.anchored:
        tasks = zip(means[1:], likelihoods[1:], strict=True)
        return base, tuple(task_posterior(base, m, h) for m, h in tasks)
    anchored = zip(means[1:], likelihoods[1:], numbers.anchors[1:], numbers.decays[1:], strict=True)
    return base, tuple(anchored_task_posterior(base, m, h, p, d) for m, h, p, d in anchored)


def _stored(precisions: Array, like: Array) -> list[Array]:
    """Stored precisions in the dtype in which the means are merged."""
    return [_widened(stored).astype(like.dtype, copy=False) for stored in precisions]


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
            tally.bad_precisions[i] += np.count_nonzero(is_bad_precision(stored))
            tally.stored[i] += float(stored.sum(dtype=np.float64))


def _count_changed(chunk: Chunk, numbers: Numbers, base: Gaussian, tally: Tally) -> None:
    moved = np.zeros(chunk.mean.size, bool)
    for scale, mean in zip(numbers.scales, chunk.means[1:], strict=True):
        if scale != 0:
            # As stored: an anchor moves a task's centre, not what the task learnt.
            moved |= mean != chunk.means[0]
    tally.changed += int(np.count_nonzero(moved))
    tally.lost += int(np.count_nonzero(moved & (chunk.mean == _rounded(base.mean, chunk.mean))))


def _add_moves(kind: Kind, chunk: Chunk, numbers: Numbers, tally: Tally) -> None:
    """The sums of `kernels.increase`, in numpy."""
    extras = _by_entry(chunk) if any(numbers.base_shares) else None
    for start in range(0, chunk.mean.size, _PIECE):
        piece = slice(start, start + _PIECE)
        merged, first = _widened(chunk.mean[piece]), _widened(chunk.means[0, piece])
        stored = _stored(chunk.precisions[:, piece], merged)
        of_base: Number = 0
        if extras is not None:
            extra = extras if extras.shape[1] == 1 else extras[:, piece]
            of_base = base_likelihood(numbers, stored, extra)
        for i, precision in enumerate(stored):
            h, gain = precision, float(numbers.gains[i])
            if numbers.contained[i] or numbers.base_shares[i]:
                inside = numbers.contained[i] + numbers.base_shares[i] * of_base
                # A branch by entry, as in `likelihood_precision`, would cost more than the rest.
                h = np.maximum(h - inside, numbers.floors[i])
            mean = first if i == 0 else _widened(chunk.means[i, piece])
            moved = merged - mean
            tally.distances[i, 0] += gain * _dot(h * moved, moved)
            if kind.pulled:
                tally.products[i, 1] += _dot(mean, moved)
            if kind.has_base and i:
                change = mean - first
                tally.distances[i, 1] += gain * _dot(h * change, change)
                if kind.pulled:
                    tally.products[i, 0] += _dot(change, moved)


def _dot(a: Array, b: Array) -> float:
    """The sum of products: in the arithmetic within blocks, and in float64 over them, in order."""
    end = a.size // _BLOCK * _BLOCK
    blocks = np.vecdot(a[:end].reshape(-1, _BLOCK), b[:end].reshape(-1, _BLOCK))
    return float(blocks.sum(dtype=np.float64)) + float(np.vecdot(a[end:], b[end:]))


def _count_guarded(
    kind: Kind, numbers: Numbers, base: Gaussian, tasks: Tasks, merged: Gaussian, tally: Tally
) -> None:
    assert kind.method.unguarded_precision is not None
    exact = kind.method.unguarded_precision(base, tasks, numbers.scales)
    tally.guarded += int(np.count_nonzero(merged.precision > exact))
    for task, scale, anchor in zip(tasks, numbers.scales, numbers.anchors[1:], strict=True):
        if scale < 0:
            multipliers = removal_multiplier(base, task, scale, anchor, merged.precision)
            largest = float(np.fmax.reduce(multipliers, initial=0.0))
            tally.multiplier = max(tally.multiplier, largest)
