"""mergekit's TIES: the largest changes of each tensor, signs elected by weighed task vectors."""

from mergekit_bayes.methods.adding import add_elected, adding_parameters
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import DENSITY, TRIMMED, trimmed
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_ties(tensors: Tensors) -> Array:
    """Keep the largest entries of each task vector, elect signs, and average those that agree.

        d_t  = m_t - m0 where |m_t - m0| is among the int(density_t n) largest of n, else 0
        x_t  = w_t d_t,  s = + where sum_t x_t >= 0, else -
        mean = m0 + lambda sum_t [sign x_t = s] x_t / (sum_t [sign x_t = s] w_t if `normalize`)

    The paper (Yadav et al., NeurIPS 2023) trims over the whole model, elects signs by the sum of
    d_t, not of x_t, and divides by the number of those that agree; with equal weights the last two
    are the same. In each tensor at least one entry stays, where the density is not zero. The number
    of entries kept is exact: of equal ones the first stay, where mergekit keeps any of them.

    Args:
        tensors: Pieces of the base and the tasks, measured by `TRIMMED`, with
            weights and settings.
    """
    return add_elected(tensors, (trimmed(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_TIES = Method(
    "ties",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="The largest changes of each tensor, where weighed tasks agree in sign "
    "(TIES, Yadav et al., NeurIPS 2023, as in mergekit).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: ties",
    parameters=(*adding_parameters(normalize=True, rescale=False), DENSITY),
    tensor=TensorRule(weighed_ties, "entries", measures=TRIMMED),
)
