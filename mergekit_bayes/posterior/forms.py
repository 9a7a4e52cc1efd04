"""The forms of a stored precision: one number an entry, a row, a tensor, or everywhere."""

import numpy as np

from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.kernels.base import Array


def is_form_of(precision: TensorSpec | None, mean: TensorSpec) -> bool:
    """Whether a precision has one number for each entry, row, or for all of a tensor."""
    shapes = (mean.shape, row_shape(mean.shape), one_shape(mean.shape), ())
    return precision is not None and precision.dtype in MERGEABLE and precision.shape in shapes


def spread(values: Array, row: int, start: int, stop: int) -> Array:
    """One number, or one a row, by entry."""
    if values.size == 1:
        return values
    first, last = start // row, (stop - 1) // row + 1
    return np.repeat(values[first:last], row)[start - first * row : stop - first * row]


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a precision with one number a row: a slice of the first axis."""
    return (*shape[:1], *(1 for _ in shape[1:]))


def one_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a precision that is one number for the tensor."""
    return tuple(1 for _ in shape)
