"""Merge the weight of a linear layer as a whole matrix, where the method or its precision asks.

One layer is in memory at a time for each thread: the weights of all models and the matrices of
their precisions, in float64. Every layer is merged by itself, so a merge streams and resumes as
others do; its bits depend on the machine's linear algebra as well as on the plan.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, is_bad_mean, overflowed, read_tensor
from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Array, Numbers, Tally, likelihood_precision
from mergekit_bayes.methods.matrices import divided, ratios
from mergekit_bayes.plan import Input, MergePlan, Operand, Step
from mergekit_bayes.posterior.forms import Form, StoredPrecision
from mergekit_bayes.stream.bad_entries import refuse_bad
from mergekit_bayes.stream.numbers import numbers_of

# Added to the base's curvature (without a base: to every one), as a share of its mean diagonal:
# directions that no input has been seen in fall back to task arithmetic, or the average.
RIDGE = 1e-6
_SYMMETRIC = 1e-4  # least relative difference of two halves that is no rounding


class Merged(NamedTuple):
    """A merged tensor.

    Attributes:
        mean: Its bytes, in the dtype in which it is written.
        precision: (..., k, n, n) in float64, on the tensor's own axes; None where none is written.
    """

    mean: memoryview
    precision: Array | None


class Layer(NamedTuple):
    """What is read of one tensor, each in float64 and the base's first.

    Attributes:
        means: The weights, (..., outputs, inputs).
        precisions: The matrices, (..., k, n, n); None where precisions do not count.
    """

    means: list[Array]
    precisions: list[Array] | None


def read_layer(plan: MergePlan, step: Step) -> Layer:
    """Read one tensor of all models, with its matrices.

    Args:
        plan: The merge.
        step: The tensor, with an `axis`.

    Raises:
        CheckpointError: A mean that is not finite.
        PrecisionError: A matrix that is not symmetric, not finite or not positive.
    """
    means = [_mean(plan, step, operand) for operand in step.operands]
    weighs = plan.method.needs_precision
    return Layer(means, [_matrices(step, o) for o in step.operands] if weighs else None)


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
    """
    means, stored = layer
    blocks = 1 if stored is None else stored[0].shape[-3]
    merged = np.empty_like(means[0])
    precision = None if stored is None else np.empty_like(stored[0])
    for place, (rows, columns) in _places(means[0].shape, blocks):
        weights = [mean[rows][:, columns] for mean in means]
        matrices = None if stored is None else [s[place] for s in stored]
        result = _merge(plan, step, weights, matrices, numbers, tally)
        merged[rows][:, columns] = result.mean
        if precision is not None:
            precision[place] = result.precision
    written = _written(plan, step, means, merged, precision, tally)
    if stored is not None:
        as_written = decode(np.frombuffer(written.mean, np.uint8), step.spec.dtype)
        merged = _turned(step, as_written.reshape(step.spec.shape).astype(np.float64))
        for place, (rows, columns) in _places(means[0].shape, blocks):
            weights = [mean[rows][:, columns] for mean in (merged, *means)]
            _add_moves(plan, weights, [s[place] for s in stored], numbers, tally)
    return written


def copied_matrices(plan: MergePlan, step: Step) -> Array:
    """The matrices of a tensor that is not merged: the donor's, counted, with its own prior."""
    stored = _matrices(step, step.donor)
    numbers = numbers_of(plan, step, None, np.float64)
    position = step.operands.index(step.donor)
    for place in np.ndindex(stored.shape[:-2]):
        likelihood = _likelihood(numbers, position, stored[place], 0)
        stored[place] = likelihood + float(numbers.priors[position]) * np.eye(len(likelihood))
    return stored


