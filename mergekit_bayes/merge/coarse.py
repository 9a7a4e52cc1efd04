"""Merge precisions that have one number per row, or one for the tensor."""

import numpy as np

from mergekit_bayes.checkpoint.codec import is_bad_precision
from mergekit_bayes.kernels.base import (
    Array,
    Chunk,
    Numbers,
    Tally,
    base_likelihood,
    unchanged_precision,
)
from mergekit_bayes.kernels.plain import plain_pass
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.posterior.forms import by_row
from mergekit_bayes.stream.chunks import FirstPassResult
from mergekit_bayes.stream.numbers import kind_of, numbers_of, real_of


def merged_rows(plan: MergePlan, step: Step, measured: FirstPassResult, rows: int) -> Array:
    """The merged precision of a tensor's first rows, from the coarse ones of all inputs.

    The method itself combines them, each row as one entry whose means are all zero.

    Args:
        plan: The merge.
        step: The tensor.
        measured: What the first pass measured of it; every input has coarse numbers.
        rows: How many rows are merged; 1 for one number.

    Returns:
        (rows,) in float32.
    """
    real, numbers = real_of(step), numbers_of(plan, step, measured.facts)
    pooled = [measured.pooled[operand.input] for operand in step.operands]
    stored = np.stack([by_row(values, rows) for values in pooled]).astype(np.float32)
    extras = np.stack([by_row(extra, rows) for extra in measured.extras]).astype(real)
    if plan.config.on_bad == "base":
        _replace_bad(step, stored, extras, numbers)
    chunk = Chunk(
        means=np.zeros(stored.shape, real),
        precisions=stored,
        extras=extras,
        first=1,
        row=1,
        offset=0,
        mean=np.zeros(rows, real),
        precision=np.zeros(rows, np.float32),
    )
    plain_pass(kind_of(plan, step))(chunk, numbers, Tally(len(stored)))
    return chunk.precision


def _replace_bad(step: Step, stored: Array, extras: Array, numbers: Numbers) -> None:
    """Let a task add nothing where its number is no precision, in place; (models, rows) each."""
    of_base = base_likelihood(numbers, stored, extras)
    for position, (operand, values) in enumerate(zip(step.operands, stored, strict=True)):
        if operand is not step.donor:
            unchanged = unchanged_precision(numbers, position, of_base, extras[position])
            values[:] = np.where(is_bad_precision(values), unchanged, values)
