"""Merge a tensor, or a piece of it, by a method's rule for whole tensors."""

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, is_bad_mean, overflowed
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.kernels.base import Array, Tally
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.bad_entries import refuse_bad
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.numbers import real_of
from mergekit_bayes.stream.pieces import errors_of_the_rule, tensors_of, widened


def merge_entries(
    plan: MergePlan,
    step: Step,
    measured: FirstPassResult,
    reader: Reader,
    start: int,
    stop: int,
    tally: Tally,
) -> tuple[memoryview, list[int]]:
    """Merge entries `start:stop` of a tensor.

    Args:
        plan: The merge.
        step: The tensor, with `settings`.
        measured: What the first pass measured of it.
        reader: The thread's reader.
        start: The first entry: of a row, or 0, where the rule needs whole rows or tensors.
        stop: The end of the entries.
        tally: Counted into.

    Returns:
        The bytes in the dtype in which they are written, and for each operand how many bad entries
        took the base's value.

    Raises:
        CheckpointError: An entry that is not finite, or a merge that is not or does not fit.
        MismatchError: What the rule cannot merge.
    """
    means = widened(reader.means(step, start, stop))
    replaced = _replace_bad(plan, step, means)
    merged = _combined(plan, step, measured, means, start)
    data = _encoded(plan, step, merged.reshape(-1))
    _count(step, means, data, tally)
    return data, replaced


def _replace_bad(plan: MergePlan, step: Step, means: Array) -> list[int]:
    """Give bad entries of the tasks the base's value, in place; how many there were of each."""
    replaced = [0] * len(means)
    for position, (operand, mean) in enumerate(zip(step.operands, means, strict=True)):
        bad = is_bad_mean(mean)
        if not bad.any():
            continue
        if plan.config.on_bad == "error" or operand is step.donor:
            refuse_bad(plan, step, operand)
        replaced[position] = int(np.count_nonzero(bad))
        mean[bad] = means[0][bad]
    return replaced


def _combined(
    plan: MergePlan, step: Step, result: FirstPassResult, means: Array, start: int
) -> Array:
    method = plan.method
    assert method.tensor is not None
    tensors = tensors_of(plan, step, means, start)
    shape = tensors.tasks[0].shape
    with errors_of_the_rule(plan, step):
        tensors = tensors._replace(products=result.products, measured=result.measured)
        merged: Array = method.tensor.combine(tensors)
        found = np.shape(merged)
    if found != shape:
        raise TypeError(
            f"method '{method.name}' makes {list(found)} of tensors {list(shape)}; see "
            "mergekit_bayes/methods/tensors.py."
        )
    return merged


def _encoded(plan: MergePlan, step: Step, merged: Array) -> memoryview:
    dtype = step.spec.dtype
    with np.errstate(over="ignore"):  # refused below
        data = encode(merged.astype(real_of(step), copy=False), dtype)
    if not np.isfinite(merged).all() or overflowed(data, dtype):
        raise CheckpointError(
            f"'{step.name}': the merge by {plan.method.name} is not finite, or does not fit "
            f"{dtype}. A wider --dtype holds more."
        )
    return data


def _count(step: Step, means: Array, data: memoryview, tally: Tally) -> None:
    """Count the entries that some task changes, and those of them that rounding gave back."""
    tally.entries += means.shape[1]
    if step.base is None:
        return
    moved = np.zeros(means.shape[1], bool)
    for task, mean in zip(step.tasks, means[1:], strict=True):
        moved |= (mean != means[0]) & (task.scale != 0)
    dtype = step.spec.dtype
    written = decode(np.frombuffer(data, np.uint8), dtype)
    before = decode(np.frombuffer(encode(means[0], dtype), np.uint8), dtype)
    tally.changed += int(np.count_nonzero(moved))
    tally.lost += int(np.count_nonzero(moved & (written == before)))
