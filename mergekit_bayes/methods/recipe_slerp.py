"""Spherical interpolation from the base to one model, as mergekit's recipes mean `slerp`."""

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import arc, cosines_of, weighted_sum
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor

_PARALLEL = 0.9995  # above this cosine, or below its negative, the arc is a line


def recipe_slerp(tensors: Tensors) -> Array:
    """Go along the arc from the base to the other model, in each tensor by its own angle.

        cos a = <m0, m_1> / (|m0| |m_1|)
        mean  = (sin((1 - t) a) m0 + sin(t a) m_1) / sin a
        mean  = (1 - t) m0 + t m_1      where |cos a| > 0.9995

    Source: Shoemake, SIGGRAPH 1985; the threshold is what mergekit does. A tensor of zeros counts
    as one at a right angle (mergekit: one whose norm is below 1e-8). `t` may lie beyond both ends.
    Between almost opposite models, of -0.999 say, the coefficients are large, there as here.

    Args:
        tensors: The base, which t = 0 gives back, and one task, which t = 1 gives.
    """
    assert tensors.base is not None
    assert tensors.products is not None
    cosine = cosines_of(tensors.products)[0, 1]
    first, second = arc(cosine, tensors.number("t"), _PARALLEL)
    return weighted_sum((tensors.base, *tensors.tasks), (float(first), float(second)))


RECIPE_SLERP = Method(
    "slerp",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Along the arc from the base to one model (Shoemake, SIGGRAPH 1985).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: slerp",
    formula="m = (sin((1 - t) a) m0 + sin(t a) m_1) / sin a,  cos a = <m0, m_1> / (|m0| |m_1|)",
    parameters=(Parameter("t", 0.5, "how far from the base to the model, of the whole way"),),
    tasks=1,
    takes_scales=False,
    tensor=TensorRule(recipe_slerp, "products"),
)
