"""The inputs of a merge, kept in memory as its passes take them.

For every chunk of a tensor that is merged, what a pass reads is kept once: the means of all models
and, where precisions weigh, those, an entry

    2 bytes a model for means that are all BF16, else 4 (8 where the output is F64)
    4 bytes a model for precisions, 2 where all are stored by entry in BF16

and of a layer that is merged as a whole matrix, 8 bytes for every number. A merge in which some
task has scale zero reads the donor in its place; its arrays are gathered from those that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from mergekit_bayes.kernels.base import Array
from mergekit_bayes.merge.matrices import Layer, read_layer
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.posterior.stored import stored_numbers
from mergekit_bayes.stream.chunks import FirstPassResult, Reader, mean_type

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
        layers: The layers that are merged as whole matrices, each with its bytes.
    """

    stacks: dict[_Place, _Stack] = field(default_factory=dict)
    layers: dict[tuple[str, tuple[_Row, ...]], tuple[Layer, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = sum(stack.array.nbytes for stack in self.stacks.values())
        return arrays + sum(size for _, size in self.layers.values())

    def layer(self, plan: MergePlan, step: Step) -> Layer:
        """A tensor that is merged as a whole matrix, read once for each choice of operands."""
        key = step.source, (*_mean_rows(step), *_precision_rows(step))
        if key not in self.layers:
            size = _bytes_of(step, weighs=plan.method.needs_precision)
            self.layers[key] = read_layer(plan, step), size
        return self.layers[key][0]

    def clear(self) -> None:
        """Let go of everything."""
        self.stacks.clear()
        self.layers.clear()

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
    precisions = [operand.precision for operand in step.operands if weighs]
    numbers = sum(
        stored_numbers(p.source, p.name) for p in precisions if p is not None and p.source
    )
    return 8 * (step.spec.size * len(step.operands) + numbers)


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
