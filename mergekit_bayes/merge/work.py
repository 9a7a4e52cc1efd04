"""Carry out units of work: read, combine and write ranges of one tensor, chunk by chunk."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import (
    decode,
    encode,
    is_bad_mean,
    is_bad_precision,
    overflowed,
)
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, MERGEABLE, TensorSink
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.kernels import elementwise
from mergekit_bayes.kernels.base import Array, Chunk, Kind, Numbers, Pass, Tally, single_precision
from mergekit_bayes.merge.coarse import merged_rows
from mergekit_bayes.merge.matrices import Layer, copied_matrices, merge_matrices, read_layer
from mergekit_bayes.merge.tally import UnitTally
from mergekit_bayes.merge.tensors import merge_entries
from mergekit_bayes.methods.measuring import whole_rows
from mergekit_bayes.plan import MergePlan, Operand, Step
from mergekit_bayes.posterior.forms import spread
from mergekit_bayes.stream.bad_entries import refuse_bad, replace_bad_entries
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.numbers import kind_of, numbers_of
from mergekit_bayes.stream.units import Unit, entries_at_a_time, entries_together

_AS_COMPUTED = ("BF16", "F32", "F64")  # dtypes that a pass writes itself


class Sinks(NamedTuple):
    """Where a tensor's mean and precision go.

    Attributes:
        mean: The file of the mean, or the parameters of a model in memory.
        precision: The file of the precision; None where none is written.
    """

    mean: TensorSink
    precision: TensorSink | None


class Worker:
    """Carries out units. Each thread has its own.

    Args:
        plan: The merge.
        reader: The thread's reader.
        chunk: Entries that are read, combined and written at a time; None for as many as the
            compiled pass does best.
        fused: Whether to use the compiled passes.
        layers: Reads a tensor that is merged as a whole matrix.
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: Reader,
        chunk: int | None,
        *,
        fused: bool,
        layers: Callable[[MergePlan, Step], Layer] = read_layer,
    ) -> None:
        self._plan, self._reader, self._size, self._fused = plan, reader, chunk, fused
        self._read_layer = layers
        self._passes: dict[Kind, Pass] = {}
        self._last: tuple[FirstPassResult, Kind, Numbers] | None = None

    def run(self, unit: Unit, measured: FirstPassResult, sinks: Sinks) -> UnitTally:
        """Read, combine and write one unit.

        Args:
            unit: The entries.
            measured: What the first pass measured of their tensor.
            sinks: Where they are written.

        Raises:
            CheckpointError: A mean that cannot be merged, or a merge that is not finite.
            PrecisionError: A precision that cannot be merged.
        """
        step, tally = measured.step or self._plan.steps[unit.step], UnitTally()
        if step.axis is not None:
            try:
                self._merge_matrices(step, measured, sinks, tally)
            except MemoryError:
                raise CheckpointError(
                    f"'{step.name}' {list(step.spec.shape)} is merged as a whole, which takes more "
                    "memory than there is. See --dry-run for how much, and use fewer --threads, "
                    "precisions of more --blocks or of a --rank, or such as are numbers."
                ) from None
            return tally
        if unit.start == 0:
            tally.add_replaced(measured.bad)
            if sinks.precision is not None and step.has_matrices:
                self._write_matrices(step, copied_matrices(self._plan, step), sinks.precision)
            elif sinks.precision is not None and step.has_coarse_precision:
                self._write_coarse(step, measured, sinks.precision)
        start = unit.start
        size = self._size or entries_at_a_time(self._plan, step)
        size = whole_rows(size, entries_together(self._plan, step))
        while start < unit.stop:
            stop = min(start + size, unit.stop)
            if start < step.merged and step.settings is not None:
                stop = min(stop, step.merged)
                self._merge_tensor(step, measured, start, stop, sinks, tally)
            elif start < step.merged:
                stop = min(stop, step.merged)
                self._merge(step, measured, start, stop, sinks, tally)
            else:
                owner, end = step.owner(start)
                stop = min(stop, end)
                self._copy(step, measured, owner, start, stop, sinks)
            start = stop
        tally.add_shares(measured.shares)
        return tally

    def _merge(
        self,
        step: Step,
        measured: FirstPassResult,
        start: int,
        stop: int,
        sinks: Sinks,
        tally: UnitTally,
    ) -> None:
        kind, numbers = self._constants(step, measured)
        if kind not in self._passes:
            self._passes[kind] = elementwise(kind, fused=self._fused)
        chunk = self._reader.chunk(step, measured, start, stop)
        counts = Tally(len(chunk.means))
        self._passes[kind](chunk, numbers, counts)
        if counts.bad_means.any() or counts.bad_precisions.any():
            chunk, replaced = replace_bad_entries(self._plan, step, measured, chunk, numbers)
            tally.add_replaced(replaced)
            counts = Tally(len(chunk.means))
            self._passes[kind](chunk, numbers, counts)
        data = chunk.mean.view(np.uint8).data
        if step.spec.dtype not in _AS_COMPUTED:
            data = encode(chunk.mean, step.spec.dtype)
            self._count_lost(step, chunk, data, counts)
        if counts.bad or not _is_finite(data, step.spec.dtype):
            self._refuse(step)
        tally.add(counts)
        sinks.mean.write_bytes(step.name, start * ITEM_SIZE[step.spec.dtype], data)
        if sinks.precision is not None and not step.has_coarse_precision:
            sinks.precision.write_bytes(step.name, start * 4, chunk.precision.view(np.uint8).data)

    def _constants(self, step: Step, measured: FirstPassResult) -> tuple[Kind, Numbers]:
        """What is the same for all chunks of a tensor: making it costs as much as reading one."""
        if self._last is None or self._last[0] is not measured:
            kind = kind_of(self._plan, step)
            self._last = measured, kind, numbers_of(self._plan, step, measured.facts)
        return self._last[1:]

    def _merge_tensor(
        self,
        step: Step,
        measured: FirstPassResult,
        start: int,
        stop: int,
        sinks: Sinks,
        tally: UnitTally,
    ) -> None:
        counts = Tally(len(self._plan.inputs))
        data, replaced = merge_entries(
            self._plan, step, measured, self._reader, start, stop, counts
        )
        tally.add(counts)
        tally.add_replaced(_by_input(self._plan, step, replaced))
        sinks.mean.write_bytes(step.name, start * ITEM_SIZE[step.spec.dtype], data)

    def _merge_matrices(
        self, step: Step, measured: FirstPassResult, sinks: Sinks, tally: UnitTally
    ) -> None:
        counts = Tally(len(step.operands))
        layer = self._read_layer(self._plan, step)
        numbers = numbers_of(self._plan, step, measured.facts, np.float64)
        numbers = numbers._replace(facts=measured.facts)  # whole numbers stay whole
        merged = merge_matrices(self._plan, step, layer, numbers, counts)
        tally.add_replaced(measured.bad)
        tally.add(counts)
        sinks.mean.write_bytes(step.name, 0, merged.mean)
        if sinks.precision is not None and merged.precision is not None:
            self._write_matrices(step, merged.precision, sinks.precision)

    def _write_matrices(self, step: Step, matrices: Array, sink: TensorSink) -> None:
        with np.errstate(over="ignore"):  # refused below
            data = encode(matrices.reshape(-1), "F32")
        if overflowed(data, "F32"):
            raise CheckpointError(
                f"'{step.name}': the precision of the merge is not finite, or does not fit F32. "
                "Precisions must be on one scale. See that of each model with `bmerge inspect`."
            )
        sink.write_bytes(step.name, 0, data)

    def _count_lost(self, step: Step, chunk: Chunk, data: memoryview, counts: Tally) -> None:
        """Count lost entries for a dtype that the pass does not write itself.

        The comparison is made after the rounding that really happened.
        """
        if step.base is None or not counts.changed:
            return
        means = [decode(m, "BF16") if m.dtype == np.uint16 else m for m in chunk.means]
        base_mean, *task_means = means
        moved = np.zeros(chunk.mean.size, bool)
        for task, mean in zip(step.tasks, task_means, strict=True):
            moved |= (mean != base_mean) & (task.scale != 0)
        dtype = step.spec.dtype
        written = decode(np.frombuffer(data, np.uint8), dtype)
        before = decode(np.frombuffer(encode(base_mean, dtype), np.uint8), dtype)
        counts.lost = int(np.count_nonzero(moved & (written == before)))

    def _refuse(self, step: Step) -> None:
        """Raise the error that explains why a written entry is not finite."""
        for operand in step.operands:
            if self._plan.config.on_bad == "error" or operand is step.donor:
                refuse_bad(self._plan, step, operand)
        if step.spec.dtype in ("F16", "F8_E4M3", "F8_E5M2"):
            raise CheckpointError(
                f"'{step.name}': the merge does not fit {step.spec.dtype}. Write it as --dtype "
                "BF16 or F32."
            )
        raise CheckpointError(
            f"'{step.name}': the merge is not finite. Are its precisions on the same scale?"
        )

    def _copy(
        self,
        step: Step,
        measured: FirstPassResult,
        owner: Operand,
        start: int,
        stop: int,
        sinks: Sinks,
    ) -> None:
        """Write entries of the donor, or those that it lacks of the model that has them."""
        mean = owner.mean
        raw = self._reader.raw(mean.source, mean.name, start, stop)
        stored, written = mean.spec.dtype, step.spec.dtype
        data = raw.data
        if owner is step.rest and is_bad_mean(decode(raw, stored)).any():
            refuse_bad(self._plan, step, owner)  # no base has a value for it
        if stored != written and stored in MERGEABLE:
            values = decode(raw, stored)
            data = encode(values, written)
            if is_bad_mean(values).any() or overflowed(data, written):
                self._refuse(step)
        sinks.mean.write_bytes(step.name, start * ITEM_SIZE[written], data)
        if sinks.precision is not None and not step.has_coarse_precision:
            precision = self._own_entries(step, measured, owner, start, stop)
            self._refuse_bad_precision(step, precision)
            sinks.precision.write_bytes(step.name, start * 4, encode(precision, "F32"))

    def _own_entries(
        self, step: Step, measured: FirstPassResult, owner: Operand, start: int, stop: int
    ) -> Array:
        """An input's own precision at some entries, counted as in the rest of the merge."""
        if owner.input in measured.pooled:
            stored = spread(measured.pooled[owner.input], step.row, start, stop)
        else:
            assert owner.precision is not None
            assert owner.precision.source is not None
            source, name = owner.precision.source, owner.precision.name
            raw = self._reader.raw(source, name, start, stop)
            stored = decode(raw, source.specs[name].dtype)
        position = step.operands.index(owner)
        extra = spread(measured.extras[position].astype(np.float32), step.row, start, stop)
        stored = np.asarray(stored, np.float32)
        return self._counted(step, position, stored, extra, stop - start)

    def _counted(self, step: Step, position: int, stored: Array, extra: Array, n: int) -> Array:
        """The precision of an input by its own prior: (n,) in float32."""
        self._refuse_bad_precision(step, stored)
        precision = single_precision(numbers_of(self._plan, step, None), position, stored, extra)
        return np.broadcast_to(precision, (n,)).astype(np.float32)

    def _write_coarse(self, step: Step, measured: FirstPassResult, sink: TensorSink) -> None:
        """Write a precision of one number, or one per row: merged by the method itself, row by row.

        Rows that are not merged keep the donor's precision, and those that it lacks their own.
        """
        assert step.precision_spec is not None
        rows = step.precision_spec.size
        precision = self._coarse(step, measured, step.donor, 0, rows)
        first = step.donor.mean.spec.size // step.row
        if step.rest is not None:
            precision[first:] = self._coarse(step, measured, step.rest, first, rows)
        merged = rows if step.merged == step.spec.size else step.merged // step.row
        if step.copied is None and merged:
            precision[:merged] = merged_rows(self._plan, step, measured, merged)
        self._refuse_bad_precision(step, precision)
        sink.write_bytes(step.name, 0, encode(precision, "F32"))

    def _coarse(
        self, step: Step, measured: FirstPassResult, owner: Operand, first: int, rows: int
    ) -> Array:
        """An input's own precision of rows `first:rows`, one number each; the last one repeats."""
        position = step.operands.index(owner)
        stored = measured.pooled.get(owner.input, np.zeros(1, np.float32))
        if stored.size > 1:
            stored = np.pad(stored, (0, rows - stored.size), mode="edge")[first:]
        extra = spread(measured.extras[position], 1, first, rows).astype(np.float32)
        return self._counted(step, position, stored, extra, rows - first)

    def _refuse_bad_precision(self, step: Step, precision: Array) -> None:
        """Raise an error if a copied entry of the donor's precision is negative or not finite.

        The pass has checked merged entries itself.
        """
        if is_bad_precision(precision).any():
            self._refuse(step)


def _is_finite(data: memoryview, dtype: str) -> bool:
    """Whether a dtype of small range holds its entries; a pass checks the other dtypes itself."""
    return dtype in _AS_COMPUTED or not overflowed(data, dtype)


def _by_input(plan: MergePlan, step: Step, counts: Sequence[int]) -> list[int]:
    """What is counted by operand, for each input of the plan: a tensor may be made of few."""
    found = dict.fromkeys(plan.inputs, 0)
    for operand, count in zip(step.operands, counts, strict=True):
        found[operand.input] += count
    return list(found.values())
