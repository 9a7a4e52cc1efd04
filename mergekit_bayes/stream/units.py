"""The work of a merge in units: ranges of one tensor, or all of one that is merged as a whole."""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.methods.measuring import WINDOW, whole_rows
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.chunks import mean_type
from mergekit_bayes.stream.numbers import real_of

UNIT = 1 << 22  # entries; a killed merge repeats at most one unit per thread
# Bytes that a thread reads and makes at a time. A chunk costs the interpreter 0.1 ms whatever its
# size; what does not fit the second cache any more costs less than that.
_BUFFERS = 1 << 23
_LEAST = 1 << 16  # entries at a time


class Unit(NamedTuple):
    """Entries `start:stop` of a step.

    Attributes:
        id: Number of the unit, from 0 on.
        step: Index of the step in the plan.
        start: First entry, in flat order.
        stop: End of the entries.
        position: Place of the unit in the whole merge, in [0, 1).
    """

    id: int
    step: int
    start: int
    stop: int
    position: float


def units_of(plan: MergePlan) -> list[Unit]:
    """All units of a plan, in order."""
    total = max(1, sum(step.spec.size for step in plan.steps))
    units: list[Unit] = []
    before = 0
    for index, step in enumerate(plan.steps):
        size = whole_rows(UNIT, entries_together(plan, step))
        for start in range(0, step.spec.size, size):
            stop = min(start + size, step.spec.size)
            units.append(Unit(len(units), index, start, stop, (before + start) / total))
        before += step.spec.size
    return units


def entries_at_a_time(plan: MergePlan, step: Step) -> int:
    """Entries of a tensor that a compiled pass reads, combines and writes at a time.

    A power of two, so that the blocks in which a pass counts are the same for any model. Arrays
    count as a pass holds them: dtypes other than BF16, F32 and F64 are widened. A rule for whole
    tensors runs in numpy, whose temporaries should be small.
    """
    if step.settings is not None:
        return WINDOW
    models = len(step.operands)
    each = models * np.dtype(mean_type(step)).itemsize
    each += 2 if step.spec.dtype == "BF16" else np.dtype(real_of(step)).itemsize
    if plan.method.needs_precision:
        each += 4 * (models + 1)
    return max(_LEAST, 1 << (_BUFFERS // each).bit_length() - 1)


def entries_together(plan: MergePlan, step: Step) -> int:
    """How many entries of a tensor must be in memory together to merge one of them."""
    size, rule = max(step.spec.size, 1), plan.method.tensor
    if rule is None or step.settings is None:
        return size if step.axis is not None else 1
    needs = rule.needs(step.settings)
    if needs == "rows" and len(step.spec.shape) > 1:
        return max(step.spec.shape[-1], 1)
    return size if needs in ("rows", "tensor") else 1
