"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024, arXiv 2312.06795)."""

from mergekit_bayes.methods.adding import add_scaled
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import (
    BREADCRUMBS_PARAMETERS,
    WITHOUT_OUTLIERS,
    without_outliers,
)
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def breadcrumbs(tensors: Tensors) -> Array:
    """Drop the largest and the smallest entries of each task vector, and add them up.

        d_t  = m_t - m0 in the int(density n) entries after the int(gamma n) largest, else 0
        mean = m0 + sum_t scale_t d_t

    n is the number of entries of a tensor. Of the paper, its abstract was at hand, which drops
    outliers and negligible changes; the shares are as mergekit documents them, where gamma is the
    paper's beta. Equal scales are the paper's growth factor. Under mergekit's YAML it is the same,
    with its other settings left as they are (`weighed_breadcrumbs`).

    Args:
        tensors: Pieces of the base and the tasks, measured by `WITHOUT_OUTLIERS`, with
            scales and settings.
    """
    return add_scaled(tensors, (without_outliers(tensors, t) for t in range(len(tensors.tasks))))


BREADCRUMBS = Method(
    "breadcrumbs",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Changes neither large nor small, added up "
    "(Model Breadcrumbs, Davari and Belilovsky, ECCV 2024).",
    example="bmerge merge A B --base BASE --method breadcrumbs --param density=0.1",
    parameters=BREADCRUMBS_PARAMETERS,
    tensor=TensorRule(breadcrumbs, "entries", measures=WITHOUT_OUTLIERS),
)
