"""DELLA: MagPrune, then task arithmetic (Deep et al., 2024, arXiv 2406.11617)."""

from mergekit_bayes.methods.adding import add_scaled
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import DELLA_PARAMETERS, magprune, refused_window
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def della_linear(tensors: Tensors) -> Array:
    """Draw the entries of each task vector, larger ones more often, rescale, and add them up.

        q_t  = density + epsilon ((r + 1/2) / n - 1/2),  r = 0, ..., n - 1 by |m_t - m0|
        d_t  = (m_t - m0) [draw_t < q_t] / q_t
        mean = m0 + sum_t scale_t d_t

    r is the rank in the row of the last axis, which has n entries. With epsilon = 0 it is DARE. The
    paper elects signs; this is its method without that step. Of the paper, its abstract and its
    authors' README were at hand: more dropping for lower ranks, 1 / q, and a window of
    probabilities, 0.14 wide. That q is linear in the rank within a row is how mergekit documents
    it. Under its YAML epsilon is half the window, and d_t is rescaled by tensor
    (`weighed_della_linear`).

    Args:
        tensors: Whole rows of the base and the tasks, with scales, settings and draws.

    Raises:
        ArithmeticError: `density` and `epsilon` give probabilities that are not between 0 and 1.
    """
    return add_scaled(tensors, (magprune(tensors, t) for t in range(len(tensors.tasks))))


DELLA_LINEAR = Method(
    "della_linear",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="A share of each change, likelier where it is large in its row, added up "
    "(DELLA, Deep et al., 2024).",
    example="bmerge merge A B --base BASE --method della_linear --param density=0.7",
    parameters=DELLA_PARAMETERS,
    facts=refused_window,
    tensor=TensorRule(della_linear, "rows"),
    random=True,
)
