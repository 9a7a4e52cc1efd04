"""The stored matrices of a tensor, block by block, and back into the order of the file.

A *place* is one matrix of a tensor: its leading axes (the expert), and the number of the block.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.kernels.base import Array
from mergekit_bayes.methods.kronecker import KroneckerSum, Spectrum, without_rounding
from mergekit_bayes.methods.low_rank import LowRankSum, Term
from mergekit_bayes.methods.matrices import is_positive
from mergekit_bayes.plan import Operand, Step
from mergekit_bayes.posterior.forms import Form, StoredPrecision

SYMMETRIC = 1e-4  # relative difference of two halves up to which it is rounding

Precision: TypeAlias = Any  # a matrix, KroneckerSum or LowRankSum: all take the same operators
Place: TypeAlias = tuple[int, ...]


def places(step: Step, shape: tuple[int, ...]) -> Iterator[tuple[Place, slice]]:
    """For every block: its place, and its columns of a weight of shape (outputs, inputs)."""
    blocks = 1
    if step.form is Form.MATRIX and step.precision_shape is not None:
        blocks = step.precision_shape[len(shape) - 2]
    width = shape[-1] // blocks
    for leading in np.ndindex(shape[:-2]):
        for block in range(blocks):
            yield (*leading, block), slice(block * width, (block + 1) * width)


def stored(step: Step, operand: Operand) -> dict[Place, Precision]:
    """A model's precision of a tensor by place, in float64 and in the form that it has.

    Raises:
        PrecisionError: A matrix that is not symmetric, not finite or not positive.
    """
    if step.form is Form.KRONECKER:
        return _products(step, operand)
    precision = operand.precision
    assert precision is not None
    if precision.source is None or precision.form is Form.TENSOR:
        number, (places_of, n) = _number(precision), _inputs(step)
        return dict.fromkeys(np.ndindex(places_of), LowRankSum(np.full(n, number)))
    numbers: Array = read_tensor(precision.source, precision.name).astype(np.float64)
    if precision.form is Form.LOW_RANK:
        return _low_rank(step, operand, numbers)
    places_of, n = _inputs(step)
    return _by_place(step, operand, numbers.reshape(*places_of, n, n))


def in_form(step: Step, precision: Mapping[Place, Precision]) -> dict[Place, Precision]:
    """A model's precision in the form in which a tensor's precisions are merged."""
    if step.form is not Form.MATRIX:
        return dict(precision)
    return {
        place: each.dense() if isinstance(each, LowRankSum) else each
        for place, each in precision.items()
    }


def packed(step: Step, precision: Mapping[Place, Precision]) -> Array:
    """The numbers of a merged precision in the order in which they are stored."""
    if step.form is Form.MATRIX:
        return np.concatenate([matrix.reshape(-1) for matrix in precision.values()])
    if step.form is Form.LOW_RANK:
        _, factor = step.precision_parts.values()
        sums = precision.values()
        diagonals = [each.diagonal.clip(min=0.0) for each in sums]  # rounding may leave less
        factors = [each.factor(factor.shape[-2]).reshape(-1) for each in sums]
        return np.concatenate([*diagonals, *factors])
    left, right = (np.zeros(spec.shape) for spec in step.precision_parts.values())
    for (*place, _), found in precision.items():
        # After the guard, which is no sum of products: what it bounds is found again from these.
        exact = found.exact if isinstance(found, Spectrum) else found
        for k, term in enumerate(exact.terms):
            left[(*place, k)], right[(*place, k)] = term
    return np.concatenate([left.reshape(-1), right.reshape(-1)])


def _inputs(step: Step) -> tuple[tuple[int, ...], int]:
    """The shape of the places of a step, and the entries of a block, where it has no products."""
    *_, spec = step.precision_parts.values()
    if step.form is Form.LOW_RANK:
        return (*spec.shape[:-2], 1), spec.shape[-1]
    return spec.shape[:-2], spec.shape[-1]


def _low_rank(step: Step, operand: Operand, numbers: Array) -> dict[Place, Precision]:
    """A model's diagonals and factors by place."""
    numbers, leading, n = numbers.reshape(-1), step.spec.shape[:-2], _inputs(step)[1]
    cut = int(np.prod(leading)) * n
    diagonals, factors = numbers[:cut].reshape(*leading, n), numbers[cut:].reshape(*leading, -1, n)
    if not np.isfinite(numbers).all() or (diagonals < 0).any():
        raise _no_precision(step, operand)
    return {
        (*place, 0): LowRankSum(diagonals[place], (Term(factors[place], 1.0),))
        for place in np.ndindex(leading)
    }


def _products(step: Step, operand: Operand) -> dict[Place, Precision]:
    """A model's sums of Kronecker products by place."""
    precision, (rows, columns) = operand.precision, step.spec.shape[-2:]
    assert precision is not None
    assert precision.source is not None  # the plan made sure of it
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
    found = {place: matrices[place] for place in np.ndindex(matrices.shape[:-2])}
    if not all(
        is_positive(each, float(np.linalg.norm(each))) for each in found.values() if each.any()
    ):
        raise _no_precision(step, operand)
    return found


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
        f"'{step.name}' of '{operand.input.ref}' is not a finite symmetric matrix without "
        "negative eigenvalues. Estimate it again."
    )


def _number(stored: StoredPrecision) -> float:
    numbers = stored.coarse(1)
    assert numbers is not None
    return float(numbers[0])
