"""SCE: select where tasks differ, calculate weights, erase minorities (Wan et al., EMNLP 2025)."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sparsifying import change_of, largest
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def sce(tensors: Tensors) -> Array:
    """Weigh task vectors by their squares, where tasks differ most and agree in sign.

        d_t  = m_t - m0 where Var_t(m_t - m0) is among the first `select_topk` of those above 0
        q_t  = sum over the tensor of d_t^2,  s = + where sum_t d_t >= 0, else -
        mean = m0 + sum_t [sign d_t = s] scale_t q_t d_t / sum_t [sign d_t = s] q_t

    The variance is that over the tasks. At `select_topk` of 1 every entry is selected, below it
    int(select_topk n) of the n entries whose variance is not zero, the first of equal ones. Where
    all tasks changed an entry by the same, nothing is then selected; a single task changes nothing.
    Signs are elected without weights. Of the paper (arXiv 2408.07990) the abstract was at hand; the
    steps are those that mergekit documents for it, which has the rule under the same name, without
    scales. A task of scale zero takes no part.

    Args:
        tensors: The whole tensor of the base and the tasks, with scales and settings.
    """
    base, scales = np.asarray(tensors.base), [s for s in tensors.weights if s != 0]
    changes = [change_of(tensors, t) for t, s in enumerate(tensors.weights) if s != 0]
    share = tensors.number("select_topk")
    if share < 1:
        selected = _selected(changes, share, base)
        changes = [np.where(selected, change, base.dtype.type(0)) for change in changes]
    is_positive = sum(changes, np.zeros_like(base)) >= 0
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    squares = [float(np.square(change).sum(dtype=np.float64)) for change in changes]
    for scale, square, change in zip(scales, squares, changes, strict=True):
        weight = square / (sum(squares) or 1.0)
        agrees = np.where(is_positive, change > 0, change < 0)
        np.add(total, scale * weight * change, out=total, where=agrees)
        np.add(divisor, base.dtype.type(weight), out=divisor, where=agrees)
    np.divide(total, divisor, out=total, where=divisor > 0)
    return np.asarray(base + total)


def _selected(changes: list[Array], share: float, base: Array) -> Array:
    # Welford's sums: of equal changes the variance is exactly zero.
    mean, variance = np.zeros_like(base), np.zeros_like(base)
    for count, change in enumerate(changes, 1):
        apart = change - mean
        mean = mean + apart / count
        variance += apart * (change - mean)
    differing = np.float32(np.count_nonzero(variance))
    return largest(variance, int(np.float32(share) * differing))  # in float32 as in mergekit


SCE = Method(
    "sce",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Task vectors by their squares, where tasks differ and agree in sign "
    "(SCE, Wan et al., EMNLP 2025).",
    example="bmerge merge A B --base BASE --method sce --param select_topk=0.1",
    parameters=(
        Parameter("select_topk", 1.0, "share of entries that are selected by variance", 0, 1),
        Parameter("int8_mask", 0, "changes no number; mergekit saves memory by it", 0, 1),
    ),
    tensor=TensorRule(sce, "tensor"),
)
