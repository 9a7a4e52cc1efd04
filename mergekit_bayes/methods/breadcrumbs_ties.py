"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024) with TIES' election of signs."""

from mergekit_bayes.methods.adding import add_majority
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import (
    BREADCRUMBS_PARAMETERS,
    WITHOUT_OUTLIERS,
    without_outliers,
)
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def breadcrumbs_ties(tensors: Tensors) -> Array:
    """Drop the largest and the smallest entries of each task vector, and elect signs.

        d_t  = m_t - m0 in the int(density n) entries after the int(gamma n) largest, else 0
        mean = m0 + sum_t [d_t agrees with sum_u d_u] scale_t d_t / #(those that agree)

    n is the number of entries of a tensor. Of the paper, its abstract was at hand, which drops
    outliers and negligible changes; the shares are as mergekit documents them, where gamma is the
    paper's beta. The paper elects no signs; this is its mask in the place of TIES' trim. A task of
    scale zero has no vote. Under mergekit's YAML signs are elected by weighed task vectors
    (`weighed_breadcrumbs_ties`).

    Args:
        tensors: Pieces of the base and the tasks, measured by `WITHOUT_OUTLIERS`, with
            scales and settings.
    """
    return add_majority(tensors, (without_outliers(tensors, t) for t in range(len(tensors.tasks))))


BREADCRUMBS_TIES = Method(
    "breadcrumbs_ties",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Changes neither large nor small, where tasks agree in sign "
    "(Model Breadcrumbs, Davari and Belilovsky, ECCV 2024).",
    example="bmerge merge A B --base BASE --method breadcrumbs_ties --param density=0.1",
    parameters=BREADCRUMBS_PARAMETERS,
    tensor=TensorRule(breadcrumbs_ties, "entries", measures=WITHOUT_OUTLIERS),
)
