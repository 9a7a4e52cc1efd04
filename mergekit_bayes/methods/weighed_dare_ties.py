"""mergekit's DARE: a random share of each task vector, and TIES' election of signs."""

from mergekit_bayes.methods.adding import add_elected, adding_parameters
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import DENSITY, DROPPED, SEED, dropped
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_dare_ties(tensors: Tensors) -> Array:
    """Keep entries of the task vectors at random, rescale them, and elect signs.

        d_t  = (m_t - m0) [draw_t < density_t],  at the L1 norm of m_t - m0 if `rescale`
        x_t  = w_t d_t,  s = + where sum_t x_t >= 0, else -
        mean = m0 + lambda sum_t [sign x_t = s] x_t / (sum_t [sign x_t = s] w_t if `normalize`)

    The paper (Yu et al., ICML 2024) divides what is kept by the density. mergekit gives it the L1
    norm that the task vector had in this tensor, which is the same on average, and needs its sum
    over the tensor. Signs are elected by weighed task vectors, and what agrees is added, not
    averaged, unless `normalize` is 1.

    Args:
        tensors: Pieces of the base and the tasks, measured by `DROPPED`, with
            weights, settings and draws.
    """
    return add_elected(tensors, (dropped(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_DARE_TIES = Method(
    "dare_ties",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="A random share of each change, at its size, where weighed tasks agree in sign "
    "(DARE, Yu et al., ICML 2024, as in mergekit).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: dare_ties",
    parameters=(*adding_parameters(normalize=False, rescale=True), DENSITY, SEED),
    tensor=TensorRule(weighed_dare_ties, "entries", measures=DROPPED),
    random=True,
)
