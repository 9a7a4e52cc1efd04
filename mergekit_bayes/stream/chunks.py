"""Read a range of a tensor from all models, into the arrays of a pass."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from mergekit_bayes.checkpoint.codec import decode
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, CheckpointSource
from mergekit_bayes.kernels.base import Array, Chunk
from mergekit_bayes.methods.base import Facts
from mergekit_bayes.methods.tensors import Measured
from mergekit_bayes.plan import Input, MergePlan, Operand, Step
from mergekit_bayes.posterior.forms import spread
from mergekit_bayes.stream.numbers import real_of

_Stored: TypeAlias = tuple[CheckpointSource, str]  # a tensor to be read chunk by chunk

# Arrays of these types hold a tensor's bytes as they are stored.
_AS_STORED = {("BF16", "<u2"), ("F32", "<f4"), ("F64", "<f8")}


@dataclass
class FirstPassResult:
    """What must be known of one tensor before its entries are merged.

    Attributes:
        pooled: For each input whose precision is coarser than one number per entry: its numbers,
            (1,) or (rows,), float32.
        extras: What shrinkage adds to H by row: (models, 1) or (models, rows), in the order of the
            plan's inputs.
        facts: What the method measured.
        bad: For each input, how many bad entries pooling left out.
        products: For a rule that reads them, the products of each two models, as in
            `methods.tensors.Tensors`.
        measured: What a rule for whole tensors measured, by name.
        step: The tensor with the scales of the components of mixtures; None where none counts.
        shares: For each task, its responsibility in the mixture that it is a component of; zero for
            other tasks, and where the mixture has scale zero. Empty where no mixture counts.
    """

    pooled: dict[Input, Array]
    extras: Array
    facts: Facts = None
    bad: tuple[int, ...] = ()
    step: Step | None = None
    shares: tuple[float, ...] = ()
    products: Array | None = None
    measured: Measured = field(default_factory=dict)


class Reader:
    """Reads chunks into buffers that are reused. Each thread has its own reader.

    Args:
        plan: The merge.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._buffers: dict[str, Array] = {}

    def buffer(self, purpose: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialised array, the same memory for every call with one purpose."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if purpose not in self._buffers or self._buffers[purpose].size < nbytes:
            self._buffers[purpose] = np.empty(nbytes, np.uint8)
        array: Array = self._buffers[purpose][:nbytes].view(dtype).reshape(shape)
        return array

    def raw(self, source: CheckpointSource, name: str, start: int, stop: int) -> Array:
        """Entries `start:stop` of a tensor as bytes, in a buffer."""
        item = ITEM_SIZE[source.specs[name].dtype]
        buffer = self.buffer("raw", ((stop - start) * item,), np.uint8)
        source.read_bytes(name, start * item, buffer.data)
        return buffer

    def chunk(self, step: Step, measured: FirstPassResult, start: int, stop: int) -> Chunk:
        """Entries `start:stop` of a step, all of them to be merged, in buffers.

        This is where the models of a plan become the rows of a pass's arrays: the base first, if
        any, then the tasks.
        """
        n, real = stop - start, real_of(step)
        means = self.means(step, start, stop)
        mean = self.buffer("mean", (n,), np.uint16 if step.spec.dtype == "BF16" else real)
        if not self._plan.method.needs_precision:
            empty = np.zeros((len(means), 0), np.float32)
            extras = np.zeros((len(means), 1), real)
            return Chunk(means, empty, extras, n, n, start, mean, np.zeros(0, np.float32))
        precisions = self.precisions(step, measured, start, stop)
        extras, left_in_row, row_size = _extras(measured.extras, step.row, start, stop)
        with np.errstate(over="ignore"):  # a merge that is not finite is refused as such
            extras = extras.astype(real)
        precision = self.buffer("precision", (n,), np.float32)
        return Chunk(means, precisions, extras, left_in_row, row_size, start, mean, precision)

    def means(self, step: Step, start: int, stop: int) -> Array:
        """Entries `start:stop` of all means, (models, n) as in a `Chunk`, in a buffer."""
        shape = (len(step.operands), stop - start)
        means = self.buffer("means", shape, mean_type(step))
        for row, operand in zip(means, step.operands, strict=True):
            self._fill(row, operand.mean.source, operand.mean.name, start, stop)
        return means

    def precisions(self, step: Step, measured: FirstPassResult, start: int, stop: int) -> Array:
        """Entries `start:stop` of all precisions, (models, n) as in a `Chunk`, in a buffer."""
        operands = step.operands
        stored = [_by_entry(operand, measured) for operand in operands]
        are_bits = all(s is not None and s[0].specs[s[1]].dtype == "BF16" for s in stored)
        shape = (len(operands), stop - start)
        precisions = self.buffer("precisions", shape, np.uint16 if are_bits else np.float32)
        for values, operand, tensor in zip(precisions, operands, stored, strict=True):
            if tensor is not None:
                self._fill(values, *tensor, start, stop)
            else:
                values[:] = spread(measured.pooled[operand.input], step.row, start, stop)
        return precisions

    def _fill(
        self, into: Array, source: CheckpointSource, name: str, start: int, stop: int
    ) -> None:
        dtype = source.specs[name].dtype
        if (dtype, into.dtype.str) in _AS_STORED:
            source.read_bytes(name, start * ITEM_SIZE[dtype], into.view(np.uint8).data)
        else:
            with np.errstate(over="ignore"):  # an F64 beyond F32 is infinite here, and refused
                into[:] = decode(self.raw(source, name, start, stop), dtype)


def mean_type(step: Step) -> DTypeLike:
    """The type in which a pass takes the means of a step: uint16 for bits of bfloat16."""
    dtypes = {operand.mean.spec.dtype for operand in step.operands}
    real = real_of(step)
    return np.uint16 if dtypes == {"BF16"} and real == np.float32 else real


def _by_entry(operand: Operand, measured: FirstPassResult) -> _Stored | None:
    """The stored precision with one number per entry; None if it is coarser, or was pooled."""
    precision = operand.precision
    if precision is None or precision.source is None or operand.input in measured.pooled:
        return None
    return precision.source, precision.name


def _extras(extras: Array, row: int, start: int, stop: int) -> tuple[Array, int, int]:
    """The extras of a chunk, entries left in its first row, and entries of the others."""
    if extras.shape[1] == 1:
        return extras, stop - start, stop - start
    rows = np.ascontiguousarray(extras[:, start // row : (stop - 1) // row + 1])
    return rows, row - start % row, row
