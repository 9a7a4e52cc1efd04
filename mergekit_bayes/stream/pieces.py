"""Pieces of a tensor as a rule for whole tensors reads them, and what it measures in them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from mergekit_bayes.checkpoint.codec import decode
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.kernels.base import Array, keyed_draws, task_key
from mergekit_bayes.kernels.plain import names_the_rule
from mergekit_bayes.methods.measuring import OrderedMap, Whole, measure
from mergekit_bayes.methods.tensors import Measured, Settings, TensorRule, Tensors, number_of
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.bad_entries import replace_bad_means
from mergekit_bayes.stream.chunks import Reader
from mergekit_bayes.stream.numbers import real_of
from mergekit_bayes.stream.units import entries_together

T = TypeVar("T")
R = TypeVar("R")


def measures(
    plan: MergePlan, step: Step, reader: Callable[[], Reader], ordered_map: OrderedMap
) -> Measured:
    """What the method's rule must know of a whole tensor.

    Args:
        plan: The merge.
        step: The tensor, with `settings`.
        reader: Gives the calling thread's reader.
        ordered_map: Runs the windows.

    Returns:
        The results by name, as `Tensors.measured` has them.

    Raises:
        MismatchError: What the rule cannot merge.
    """
    rule, settings = _rule_of(plan, step)
    size, row = step.merged, entries_together(plan, step)
    whole = Whole(size, row, np.dtype(real_of(step)), len(step.tasks), settings)

    def piece(start: int, stop: int, measured: Measured) -> Tensors:
        means = widened(reader().means(step, start, stop))
        if plan.config.on_bad == "base":
            replace_bad_means(means)
        return tensors_of(plan, step, means, start)._replace(measured=measured)

    def quiet_map(act: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        def quietly(item: T) -> R:
            with np.errstate(all="ignore"):  # each thread has its own state
                return act(item)

        return ordered_map(quietly, items)

    with errors_of_the_rule(plan, step):
        return measure(rule, whole, piece, quiet_map)


def tensors_of(plan: MergePlan, step: Step, means: Array, start: int) -> Tensors:
    """A piece of a tensor as its rule reads it, without what was measured.

    Args:
        plan: The merge.
        step: The tensor, with `settings`.
        means: (models, n), the base first.
        start: Flat index of the first entry.
    """
    rule, settings = _rule_of(plan, step)
    n = means.shape[1]
    shape = rule.piece_shape(settings, step.spec.shape if len(step.spec.shape) > 1 else (n,))
    if not step.spec.shape and rule.needs(settings) == "tensor":
        shape = ()
    arrays = [mean.reshape(shape) for mean in means]
    base, tasks = (None, arrays) if step.base is None else (arrays[0], arrays[1:])
    shape = arrays[0].shape

    def draws(task: int) -> Array:
        identity = plan.drawing_identities[step.tasks[task].input]
        key = task_key(int(number_of(settings, "seed")), step.source, identity)
        return keyed_draws(key, start, n).reshape(shape)

    return Tensors(
        base,
        tuple(tasks),
        tuple(task.scale for task in step.tasks),
        settings,
        draws=draws if plan.method.random else None,
        start=start,
        size=step.merged,
    )


def widened(means: Array) -> Array:
    """Stored means, (models, n), as numbers: those of bfloat16 bits in float32."""
    if means.dtype != np.uint16:
        return means
    return decode(means.reshape(-1), "BF16").reshape(means.shape)


@contextmanager
def errors_of_the_rule(plan: MergePlan, step: Step) -> Iterator[None]:
    """Raise what a rule cannot merge as an error that names the tensor."""
    try:
        with np.errstate(all="ignore"), names_the_rule(plan.method):
            yield
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise MismatchError(f"'{step.name}': {error}.") from None


def _rule_of(plan: MergePlan, step: Step) -> tuple[TensorRule, Settings]:
    assert plan.method.tensor is not None
    assert step.settings is not None
    return plan.method.tensor, step.settings
