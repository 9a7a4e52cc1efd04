"""mergekit's task arithmetic: weights, `normalize` and `lambda`."""

from mergekit_bayes.methods.adding import add, adding_parameters
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import DENSITY, change_of
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_arithmetic(tensors: Tensors) -> Array:
    """Add the weighed task vectors to the base.

        mean = m0 + lambda sum_t w_t (m_t - m0) / (sum_t w_t if `normalize`)

    The paper (Ilharco et al., ICLR 2023) has one lambda, and no `normalize`; neither changes
    anything by default. `density` and `rescale` may stand in a recipe, and change nothing, as in
    mergekit.

    Args:
        tensors: Pieces of the base and the tasks, with weights and settings.
    """
    return add(tensors, (change_of(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_ARITHMETIC = Method(
    "task_arithmetic",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="The base plus what each task changed, by weights (Ilharco et al., ICLR 2023).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: task_arithmetic",
    formula="m = m0 + lambda sum_t w_t (m_t - m0)",
    parameters=(*adding_parameters(normalize=False, rescale=False), DENSITY),
    tensor=TensorRule(weighed_arithmetic, "entries"),
)
