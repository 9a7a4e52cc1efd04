"""Merge the weight of a linear layer as a whole matrix, where the method or its precision asks.

One layer is in memory at a time for each thread: the weights of all models and the matrices of
their precisions, in float64. Every layer is merged by itself, so a merge streams and resumes as
others do; its bits depend on the machine's linear algebra as well as on the plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, is_bad_mean, overflowed, read_tensor
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Array, Numbers, Tally
from mergekit_bayes.kernels.plain import names_the_rule
from mergekit_bayes.merge.layer_posteriors import (
    likelihood_of,
    likelihoods_of,
    missing_ridge,
    posteriors,
    with_prior,
    with_ridge,
    without_ridge,
)
from mergekit_bayes.methods.base import RULE
from mergekit_bayes.methods.kronecker import Basis, KroneckerSum, Spectrum
from mergekit_bayes.methods.low_rank import LowRankSum
from mergekit_bayes.methods.matrices import ratios
from mergekit_bayes.plan import MergePlan, Operand, Step
from mergekit_bayes.stream.bad_entries import refuse_bad
from mergekit_bayes.stream.matrices import Place, Precision, in_form, packed, places, stored
from mergekit_bayes.stream.numbers import numbers_of


class Merged(NamedTuple):
    """A merged tensor.

    Attributes:
        mean: Its bytes, in the dtype in which it is written.
        precision: The numbers of its precision in the order in which they are stored; None where
            none is written.
    """

    mean: memoryview
    precision: Array | None


class Layer(NamedTuple):
    """What is read of one tensor, each in float64 and the base's first.

    Attributes:
        means: The weights, (..., outputs, inputs).
        precisions: The precisions by place; None where precisions do not count.
    """

    means: list[Array]
    precisions: list[dict[Place, Precision]] | None


def read_layer(plan: MergePlan, step: Step) -> Layer:
    """Read one tensor of all models, with its matrices.

    Args:
        plan: The merge.
        step: The tensor, with an `axis`.

    Raises:
        CheckpointError: A mean that is not finite.
        PrecisionError: A matrix that is not symmetric, not finite or not positive.
    """
    means = [read_weights(plan, step, operand) for operand in step.operands]
    weighs = plan.method.needs_precision
    return Layer(means, [stored(step, o) for o in step.operands] if weighs else None)


def merge_matrices(
    plan: MergePlan, step: Step, layer: Layer, numbers: Numbers, tally: Tally
) -> Merged:
    """Merge one tensor.

    Args:
        plan: The merge.
        step: The tensor, with an `axis`.
        layer: What was read of it.
        numbers: The constants of the step, in float64.
        tally: Counted into. An entry is guarded if its direction is.

    Raises:
        CheckpointError: A merge that is not finite or does not fit its dtype.
        MismatchError: A removal that the form of the precisions cannot bound.
    """
    means, found = layer
    if found is not None:
        found = [in_form(step, each) for each in found]
    merged = np.empty_like(means[0])
    precision: dict[Place, Precision] = {}
    for place, columns in places(step, means[0].shape):
        rows = place[:-1]
        weights = [mean[rows][:, columns] for mean in means]
        matrices = None if found is None else [each[place] for each in found]
        result = _merge(plan, step, weights, matrices, numbers, tally)
        merged[rows][:, columns] = result.mean
        precision[place] = result.precision
    data = _written(plan, step, means, merged, tally)
    if found is None:
        return Merged(data, None)
    as_written = decode(np.frombuffer(data, np.uint8), step.spec.dtype)
    merged = _turned(step, as_written.reshape(step.spec.shape).astype(np.float64))
    for place, columns in places(step, means[0].shape):
        weights = [mean[place[:-1]][:, columns] for mean in (merged, *means)]
        _add_moves(plan, weights, [each[place] for each in found], numbers, tally)
    return Merged(data, packed(step, precision))


def copied_matrices(plan: MergePlan, step: Step) -> Array:
    """The precision of a tensor that is not merged: the donor's, counted, with its own prior."""
    numbers = numbers_of(plan, step, None, np.float64)
    position = step.operands.index(step.donor)
    counted: dict[Place, Precision] = {}
    for place, matrix in in_form(step, stored(step, step.donor)).items():
        likelihood = likelihood_of(numbers, position, matrix, None)
        counted[place] = with_prior(step, likelihood, numbers.priors[position])
    return packed(step, counted)


def _merge(
    plan: MergePlan,
    step: Step,
    weights: Sequence[Array],
    matrices: Sequence[Precision] | None,
    numbers: Numbers,
    tally: Tally,
) -> Gaussian:
    """Merge one block of a tensor; weights are (outputs, inputs)."""
    method, ridge = plan.method, None
    assert method.matrix is not None
    try:
        if matrices is None:
            models = [Gaussian(weight, None) for weight in weights]
        else:
            likelihoods = likelihoods_of(plan, step, matrices, numbers)
            ridge = missing_ridge(plan, likelihoods, numbers, weights[0].shape)
            models = posteriors(step, weights, likelihoods, ridge, numbers)
            for position, matrix in enumerate(matrices):
                tally.stored[position] += _trace(matrix, len(weights[0]))
        base, tasks = (None, models) if plan.base is None else (models[0], models[1:])
        with names_the_rule(method):
            merged: Gaussian = method.matrix(base, tuple(tasks), numbers.scales, numbers.facts)
            shape = np.shape(merged.mean)
        if shape != weights[0].shape:
            raise TypeError(
                f"method '{method.name}' makes {list(shape)} of weights {list(weights[0].shape)}. "
                f"{RULE}"
            )
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise MismatchError(f"'{step.name}': {error}.") from None
    if matrices is not None and base is not None and method.unguarded_precision is not None:
        _count_guarded(plan, base, tasks, merged, numbers, tally)
    return without_ridge(merged, ridge, numbers)


