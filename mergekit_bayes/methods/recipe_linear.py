"""The weighted sum of models, as mergekit's recipes mean `linear`."""

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import weighted_sum
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def recipe_linear(tensors: Tensors) -> Array:
    """Add the models by their weights, which are shares or, with `normalize=0`, factors.

        mean = sum_t w_t m_t / sum_t w_t,  or sum_t w_t m_t

    Source: Wortsman et al., "Model soups", ICML 2022, for equal weights; mergekit's documentation
    for the rest. Weights may be negative. Where they sum to zero mergekit writes NaN.

    Args:
        tensors: Without a base; any number of tasks.

    Raises:
        ArithmeticError: Shares of weights that sum to zero.
    """
    weights = tensors.weights
    if tensors.settings["normalize"]:
        total = sum(weights)
        if total == 0:
            raise ArithmeticError(
                "the weights of its models sum to zero, so that they are no shares. Change them, "
                "or set normalize to 0 (false) to add the models as they are"
            )
        weights = tuple(weight / total for weight in weights)
    return weighted_sum(tensors.tasks, weights)


RECIPE_LINEAR = Method(
    "linear",
    by_tensor,
    needs_base=False,
    needs_precision=False,
    summary="The weighted average of models, or their weighted sum "
    "(model soups, Wortsman et al., ICML 2022).",
    example="bmerge merge recipe.yml -o OUT    # merge_method: linear",
    formula="m = sum_t w_t m_t / sum_t w_t",
    parameters=(Parameter("normalize", 1, "1 divides the weights by their sum", 0, 1),),
    tensor=TensorRule(recipe_linear, "entries"),
)