def _merge(
    plan: MergePlan,
    step: Step,
    weights: Sequence[Array],
    matrices: Sequence[Array] | None,
    numbers: Numbers,
    tally: Tally,
) -> Gaussian:
    """Merge one block of a tensor; weights are (outputs, inputs)."""
    method, has_base = plan.method, plan.base is not None
    assert method.matrix is not None
    if matrices is None:
        models = [Gaussian(weight, None) for weight in weights]
    else:
        models = _posteriors(plan, weights, matrices, numbers)
        for position, matrix in enumerate(matrices):
            tally.stored[position] += len(weights[0]) * float(np.trace(matrix))
    base, tasks = (models[0], models[1:]) if has_base else (None, models)
    merged: Gaussian = method.matrix(base, tuple(tasks), numbers.scales, numbers.facts)
    if matrices is not None and base is not None and method.unguarded_precision is not None:
        _count_guarded(plan, step, base, tasks, merged, numbers, tally)
    return merged


def _posteriors(
    plan: MergePlan, weights: Sequence[Array], matrices: Sequence[Array], numbers: Numbers
) -> list[Gaussian]:
    """All models, each with its likelihood precision on the prior that the method expects."""
    has_base = plan.base is not None
    one = np.eye(len(matrices[0]))
    models: list[Gaussian] = []
    of_base: Array | float = 0.0
    for position, (model, weight, matrix) in enumerate(
        zip(plan.inputs, weights, matrices, strict=True)
    ):
        likelihood = _likelihood(numbers, position, matrix, of_base)
        if not has_base or position == 0:
            likelihood = _with_ridge(model, likelihood)
            of_base = likelihood if has_base else 0.0
            models.append(Gaussian(weight, likelihood + numbers.priors[position] * one))
            continue
        base, anchor, decay = models[0], numbers.anchors[position], numbers.decays[position]
        precision = base.precision + likelihood
        if anchor < 0:
            models.append(Gaussian(weight, precision))
        else:
            moved = (weight - base.mean) @ (likelihood + anchor * one) + decay * weight
            models.append(Gaussian(base.mean + divided(moved, precision), precision))
    return models


def _with_ridge(model: Input, likelihood: Array) -> Array:
    """H of the base, or of a model of an average, with a little more in every direction."""
    if not model.weighing.reshape:  # a merge has it inside
        return likelihood
    one: Array = np.eye(len(likelihood))
    return likelihood + float(RIDGE * np.trace(likelihood)) / len(likelihood) * one


def _likelihood(numbers: Numbers, position: int, stored: Array, of_base: Array | float) -> Array:
    """H of a model, `gain (S - contained I - share H_0)`; see `Numbers`."""
    inside = numbers.contained[position] * np.eye(len(stored))
    unfloored = numbers._replace(
        contained=(inside,) * len(numbers.contained), floors=(-np.inf,) * len(numbers.floors)
    )
    likelihood: Array = likelihood_precision(unfloored, position, stored, of_base, 0.0)
    return likelihood


def _add_moves(
    plan: MergePlan,
    weights: Sequence[Array],
    matrices: Sequence[Array],
    numbers: Numbers,
    tally: Tally,
) -> None:
    """Sum how far one block is from each model; `weights` begin with the merged ones.

    `Tally.distances` are of H without the ridge, which no data added.
    """
    merged, *means = weights
    has_base = plan.base is not None
    of_base: Array | float = 0.0
    if has_base and any(numbers.base_shares):
        of_base = _with_ridge(plan.inputs.donor, _likelihood(numbers, 0, matrices[0], 0.0))
    for i, (mean, matrix) in enumerate(zip(means, matrices, strict=True)):
        likelihood = _likelihood(numbers, i, matrix, of_base if i else 0.0)
        moved, change = merged - mean, mean - means[0]
        tally.distances[i, 0] += _squared(moved, likelihood)
        tally.products[i, 1] += np.vdot(mean, moved)
        if has_base and i:
            tally.distances[i, 1] += _squared(change, likelihood)
            tally.products[i, 0] += np.vdot(change, moved)


def _squared(rows: Array, precision: Array) -> float:
    """`sum of row precision row'`, in float32, which halves its cost."""
    single = rows.astype(np.float32)
    return float(np.vdot(single @ precision.astype(np.float32), single))


