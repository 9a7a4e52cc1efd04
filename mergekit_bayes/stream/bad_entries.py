"""Entries that cannot be merged: a mean that is not finite, a precision that is not one.

`--on-bad error` names the first one of a tensor and counts them. `--on-bad base` takes the base's
value there, as if the task had changed nothing.
"""

from collections.abc import Callable

import numpy as np

from mergekit_bayes.checkpoint.codec import (
    chunks,
    decode,
    is_bad_mean,
    is_bad_precision,
    read_chunk,
)
from mergekit_bayes.checkpoint.specs import CheckpointSource
from mergekit_bayes.errors import BmergeError, CheckpointError, PrecisionError
from mergekit_bayes.kernels.base import (
    Array,
    Chunk,
    Numbers,
    base_likelihood,
    unchanged_precision,
)
from mergekit_bayes.plan import MergePlan, Operand, Step
from mergekit_bayes.posterior.forms import spread
from mergekit_bayes.stream.chunks import FirstPassResult
from mergekit_bayes.stream.numbers import real_of

_WINDOW = 1 << 18  # entries that are checked at a time


def replace_bad_means(means: Array) -> None:
    """Give bad entries of the tasks the base's value, in place.

    Args:
        means: (models, n), the base first; bfloat16 bits or floats.
    """
    base, *tasks = means
    for task in tasks:
        bad = is_bad_mean(_widened(task))
        task[bad] = base[bad]


def replace_bad_entries(
    plan: MergePlan, step: Step, measured: FirstPassResult, chunk: Chunk, numbers: Numbers
) -> tuple[Chunk, list[int]]:
    """A chunk whose bad entries change nothing: mean of the base, and nothing added to its H.

    Args:
        plan: The merge.
        step: The tensor.
        measured: What the first pass measured of it.
        chunk: Its entries; the means are changed in place.
        numbers: The constants of the step.

    Returns:
        The chunk to merge, and for each model how many of its entries were replaced.

    Raises:
        CheckpointError: A bad mean of the donor, or of any model under `--on-bad error`.
        PrecisionError: A bad precision of the same.
    """
    start, stop = chunk.offset, chunk.offset + chunk.mean.size
    means = [_widened(mean) for mean in chunk.means]
    weighed = chunk.precisions if plan.method.needs_precision else ()
    stored = [decode(p, "BF16") if p.dtype == np.uint16 else p.copy() for p in weighed]
    extras = [spread(extra, step.row, start, stop) for extra in measured.extras]
    base_mean, *_ = chunk.means
    of_base = base_likelihood(numbers, stored, extras) if stored else None
    replaced = [0] * len(means)
    for position, (operand, mean) in enumerate(zip(step.operands, means, strict=True)):
        bad = is_bad_mean(mean)
        if stored:
            bad |= is_bad_precision(stored[position])
        if not bad.any():
            continue
        if plan.config.on_bad == "error" or operand is step.donor:
            refuse_bad(plan, step, operand)
            raise AssertionError("a bad entry was counted but not found")
        replaced[position] = int(np.count_nonzero(bad))
        chunk.means[position][bad] = base_mean[bad]
        if stored:
            value = unchanged_precision(numbers, position, of_base, extras[position])
            stored[position][bad] = np.broadcast_to(value, bad.shape)[bad]
    if stored:
        chunk = chunk._replace(precisions=np.stack(stored).astype(np.float32))
    return chunk, replaced


def refuse_bad(plan: MergePlan, step: Step, operand: Operand) -> None:
    """Raise an error if an input has a bad entry in a step: which one, and how many there are.

    Args:
        plan: The merge.
        step: The tensor.
        operand: What the input contributes to it.

    Raises:
        CheckpointError: A mean is not finite.
        PrecisionError: A precision is negative or not finite.
    """
    way_out = "Make it again"
    if plan.base is None:
        way_out += ", or merge with --base, where --on-bad base takes the base's values there"
    elif operand.mean.input is not plan.base:
        way_out += ", or take the base's values there with --on-bad base"
    mean, precision = operand.mean, operand.precision
    _scan(
        mean.source,
        mean.name,
        real_of(step) if step.copied is None else np.float64,
        is_bad_mean,
        CheckpointError,
        f"{mean.where}: '{mean.name}'",
        f"Did its training diverge? {way_out}.",
    )
    if precision is not None and precision.source is not None:
        _scan(
            precision.source,
            precision.name,
            np.float32,
            is_bad_precision,
            PrecisionError,
            f"the precision of '{precision.name}' in {precision.source.where(precision.name)}",
            f"A precision is finite and not negative. {way_out}.",
        )


def _scan(
    source: CheckpointSource,
    name: str,
    real: type[np.float32] | type[np.float64],
    is_bad: Callable[[Array], Array],
    error: type[BmergeError],
    described: str,
    way_out: str,
) -> None:
    """Raise an error if a tensor has entries that are bad once they are of type `real`."""
    count, first = 0, None
    for start, stop in chunks(source.specs[name], _WINDOW):
        values = read_chunk(source, name, start, stop)
        with np.errstate(over="ignore"):
            bad = is_bad(values.astype(real, copy=False))
        count += int(np.count_nonzero(bad))
        if first is None and bad.any():
            index = int(np.argmax(bad))
            first = (values[index], start + index)
    if first is None:
        return
    value, index = first
    more = f", the first of {count:,} bad entries" if count > 1 else ""
    if abs(value) < np.inf and value > np.finfo(np.float32).max:
        way_out = "It is merged in F32, which ends at 3.4e38."
        if is_bad is is_bad_mean:
            way_out += " Write --dtype F64."
    raise error(f"{described} is {value} at flat index {index}{more}. {way_out}")


def _widened(stored: Array) -> Array:
    """The numbers behind bfloat16 bits; other arrays as they are."""
    return decode(stored, "BF16") if stored.dtype == np.uint16 else stored
