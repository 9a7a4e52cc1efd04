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

The last three are precisions of directions: the blocks on the diagonal of a matrix for one axis of
the tensor, which holds for every index of the other one, or matrices for both (`factors`). Merged
are then whole matrices (`methods/base.py`); nothing here reads them by entry.

This module is the only one that knows these shapes. The plan asks which form a precision has and
which form the merged one needs; the stream asks for its numbers (`StoredPrecision.coarse`) and
spreads them over a chunk (`spread`).

A precision that is not stored by entry but determines every entry, such as that of a product of
LoRA factors, enters as a `PrecisionSource` whose specs have the mean's shape and whose entries are
computed as they are read: its form is ENTRY.
"""

from collections.abc import Collection
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
    """How finely a precision resolves its tensor; a finer form is larger."""

    TENSOR = 1
    ROW = 2
    ENTRY = 3
    MATRIX = 4
    KRONECKER = 5

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


@dataclass(frozen=True)
class StoredPrecision:
    """The precision of one tensor of a model, in whatever form it is stored.

    Attributes:
        form: How finely it resolves the tensor.
        source: Where it is read from; None for one number everywhere.
        name: Its name in `source`.
        number: The one number, 1/weight^2, where there is no source.
        axis: Of a matrix: the axis of the tensor that it is for, -1 or -2; of a sum of Kronecker
            products -1.
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
        if len(spec.shape) > len(mean):
            if is_kronecker(spec.shape, mean):
                return cls(Form.KRONECKER, source, name, axis=-1)
            axis = -1 if len(spec.shape) == len(mean) + 1 else -2
            return cls(Form.MATRIX, source, name, axis=axis)
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
            precision.shape in _shapes(mean.shape)
            or _is_matrix_of(precision.shape, mean.shape)
            or is_kronecker(precision.shape, mean.shape)
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


def _is_matrix_of(shape: Shape, mean: Shape) -> bool:
    """Whether this is the shape of matrices for one of the last two axes of a mean."""
    more = len(shape) - len(mean)
    if len(mean) < 2 or more not in (1, 2) or (more == 2 and shape[-1] != 1):
        return False
    axis, blocks = -more, shape[len(mean) - 2 : len(mean) + 1]
    fits = blocks[0] * blocks[1] == mean[axis] and blocks[1] == blocks[2]
    return fits and shape[: len(mean) - 2] == mean[:-2]


def is_kronecker(shape: Shape, mean: Shape) -> bool:
    """Whether this is the shape of terms of a sum of Kronecker products for a mean."""
    if len(mean) < 2 or len(shape) != len(mean) + 2 or shape[-2:] != (1, 1):
        return False
    numbers = mean[-2] ** 2 + mean[-1] ** 2
    return shape[-3] == numbers and shape[: len(mean) - 2] == mean[:-2]


def _shapes(mean: Shape) -> tuple[Shape, ...]:
    return (mean, row_shape(mean), one_shape(mean), ())
