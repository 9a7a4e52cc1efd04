"""RegMean: the layer whose outputs are nearest to those of all models (Jin et al., ICLR 2023)."""

from typing import NamedTuple

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods import matrices, means
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Scales, Tasks


class Trust(NamedTuple):
    """How far the correlation of inputs is trusted.

    Attributes:
        alpha: What the entries off the diagonal of a Gram matrix are multiplied by, in [0, 1].
    """

    alpha: float


def regmean(base: Gaussian | None, tasks: Tasks, scales: Scales, facts: Trust) -> Gaussian:
    """Average by Gram matrices of a layer's inputs, their entries off the diagonal made smaller.

        S_t  = alpha G_t + (1 - alpha) diag(G_t),  G_t = N E[x x'] over the inputs x of model t
        mean = (sum_t scale_t m_t S_t) (sum_t scale_t S_t)^-1

    At alpha = 1 the mean minimises sum_t scale_t |m x - m_t x|^2 over all inputs, and is that of
    `precision_average`. The authors take alpha = 0.9 for most models and 0.1 for T5. Their Gram
    matrices are of equally many inputs, which is `--counts equal`.

    Args:
        base: Not needed.
        tasks: Means (outputs, inputs), precisions (inputs, inputs), positive definite.
        scales: One per task, dimensionless, >= 0 and of positive sum.
        facts: alpha.
    """
    grams = [
        scale
        * (facts.alpha * task.precision + (1 - facts.alpha) * matrices.diagonal_of(task.precision))
        for task, scale in zip(tasks, scales, strict=True)
    ]
    return Gaussian(*matrices.weighted_mean([task.mean for task in tasks], grams))


def _trust(inputs: FactInputs) -> Trust:
    return Trust(float(inputs.settings["alpha"]))


REGMEAN = Method(
    "regmean",
    means.weighted_mean,
    needs_base=False,
    needs_precision=True,
    summary="The mean of each layer's weights by the Gram matrices of its inputs "
    "(RegMean, Jin et al., ICLR 2023).",
    example="bmerge merge A B --method regmean",
    formula="m = (sum_t scale_t m_t S_t) (sum_t scale_t S_t)^-1,  S = alpha G + (1 - alpha) diag G",
    parameters=(
        Parameter("alpha", 0.9, "what the correlations of inputs are multiplied by", 0, 1),
    ),
    facts=_trust,
    matrix=regmean,
    needs_matrices=True,
)
