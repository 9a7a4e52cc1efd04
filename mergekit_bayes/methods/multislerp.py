"""Spherical interpolation of any number of models."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import changes_of, norm_of_sum, norms_of, weighted_sum
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor

_CANCELLED = 1e-6  # of the weights' sum, below which a sum of directions is rounding


def multislerp(tensors: Tensors) -> Array:
    """Take the weighted mean of directions, at the weighted mean of lengths.

        q_t  = w_t / (|x_t| + eps),  S = sum_t q_t x_t
        mean = (sum_t w_t |x_t|) S / |S|

    The x_t are the models or, with a base, what each task changed of it, and the weights shares
    unless `normalize_weights=0`. Source: mergekit's documentation; no paper known. It speaks of
    an interpolation in the tangent space at the mean of directions. There the weighted sum of the
    projections onto that space is zero, so that the mean is the result, which mergekit's numbers
    confirm to 1e-15.

    Where directions cancel out (|S| <= eps, or 1e-6 of the weights, which is rounding) there is
    none between them: two models are then averaged by their weights, and more are refused, as in
    mergekit. Where all models or changes are zero, so is the merge or its change, which mergekit
    refuses for three or more. A single model is returned whatever its weight.

    Args:
        tensors: Any number of tasks, with or without a base.

    Raises:
        ArithmeticError: Shares of weights that sum to zero, or three or more directions that cancel
            out.
    """
    assert tensors.products is not None
    if len(tensors.tasks) == 1:
        return tensors.tasks[0]
    products = tensors.products if tensors.base is None else changes_of(tensors.products)
    coefficients = _coefficients(tensors, products)
    if tensors.base is None:
        return weighted_sum(tensors.tasks, list(coefficients))
    shares = [1 - float(np.sum(coefficients)), *coefficients]
    return weighted_sum((tensors.base, *tensors.tasks), shares)


def _coefficients(tensors: Tensors, products: Array) -> Array:
    weights = np.array(tensors.weights, np.float64)
    if tensors.settings["normalize_weights"]:
        if weights.sum() == 0:
            raise ArithmeticError(
                "the weights of its models sum to zero, so that they are no shares. Change them, "
                "or set normalize_weights to 0 (false)"
            )
        weights = weights / weights.sum()
    norms, eps = norms_of(products), tensors.number("eps")
    if not norms.any():
        return np.zeros_like(weights)
    scaled = weights / np.where(norms > 0, norms + eps, 1.0)
    length = norm_of_sum(products, scaled)
    if length > max(eps, _CANCELLED * np.abs(weights).sum()):
        return np.asarray(scaled * (weights @ norms) / length)
    if len(weights) > 2:
        raise ArithmeticError(
            "the directions of its models cancel out at these weights, so that there is none "
            "between them. Take other weights, or another method for this tensor"
        )
    return weights


MULTISLERP = Method(
    "multislerp",
    by_tensor,
    needs_base=False,
    needs_precision=False,
    takes_base=True,
    summary="The mean direction of models, or of task vectors, at their mean length (mergekit).",
    example="bmerge merge A B C --method multislerp",
    formula="m = (sum_t w_t |m_t|) S / |S|,  S = sum_t w_t m_t / |m_t|",
    parameters=(
        Parameter("normalize_weights", 1, "1 divides the weights by their sum", 0, 1),
        Parameter("eps", 1e-8, "what is added to each norm, in units of the weights", 0),
    ),
    tensor=TensorRule(multislerp, "products"),
)
