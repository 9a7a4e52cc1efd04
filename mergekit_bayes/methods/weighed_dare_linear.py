"""mergekit's DARE: a random share of each task vector, by weights."""

from mergekit_bayes.methods.adding import add, adding_parameters
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import DENSITY, DROPPED, SEED, dropped
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def weighed_dare_linear(tensors: Tensors) -> Array:
    """Keep entries of the task vectors at random, rescale them, and add them up.

        d_t  = (m_t - m0) [draw_t < density_t],  at the L1 norm of m_t - m0 if `rescale`
        mean = m0 + lambda sum_t w_t d_t / (sum_t w_t if `normalize`)

    The paper (Yu et al., ICML 2024) divides what is kept by the density. mergekit gives it the L1
    norm that the task vector had in this tensor, which is the same on average, and needs its sum
    over the tensor.

    Args:
        tensors: Pieces of the base and the tasks, measured by `DROPPED`, with
            weights, settings and draws.
    """
    return add(tensors, (dropped(tensors, t) for t in range(len(tensors.tasks))))


WEIGHED_DARE_LINEAR = Method(
    "dare_linear",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="A random share of each change, at its size, by weights "
    "(DARE, Yu et al., ICML 2024, as in mergekit).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: dare_linear",
    parameters=(*adding_parameters(normalize=False, rescale=True), DENSITY, SEED),
    tensor=TensorRule(weighed_dare_linear, "entries", measures=DROPPED),
    random=True,
)
