"""The forms in which a precision is stored, and what each of them is by entry.

A precision has one number for every entry of its tensor, for every row (one slice of the first
axis), for the tensor, or for the whole model (a number given by hand, without a file):

    form      shape for a mean of shape (r, c, d)
    ENTRY     (r, c, d)
    ROW       (r, 1, 1)
    TENSOR    (1, 1, 1) or ()
    TENSOR    no tensor at all: one number everywhere
    MATRIX    (..., k, n, n)      for a mean of shape (..., r, c) with c = k n
    MATRIX    (..., k, n, n, 1)   the same for its axis before the last, r = k n
    KRONECKER (..., k, r r + c c, 1, 1)    the numbers of k terms of a sum of Kronecker products
    LOW_RANK  (..., 1 + k, c, 1, 1, 1)     the numbers of a diagonal and of a factor of k rows
    LOW_RANK  (..., 1 + k, r, 1, 1, 1, 1)  the same for the axis before the last

The last five are precisions of directions: the blocks on the diagonal of a matrix for one axis of
the tensor, which holds for every index of the other one, or matrices for both (`factors`). Merged
are then whole matrices (`methods/base.py`); nothing here reads them by entry.

This module is the only one that knows these shapes. The plan asks which form a precision has and
which form the merged one needs; the stream asks for its numbers (`StoredPrecision.coarse`) and
spreads them over a chunk (`spread`).

A precision that is not stored by entry but determines every entry, such as that of a product of
LoRA factors, enters as a `PrecisionSource` whose specs have the mean's shape and whose entries are
computed as they are read: its form is ENTRY.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from mergekit_bayes.checkpoint.codec import is_bad_precision, read_chunk
from mergekit_bayes.checkpoint.specs import Array, PrecisionSource, TensorSpec
from mergekit_bayes.errors import PrecisionError

Shape = tuple[int, ...]
_DTYPES = ("F32", "BF16", "F64")  # in which a merge reads precisions


class Form(IntEnum):
    """How finely a precision resolves its tensor; of numbers a finer form is larger."""

    TENSOR = 1
    ROW = 2
    ENTRY = 3
    MATRIX = 4
    KRONECKER = 5
    LOW_RANK = 6

    def shape_of(self, mean: Shape) -> Shape:
        """The shape of a precision in this form, for a mean of this shape; not of matrices."""
        assert self <= Form.ENTRY
        if self is Form.ENTRY:
            return mean
        return row_shape(mean) if self is Form.ROW else one_shape(mean)

    def pooled(self, pool: Literal["tensor", "row"] | None) -> "Form":
        """The form after `--pool`, which only makes a precision coarser."""
        if pool is None:
            return self
        return min(self, Form.TENSOR if pool == "tensor" else Form.ROW)


class DirectionsSpec(TensorSpec):
    """Dtype and shape of a precision of directions, as `posterior/stored.py` makes of its parts.

    No one tensor in a file is such a precision, whatever shape it has: it holds numbers.
    """


@dataclass(frozen=True)
class StoredPrecision:
    """The precision of one tensor of a model, in whatever form it is stored.

    Attributes:
        form: How finely it resolves the tensor.
        source: Where it is read from; None for one number everywhere.
        name: Its name in `source`.
        number: The one number, 1/weight^2, where there is no source.
        axis: Of a matrix, in full or of low rank: the axis of the tensor that it is for, -1 or -2;
            of a sum of Kronecker products -1.
    """

    form: Form
    source: PrecisionSource | None
    name: str
    number: float = 0.0
    axis: int = 0

    @classmethod
    def everywhere(cls, number: float) -> "StoredPrecision":
        """One number for every entry of a model."""
        return cls(Form.TENSOR, None, "", number)

    @classmethod
    def of(cls, source: PrecisionSource, name: str, mean: Shape) -> "StoredPrecision":
        """The precision that a source holds under a name.

        Args:
            source: The precision's tensors.
            name: One of its names.
            mean: Shape of the mean that it belongs to.

        Raises:
            PrecisionError: Its shape is that of no form, or its dtype is not read.
        """
        spec = source.specs[name]
        if not is_form_of(spec, TensorSpec("F32", mean)):
            raise PrecisionError(
                f"the precision of '{name}' in {source.where(name)} is {spec.dtype} "
                f"{list(spec.shape)}, expected F32 or BF16 {list(mean)} like the mean's, one "
                f"number a row {list(row_shape(mean))}, or one number {list(one_shape(mean))}."
            )
        if spec.shape == () or spec.shape == one_shape(mean):
            return cls(Form.TENSOR, source, name)
        if (of_directions := form_of_directions(spec.shape, mean)) is not None:
            form, axis = of_directions
            return cls(form, source, name, axis=axis)
        return cls(Form.ENTRY if spec.shape == mean else Form.ROW, source, name)

    def coarse(self, rows: int) -> Array | None:
        """The numbers of a precision that is coarser than one an entry, in float32.

        Args:
            rows: How many of the tensor's first rows are needed.

        Returns:
            (1,) or (rows,); None where there is one number an entry, to be read chunk by chunk.
        """
        assert self.form <= Form.ENTRY
        if self.form is Form.ENTRY:
            return None
        if self.source is None:
            return np.array([self.number], np.float32)
        size = self.source.specs[self.name].size
        numbers = read_chunk(self.source, self.name, 0, size).astype(np.float32)
        return numbers if self.form is Form.TENSOR else numbers[:rows]


def is_form_of(precision: TensorSpec | None, mean: TensorSpec) -> bool:
    """Whether a stored tensor is, by dtype and shape, a precision of a mean in some form."""
    return (
        precision is not None
        and precision.dtype in _DTYPES
        and (
            form_of_directions(precision.shape, mean.shape) is not None
            if isinstance(precision, DirectionsSpec)
            else precision.shape in _shapes(mean.shape)
        )
    )


def row_shape(shape: Shape) -> Shape:
    """The shape of a precision with one number a row: a slice of the first axis."""
    return (*shape[:1], *(1 for _ in shape[1:]))


def one_shape(shape: Shape) -> Shape:
    """The shape of a precision that is one number for the tensor."""
    return tuple(1 for _ in shape)


def merged_form(forms: Collection[Form], *, by_row: bool) -> Form:
    """The coarsest form that holds a merge of precisions of these forms.

    Args:
        forms: Those of the models, after pooling.
        by_row: Whether something else differs from row to row, such as a shrinkage by row.
    """
    return max((*forms, Form.ROW) if by_row else forms)


def spread(numbers: Array, row: int, start: int, stop: int) -> Array:
    """The numbers of a coarse precision at entries `start:stop` of its tensor.

    Args:
        numbers: (1,) or (rows,).
        row: Entries of a row.
        start: First entry, in flat order.
        stop: End of the entries.

    Returns:
        (stop - start,), or (1,) as it is for one number.
    """
    if numbers.size == 1:
        return numbers
    first, last = start // row, (stop - 1) // row + 1
    return np.repeat(numbers[first:last], row)[start - first * row : stop - first * row]


def by_row(numbers: Array, rows: int) -> Array:
    """The numbers of a coarse precision at the first rows: (rows,), perhaps a read-only view."""
    return np.broadcast_to(spread(numbers, 1, 0, rows), rows)


def without_bad(numbers: Array, replacement: float) -> tuple[Array, int]:
    """Coarse numbers with those that are no precision replaced, and how many these were."""
    bad = is_bad_precision(numbers)
    return np.where(bad, np.float32(replacement), numbers), int(np.count_nonzero(bad))


def tensor_mean(numbers: Array) -> Array:
    """The mean of coarse numbers over the tensor: (1,) in float32, summed in float64."""
    mean: Array = numbers.mean(keepdims=True, dtype=np.float64).astype(np.float32)
    return mean


def form_of_directions(shape: Shape, mean: Shape) -> tuple[Form, int] | None:
    """The form of a precision of directions by its shape, and the axis that it is for.

    Args:
        shape: The precision's.
        mean: The mean's, (..., r, c).

    Returns:
        As `StoredPrecision` has them; None for a shape of numbers, or of another mean.
    """
    leading, more = mean[:-2], len(shape) - len(mean)
    if len(mean) < 2 or more < 1 or shape[: len(leading)] != leading:
        return None
    count, *rest = shape[len(leading) :]
    if more == 2 and rest == [mean[-2] ** 2 + mean[-1] ** 2, 1, 1]:
        return Form.KRONECKER, -1
    for axis, ones in ((-1, []), (-2, [1])):
        n = mean[axis]
        if rest == [n, 1, 1, 1, *ones] and count > 0:
            return Form.LOW_RANK, axis
        if len(rest) == 2 + len(ones) and rest == [rest[0], rest[0], *ones]:
            is_whole = count * rest[0] == n
            return (Form.MATRIX, axis) if is_whole else None
    return None


def low_rank_shape(leading: Iterable[int], rank: int, n: int, axis: int) -> Shape:
    """The shape of a precision of low rank for the axis -1 or -2 of a mean, of n entries."""
    return (*leading, 1 + rank, n, *(1 for _ in range(2 - axis)))


def _shapes(mean: Shape) -> tuple[Shape, ...]:
    return (mean, row_shape(mean), one_shape(mean), ())
