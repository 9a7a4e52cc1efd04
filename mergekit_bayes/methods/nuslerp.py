"""Spherical interpolation by weights, of models, of task vectors, or of their rows."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import arc, changes_of, cosines_of, weighted_sum
from mergekit_bayes.methods.tensors import Array, Reads, Settings, TensorRule, Tensors, by_tensor

_PARALLEL = 1 - 1e-12  # above this cosine the sine is rounding, and the arc is a line
_NO_SUM = 1e-7  # of weights, below which they do not say where between the models to go


def nuslerp(tensors: Tensors) -> Array:
    """Go along the arc between two models, or between what two tasks changed of a base.

        t     = w_2 / (w_1 + w_2)
        cos a = <x_1, x_2> / (|x_1| |x_2|)
        mean  = (sin((1 - t) a) x_1 + sin(t a) x_2) / sin a    (m0 + ... with a base)

    The x are whole tensors. With `nuslerp_flatten=0` each vector along the last axis has its
    own angle (each row of a linear layer's weight, in shape (outputs, inputs)), and with
    `nuslerp_row_wise=1`, too, each along the first axis (a column). That is what mergekit does;
    its documentation names the two the other way round. Source: Shoemake, SIGGRAPH 1985, and
    mergekit's documentation; no paper known.

    A tensor of zeros counts as one at a right angle, and weights without a sum (below 1e-7) as
    equal, both as in mergekit. mergekit also takes a norm below 1e-7 for 1e-7.

    Args:
        tensors: Two tasks, with or without a base.
    """
    first, second = tensors.weights
    total = first + second
    t = 0.5 if abs(total) < _NO_SUM else second / total
    if reads_of(tensors.settings) != "products":
        return _by_vectors(tensors, t)
    assert tensors.products is not None
    products = tensors.products if tensors.base is None else changes_of(tensors.products)
    a, b = (float(c) for c in arc(cosines_of(products)[0, 1], t, _PARALLEL))
    if tensors.base is None:
        return weighted_sum(tensors.tasks, (a, b))
    return weighted_sum((tensors.base, *tensors.tasks), (1 - a - b, a, b))


def _by_vectors(tensors: Tensors, t: float) -> Array:
    axis = 0 if tensors.settings["nuslerp_row_wise"] else -1
    vectors = tensors.tasks if tensors.base is None else tensors.changes
    one, other = (np.atleast_1d(np.asarray(vector)) for vector in vectors)
    wide, wider = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(wide, axis=axis) * np.linalg.norm(wider, axis=axis)
    both = (wide * wider).sum(axis=axis)
    cosines = np.divide(both, norms, out=np.zeros_like(norms), where=norms > 0)
    a, b = (
        np.expand_dims(coefficients, axis).astype(one.dtype)
        for coefficients in arc(np.clip(cosines, -1.0, 1.0), t, _PARALLEL)
    )
    mean = (a * one + b * other).reshape(np.shape(vectors[0]))
    return np.asarray(mean if tensors.base is None else tensors.base + mean)


def reads_of(settings: Settings) -> Reads:
    """What is needed at a time: products, or the vectors of which each has its own angle."""
    if settings["nuslerp_flatten"]:
        return "products"
    return "tensor" if settings["nuslerp_row_wise"] else "rows"


NUSLERP = Method(
    "nuslerp",
    by_tensor,
    needs_base=False,
    needs_precision=False,
    takes_base=True,
    summary="Along the arc between two models, or two task vectors, by weights (mergekit).",
    example="bmerge merge A B --method nuslerp --scale 0.7 --scale 0.3",
    formula="m = (sin((1 - t) a) m_1 + sin(t a) m_2) / sin a,  t = w_2 / (w_1 + w_2)",
    parameters=(
        Parameter("nuslerp_flatten", 1, "0 gives each vector of a tensor its own angle", 0, 1),
        Parameter(
            "nuslerp_row_wise", 0, "1 takes vectors along the first axis, not the last", 0, 1
        ),
    ),
    tasks=2,
    tensor=TensorRule(nuslerp, "products", reads_of),
)