def _trace(precision: Precision, outputs: int) -> float:
    """The sum of a precision over all entries of a weight."""
    if isinstance(precision, KroneckerSum):
        return sum(float(np.trace(left) * np.trace(right)) for left, right in precision.terms)
    if isinstance(precision, LowRankSum):
        return outputs * float(precision.entries().sum())
    return outputs * float(np.trace(precision))


def _energy(weight: Array, precision: Precision) -> float:
    """`<w, S w>`."""
    if isinstance(precision, KroneckerSum):
        return precision.energy(weight)
    return float(np.vdot(weight @ precision, weight))


def _add_moves(
    plan: MergePlan,
    weights: Sequence[Array],
    precisions: Sequence[Precision],
    numbers: Numbers,
    tally: Tally,
) -> None:
    """Sum how far one block is from each model; `weights` begin with the merged ones.

    `Tally.distances` are of H without the ridge, which no data added.
    """
    merged, *means = weights
    has_base = plan.base is not None
    of_base: Precision | None = None
    if has_base and any(numbers.base_shares):
        of_base = with_ridge(plan.inputs.donor, likelihood_of(numbers, 0, precisions[0], None))
    for i, (mean, precision) in enumerate(zip(means, precisions, strict=True)):
        likelihood = likelihood_of(numbers, i, precision, of_base if i else None)
        moved, change = merged - mean, mean - means[0]
        tally.distances[i, 0] += _energy(moved, likelihood)
        tally.products[i, 1] += np.vdot(mean, moved)
        if has_base and i:
            tally.distances[i, 1] += _energy(change, likelihood)
            tally.products[i, 0] += np.vdot(change, moved)


def _count_guarded(
    plan: MergePlan,
    base: Gaussian,
    tasks: Sequence[Gaussian],
    merged: Gaussian,
    numbers: Numbers,
    tally: Tally,
) -> None:
    assert plan.method.unguarded_precision is not None
    precision = merged.precision
    if isinstance(precision, Spectrum):
        tally.guarded += precision.held_up
    elif isinstance(precision, np.ndarray):
        exact = plan.method.unguarded_precision(base, tuple(tasks), numbers.scales)
        if not np.array_equal(precision, exact):
            held_up = np.linalg.eigvalsh(precision - exact)
            directions = np.count_nonzero(held_up > 1e-9 * np.trace(precision) / len(exact))
            tally.guarded += len(base.mean) * int(directions)
    for task, scale, anchor in zip(tasks, numbers.scales, numbers.anchors[1:], strict=True):
        if scale < 0:
            pulled = task.precision
            if anchor >= 0:
                pulled = pulled - base.precision
                if isinstance(pulled, np.ndarray):
                    pulled = pulled + anchor * np.eye(len(pulled))
            largest = float(-scale * _largest_ratio(pulled, precision))
            tally.multiplier = max(tally.multiplier, largest)


def _largest_ratio(one: Precision, other: Precision) -> float:
    """The largest eigenvalue of one precision where another is the identity.

    Of more than two Kronecker products there is no basis: 0.
    """
    if isinstance(one, np.ndarray):
        return float(ratios(one, other)[-1])
    if isinstance(other, KroneckerSum):
        if len(other.terms) > 2:
            return 0.0
        basis = Basis.of(other.terms[0], other.terms[-1])
        return float((basis.values(one) / basis.values(other)).max())
    return float((other.basis.values(one) / other.values).max())


def _written(
    plan: MergePlan, step: Step, means: Sequence[Array], merged: Array, tally: Tally
) -> memoryview:
    """The bytes of a merged tensor; what changed is counted."""
    dtype, values = step.spec.dtype, _turned(step, merged).reshape(-1)
    with np.errstate(over="ignore"):  # refused below
        data = encode(values, dtype)
    if not np.isfinite(values).all() or overflowed(data, dtype):
        raise CheckpointError(
            f"'{step.name}': the merge by --method {plan.method.name} is not finite, or does not "
            f"fit {dtype}. A wider --dtype holds more, and precisions must be on one scale."
        )
    tally.entries += values.size
    if plan.base is not None:
        moved = np.zeros(merged.shape, bool)
        for task, mean in zip(step.tasks, means[1:], strict=True):
            moved |= (mean != means[0]) & (task.scale != 0)
        moved_as_stored = _turned(step, moved).reshape(-1)
        before = encode(_turned(step, means[0]).reshape(-1), dtype)
        written, kept = (decode(np.frombuffer(d, np.uint8), dtype) for d in (data, before))
        tally.changed += int(np.count_nonzero(moved))
        tally.lost += int(np.count_nonzero(moved_as_stored & (written == kept)))
    return data


def read_weights(plan: MergePlan, step: Step, operand: Operand) -> Array:
    """A model's weights as (..., outputs, inputs) in float64.

    Raises:
        CheckpointError: One that is not finite.
    """
    values = read_tensor(operand.mean.source, operand.mean.name)
    if is_bad_mean(values).any():
        refuse_bad(plan, step, operand)
    return _turned(step, values.astype(np.float64))


def _turned(step: Step, values: Array) -> Array:
    """From the stored order of axes to (..., outputs, inputs), or back."""
    return values if step.axis == -1 else values.swapaxes(-1, -2)