def _count_guarded(
    plan: MergePlan,
    step: Step,
    base: Gaussian,
    tasks: Sequence[Gaussian],
    merged: Gaussian,
    numbers: Numbers,
    tally: Tally,
) -> None:
    assert plan.method.unguarded_precision is not None
    exact = plan.method.unguarded_precision(base, tuple(tasks), numbers.scales)
    if merged.precision is not exact and not np.array_equal(merged.precision, exact):
        held_up = np.linalg.eigvalsh(merged.precision - exact)
        directions = np.count_nonzero(held_up > 1e-9 * np.trace(merged.precision) / len(exact))
        tally.guarded += len(base.mean) * int(directions)
    for task, scale, anchor in zip(tasks, numbers.scales, numbers.anchors[1:], strict=True):
        if scale < 0:
            pulled = task.precision
            if anchor >= 0:
                pulled = pulled - base.precision + anchor * np.eye(len(pulled))
            largest = float(-scale * ratios(pulled, merged.precision)[-1])
            tally.multiplier = max(tally.multiplier, largest)


def _written(
    plan: MergePlan,
    step: Step,
    means: Sequence[Array],
    merged: Array,
    precision: Array | None,
    tally: Tally,
) -> Merged:
    """Bring a merged tensor into the form in which it is written, and count what changed."""
    dtype, values = step.spec.dtype, _turned(step, merged).reshape(-1)
    with np.errstate(over="ignore"):  # refused below
        data = encode(values, dtype)
    if not np.isfinite(values).all() or overflowed(data, dtype):
        raise CheckpointError(
            f"'{step.name}': the merge is not finite, or does not fit {dtype}. Are its precisions "
            "on the same scale? A wider --dtype holds larger numbers."
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
    return Merged(data, precision)


def _mean(plan: MergePlan, step: Step, operand: Operand) -> Array:
    """A model's weights as (..., outputs, inputs) in float64."""
    values = read_tensor(operand.mean.source, operand.mean.name)
    if is_bad_mean(values).any():
        refuse_bad(plan, step, operand)
    return _turned(step, values.astype(np.float64))


def _turned(step: Step, values: Array) -> Array:
    """From the stored order of axes to (..., outputs, inputs), or back."""
    return values if step.axis == -1 else values.swapaxes(-1, -2)


def _matrices(step: Step, operand: Operand) -> Array:
    """A model's stored precision as (..., k, n, n) in float64, checked."""
    stored = operand.precision
    assert stored is not None
    assert step.stored_precision is not None
    shape = step.stored_precision[1].shape
    if stored.source is None or stored.form is Form.TENSOR:
        number = stored.number if stored.source is None else _number(stored)
        return np.broadcast_to(number * np.eye(shape[-1]), shape).copy()
    matrices: Array = read_tensor(stored.source, stored.name).astype(np.float64).reshape(shape)
    flipped = matrices.swapaxes(-1, -2)
    least, largest = np.inf, 0.0
    if matrices.size and np.isfinite(matrices).all():
        least, largest = float(np.einsum("...ii->...i", matrices).min()), abs(matrices).max()
        if least >= 0 and abs(matrices - flipped).max() <= _SYMMETRIC * largest:
            return (matrices + flipped) / 2
    raise PrecisionError(
        f"{stored.source.where(stored.name)}: the precision of '{step.name}' of "
        f"'{operand.input.ref}' is not a finite symmetric matrix with a diagonal >= 0. Estimate it "
        "again."
    )


def _number(stored: StoredPrecision) -> float:
    numbers = stored.coarse(1)
    assert numbers is not None
    return float(numbers[0])


def _places(
    shape: tuple[int, ...], blocks: int
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, ...], slice]]]:
    """For every block: its index among the matrices, and its entries of the weights."""
    width = shape[-1] // blocks
    for leading in np.ndindex(shape[:-2]):
        for block in range(blocks):
            yield (*leading, block), (leading, slice(block * width, (block + 1) * width))
