"""mergekit's DELLA: entries drawn by rank, by weights."""

from mergekit_bayes.methods.adding import add, adding_parameters
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sparsifying import DENSITY, DRAWN_BY_RANK, SEED, drawn_by_rank
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_della_linear(tensors: Tensors) -> Array:
    """Draw the entries of each task vector, larger ones more often, and add them up.

        q_t  = density_t - epsilon_t + 2 epsilon_t r / (n - 1),  r = 0, ..., n - 1 by |m_t - m0|
        d_t  = (m_t - m0) [draw_t < q_t],  at the L1 norm of m_t - m0 if `rescale`
        mean = m0 + lambda sum_t w_t d_t / (sum_t w_t if `normalize`)

    r is the rank in the row of the last axis, which has n entries. The paper (Deep et al., 2024)
    divides each entry by its q_t, and its epsilon is the whole range of q_t; in mergekit it is half
    of it, and what is kept gets the L1 norm that the task vector had in this tensor.

    Args:
        tensors: Whole rows of the base and the tasks, measured by `DRAWN_BY_RANK`, with
            weights, settings and draws.

    Raises:
        ArithmeticError: `density` and `epsilon` give probabilities that are not between 0 and 1.
    """
    return add(tensors, (drawn_by_rank(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_DELLA_LINEAR = Method(
    "della_linear",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Changes drawn by rank in their row, by weights "
    "(DELLA, Deep et al., 2024, as in mergekit).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: della_linear",
    parameters=(
        *adding_parameters(normalize=False, rescale=True),
        DENSITY,
        Parameter("epsilon", 0.15, "half the range of probabilities of being kept", 0, 1),
        SEED,
    ),
    tensor=TensorRule(weighed_della_linear, "rows", measures=DRAWN_BY_RANK),
    random=True,
)
