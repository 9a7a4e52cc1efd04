"""The inputs of a merge, kept in memory as its passes take them.

For every chunk of a tensor that is merged, what a pass reads is kept once: the means of all models
and, where precisions weigh, those, an entry

    2 bytes a model for means that are all BF16, else 4 (8 where the output is F64)
    4 bytes a model for precisions, 2 where all are stored by entry in BF16

and of a layer that is merged as a whole matrix, 8 bytes for every number. A merge in which some
task has scale zero takes the donor in its place, whose arrays are among those that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from mergekit_bayes.kernels.base import Array
from mergekit_bayes.merge.matrices import Layer, read_weights
from mergekit_bayes.plan import MergePlan, Operand, Step
from mergekit_bayes.posterior.stored import stored_numbers
from mergekit_bayes.stream.chunks import FirstPassResult, Reader, mean_type
from mergekit_bayes.stream.matrices import Place, Precision, stored

_Row: TypeAlias = tuple[str, str, float]  # model, name of its tensor, number instead of one
_Place: TypeAlias = tuple[str, str, int, int]  # mean or precision, tensor, first entry, end


class _Stack(NamedTuple):
    """Arrays of one chunk, (models, n), and which tensor each row is of."""

    rows: list[_Row]
    array: Array


@dataclass
class Held:
    """What is kept. Threads that read different chunks may share it.

    Attributes:
        stacks: The chunks that passes take.
        weights: Those of each model in a layer that is merged as a whole matrix.
        matrices: Its precision there.
    """

    stacks: dict[_Place, _Stack] = field(default_factory=dict)
    weights: dict[tuple[str, _Row], Array] = field(default_factory=dict)
    matrices: dict[tuple[str, _Row], dict[Place, Precision]] = field(default_factory=dict)
    _numbers: dict[tuple[str, _Row], int] = field(default_factory=dict)  # of the matrices

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = [stack.array.nbytes for stack in self.stacks.values()]
        weights = [each.nbytes for each in self.weights.values()]
        return sum(arrays) + sum(weights) + 8 * sum(self._numbers.values())

    def layer(self, plan: MergePlan, step: Step) -> Layer:
        """A tensor that is merged as a whole matrix; what it takes of each model is read once."""
        rows = zip(step.operands, _mean_rows(step), strict=True)
        weights = [self._weights(plan, step, operand, row) for operand, row in rows]
        if not plan.method.needs_precision:
            return Layer(weights, None)
        rows = zip(step.operands, _precision_rows(step), strict=True)
        return Layer(weights, [self._matrices(step, operand, row) for operand, row in rows])

    def _weights(self, plan: MergePlan, step: Step, operand: Operand, row: _Row) -> Array:
        key = step.source, row
        if key not in self.weights:
            self.weights[key] = read_weights(plan, step, operand)
        return self.weights[key]

    def _matrices(self, step: Step, operand: Operand, row: _Row) -> dict[Place, Precision]:
        key = step.source, row
        if key not in self.matrices:
            self.matrices[key] = stored(step, operand)
            self._numbers[key] = _numbers_of(operand)
        return self.matrices[key]

    def clear(self) -> None:
        """Let go of everything."""
        self.stacks.clear()
        self.weights.clear()
        self.matrices.clear()
        self._numbers.clear()

    def get(self, place: _Place, rows: list[_Row], read: Callable[[], Array]) -> Array:
        """The rows at a place, which are read, and kept, if nothing is kept there.

        Args:
            place: Which chunk.
            rows: What the pass takes, in its order.
            read: Reads them into a buffer that may be used again.
        """
        kept = self.stacks.get(place)
        if kept is None:
            kept = self.stacks[place] = _Stack(rows, read().copy())
        if kept.rows == rows:
            return kept.array
        if not all(row in kept.rows for row in rows):
            return read()
        gathered: Array = kept.array[[kept.rows.index(row) for row in rows]]
        return gathered


class HeldReader(Reader):
    """A reader that keeps what it has read. Each thread has its own, on one `Held`.

    Args:
        plan: The merge, at any scales.
        held: What is kept.
    """

    def __init__(self, plan: MergePlan, held: Held) -> None:
        super().__init__(plan)
        self._held = held
        # A pass replaces bad entries in place, and must find them again at the next scales.
        self._is_changed = plan.config.on_bad == "base"

    def means(self, step: Step, start: int, stop: int) -> Array:
        """As `Reader.means`, but the kept arrays, which nobody may change."""
        rows, place = _mean_rows(step), ("mean", step.source, start, stop)
        means = self._held.get(
            place, rows, lambda: super(HeldReader, self).means(step, start, stop)
        )
        return means.copy() if self._is_changed else means

    def precisions(self, step: Step, measured: FirstPassResult, start: int, stop: int) -> Array:
        """As `Reader.precisions`, but the kept arrays, which nobody may change."""
        place = ("precision", step.source, start, stop)
        return self._held.get(
            place,
            _precision_rows(step),
            lambda: super(HeldReader, self).precisions(step, measured, start, stop),
        )


def held_bytes(plan: MergePlan) -> int:
    """Bytes that the inputs of a merge take when all of them are kept, at most."""
    merged = (s for s in plan.steps if s.copied is None and s.tied_to is None)
    return sum(_bytes_of(step, weighs=plan.method.needs_precision) for step in merged)


def _bytes_of(step: Step, *, weighs: bool) -> int:
    if step.axis is None:
        item = np.dtype(mean_type(step)).itemsize + (4 if weighs else 0)
        return step.merged * len(step.operands) * item
    numbers = sum(map(_numbers_of, step.operands)) if weighs else 0
    return 8 * (step.spec.size * len(step.operands) + numbers)


def _numbers_of(operand: Operand) -> int:
    """How many numbers a model's matrices for a tensor have."""
    precision = operand.precision
    if precision is None or precision.source is None:
        return 0
    return stored_numbers(precision.source, precision.name)


def _mean_rows(step: Step) -> list[_Row]:
    return [(operand.mean.input.ref, operand.mean.name, 0.0) for operand in step.operands]


def _precision_rows(step: Step) -> list[_Row]:
    owners = {id(o.input.posterior.precision): o.input.ref for o in step.operands}
    rows: list[_Row] = []
    for operand in step.operands:
        precision = operand.precision
        if precision is not None:
            owner = "" if precision.source is None else owners[id(precision.source)]
            rows.append((owner, precision.name, precision.number))
    return rows
