"""Products of whole tensors of each two models, measured piece by piece."""

from collections.abc import Callable

import numpy as np

from mergekit_bayes.kernels.base import Array
from mergekit_bayes.methods.measuring import WINDOW, OrderedMap
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.bad_entries import replace_bad_means
from mergekit_bayes.stream.chunks import Reader
from mergekit_bayes.stream.pieces import widened


def products(
    plan: MergePlan, step: Step, reader: Callable[[], Reader], ordered_map: OrderedMap
) -> Array:
    """The sum over all entries of a tensor of the product of each two models.

    Windows are of a fixed size and are added in order, by numpy's own loops and not by a library
    of linear algebra, so that neither chunks nor threads change a bit.

    Args:
        plan: The merge.
        step: The tensor.
        reader: Gives the calling thread's reader.
        ordered_map: Runs the windows.

    Returns:
        (models, models) in float64, in the order of the step's operands.
    """
    models = len(step.operands)

    def measure(start: int) -> Array:
        means = reader().means(step, start, min(start + WINDOW, step.merged))
        if plan.config.on_bad == "base":
            replace_bad_means(means)
        wide = widened(means).astype(np.float64)
        found = np.zeros((models, models))
        for i in range(models):
            for j in range(i, models):
                found[i, j] = found[j, i] = np.einsum("k,k->", wide[i], wide[j])
        return found

    total = np.zeros((models, models))
    for part in ordered_map(measure, range(0, step.merged, WINDOW)):
        total += part
    return total
