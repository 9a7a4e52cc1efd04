"""mergekit's Model Breadcrumbs: changes neither large nor small, by weights."""

from mergekit_bayes.methods.adding import add, adding_parameters
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sparsifying import DENSITY, WITHOUT_OUTLIERS, without_outliers
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_breadcrumbs(tensors: Tensors) -> Array:
    """Drop the largest and the smallest entries of each task vector, and add them up.

        d_t  = m_t - m0 in the int(density_t n) entries after the int(gamma_t n) largest, else 0
        mean = m0 + lambda sum_t w_t d_t / (sum_t w_t if `normalize`)

    At most n - int(density n) of the n entries of a tensor are dropped as the largest ones, so that
    the density holds. A small tensor may be left as it is: int(density n) may be zero. mergekit
    documents gamma as the beta of the paper (Davari and Belilovsky, ECCV 2024), which has one scale
    for all tasks, and neither `normalize` nor `rescale`; by default they change nothing.

    Args:
        tensors: Pieces of the base and the tasks, measured by `WITHOUT_OUTLIERS`, with
            weights and settings.
    """
    return add(tensors, (without_outliers(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_BREADCRUMBS = Method(
    "breadcrumbs",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Changes neither large nor small, by weights "
    "(Model Breadcrumbs, Davari and Belilovsky, ECCV 2024, as in mergekit).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: breadcrumbs",
    parameters=(
        *adding_parameters(normalize=False, rescale=False),
        DENSITY,
        Parameter(
            "gamma",
            0.01,
            "share of each tensor whose changes are the largest, and are dropped",
            0,
            1,
        ),
    ),
    tensor=TensorRule(weighed_breadcrumbs, "entries", measures=WITHOUT_OUTLIERS),
)
