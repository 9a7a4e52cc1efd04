"""SCE: select where tasks differ, calculate weights, erase minorities (Wan et al., EMNLP 2025)."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sparsifying import change_of
from mergekit_bayes.methods.tensors import (
    Array,
    Order,
    Settings,
    Sum,
    TensorRule,
    Tensors,
    by_tensor,
    number_of,
)


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
        tensors: Measured pieces of the base and the tasks, with scales and settings.
    """
    base, taken = np.asarray(tensors.base), _taken(tensors)
    selected = _selected(tensors)
    changes = [_kept(tensors, t, selected) for t in taken]
    is_positive = sum(changes, np.zeros_like(base)) >= 0
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    squares = [tensors.total("squares", t) for t in taken]
    for t, square, change in zip(taken, squares, changes, strict=True):
        weight = square / (sum(squares) or 1.0)
        agrees = np.where(is_positive, change > 0, change < 0)
        np.add(total, tensors.weights[t] * weight * change, out=total, where=agrees)
        np.add(divisor, base.dtype.type(weight), out=divisor, where=agrees)
    np.divide(total, divisor, out=total, where=divisor > 0)
    return np.asarray(base + total)


def _taken(tensors: Tensors) -> list[int]:
    return [t for t, scale in enumerate(tensors.weights) if scale != 0]


def _selected(tensors: Tensors) -> Array | None:
    """Where tasks differ enough; None where all entries are selected."""
    if not _selects(tensors.settings):
        return None
    (cut,) = tensors.cuts("selected", 0)
    return cut.keeps(_variance(tensors, 0), tensors.start)


def _kept(tensors: Tensors, task: int, selected: Array | None) -> Array:
    change = change_of(tensors, task)
    if selected is not None:
        np.copyto(change, 0, where=~selected)
    return change


def _variance(tensors: Tensors, _: int) -> Array:
    # Welford's sums: of equal changes the variance is exactly zero.
    mean, variance = np.zeros_like(tensors.base), np.zeros_like(tensors.base)
    for count, t in enumerate(_taken(tensors), 1):
        change = change_of(tensors, t)
        apart = change - mean
        mean = mean + apart / count
        variance += apart * (change - mean)
    return np.asarray(variance)


def _selects(settings: Settings) -> bool:
    return number_of(settings, "select_topk") < 1


def _count(settings: Settings, _: int, size: int, positive: int) -> tuple[int, ...]:
    # In float32 as in mergekit.
    return (int(np.float32(number_of(settings, "select_topk")) * np.float32(positive)),)


def _squares(tensors: Tensors, task: int) -> Array:
    change = _kept(tensors, task, _selected(tensors))
    return np.square(change, out=change)


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
    tensor=TensorRule(
        sce,
        "entries",
        measures=(
            Order("selected", _variance, _count, lambda _: 1, by_positive=True, is_needed=_selects),
            Sum("squares", _squares, lambda tasks: tasks),
        ),
    ),
)
