"""The stored matrices of a tensor, block by block, and back into the order of the file.

A *place* is one matrix of a tensor: its leading axes (the expert), and the number of the block.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.kernels.base import Array
from mergekit_bayes.methods.kronecker import KroneckerSum, Spectrum, without_rounding
from mergekit_bayes.plan import Operand, Step
from mergekit_bayes.posterior.forms import Form, StoredPrecision

SYMMETRIC = 1e-4  # relative difference of two halves up to which it is rounding

Precision: TypeAlias = Any  # a matrix or a KroneckerSum: both take the same operators
Place: TypeAlias = tuple[int, ...]


def places(step: Step, shape: tuple[int, ...]) -> Iterator[tuple[Place, slice]]:
    """For every block: its place, and its columns of a weight of shape (outputs, inputs)."""
    blocks = step.precision_shape[len(shape) - 2] if step.precision_shape else 1
    blocks = 1 if step.is_kronecker else blocks
    width = shape[-1] // blocks
    for leading in np.ndindex(shape[:-2]):
        for block in range(blocks):
            yield (*leading, block), slice(block * width, (block + 1) * width)


def stored(step: Step, operand: Operand) -> dict[Place, Precision]:
    """A model's precision of a tensor by place, in float64.

    Raises:
        MismatchError: It is one number, where the others are sums of Kronecker products.
        PrecisionError: A matrix that is not symmetric, not finite or not positive.
    """
    if step.is_kronecker:
        return _products(step, operand)
    precision = operand.precision
    assert precision is not None
    (spec,) = step.precision_parts.values()
    if precision.source is None or precision.form is Form.TENSOR:
        one = _number(precision) * np.eye(spec.shape[-1])
        return dict.fromkeys(np.ndindex(spec.shape[:-2]), one)
    numbers: Array = read_tensor(precision.source, precision.name).astype(np.float64)
    return _by_place(step, operand, numbers.reshape(spec.shape))


def packed(step: Step, precision: Mapping[Place, Precision]) -> Array:
    """The numbers of a merged precision in the order in which they are stored."""
    if not step.is_kronecker:
        return np.concatenate([matrix.reshape(-1) for matrix in precision.values()])
    left, right = (np.zeros(spec.shape) for spec in step.precision_parts.values())
    for (*place, _), found in precision.items():
        # After the guard, which is no sum of products: what it bounds is found again from these.
        exact = found.exact if isinstance(found, Spectrum) else found
        for k, term in enumerate(exact.terms):
            left[(*place, k)], right[(*place, k)] = term
    return np.concatenate([left.reshape(-1), right.reshape(-1)])


def _products(step: Step, operand: Operand) -> dict[Place, Precision]:
    """A model's sums of Kronecker products by place."""
    precision, (rows, columns) = operand.precision, step.spec.shape[-2:]
    assert precision is not None
    if precision.source is None:
        raise MismatchError(
            f"'{step.name}': one number on every entry ('{operand.input.ref}') is no Kronecker "
            "product. Estimate a precision."
        )
    leading = precision.source.specs[precision.name].shape[:-3]
    numbers = read_tensor(precision.source, precision.name).reshape(-1).astype(np.float64)
    cut = int(np.prod(leading)) * rows * rows
    lefts = _symmetric(step, operand, numbers[:cut].reshape(*leading, rows, rows))
    rights = _by_place(step, operand, numbers[cut:].reshape(*leading, columns, columns))
    found: dict[Place, Precision] = {}
    for place in np.ndindex(leading[:-1]):
        terms = [
            (without_rounding(lefts[(*place, k)]), without_rounding(rights[(*place, k)]))
            for k in range(leading[-1])
        ]
        found[(*place, 0)] = KroneckerSum.of(terms)
    return found


def _by_place(step: Step, operand: Operand, matrices: Array) -> dict[Place, Precision]:
    """Matrices by place; they must be precisions, or zero."""
    matrices = _symmetric(step, operand, matrices)
    if matrices.size and float(np.einsum("...ii->...i", matrices).min()) < 0:
        raise _no_precision(step, operand)
    return {place: matrices[place] for place in np.ndindex(matrices.shape[:-2])}


def _symmetric(step: Step, operand: Operand, matrices: Array) -> Array:
    flipped = matrices.swapaxes(-1, -2)
    if not np.isfinite(matrices).all():
        raise _no_precision(step, operand)
    if matrices.size and abs(matrices - flipped).max() > SYMMETRIC * abs(matrices).max():
        raise _no_precision(step, operand)
    return (matrices + flipped) / 2


def _no_precision(step: Step, operand: Operand) -> PrecisionError:
    assert operand.precision is not None
    assert operand.precision.source is not None
    return PrecisionError(
        f"{operand.precision.source.where(operand.precision.name)}: the precision of "
        f"'{step.name}' of '{operand.input.ref}' is not a finite symmetric matrix with a diagonal "
        ">= 0. Estimate it again."
    )


def _number(stored: StoredPrecision) -> float:
    numbers = stored.coarse(1)
    assert numbers is not None
    return float(numbers[0])
