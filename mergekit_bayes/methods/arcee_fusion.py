"""Arcee Fusion: what changed much in rows that changed much (Arcee AI, 2025)."""

import numpy as np

from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.sparsifying import change_of
from mergekit_bayes.methods.tensors import (
    Array,
    Order,
    Settings,
    TensorRule,
    Tensors,
    by_tensor,
)

_BLOCK = 1 << 20  # entries whose softmax is taken in float64 at a time


def arcee_fusion(tensors: Tensors) -> Array:
    """Take those entries of the other model that stand out by an importance.

        KL    = sum_j q_j log(q_j / p_j),  p, q = softmax of a row of m0 and of m_1
        I     = |m_1 - m0| KL of the entry's row
        mean  = m0 + scale (m_1 - m0) where I >= median(I) + 1.5 (Q3(I) - Q1(I)), else m0

    There is no paper. The maker's announcement (MergeKit 0.1, 2025) names an importance of absolute
    differences and of the KL divergence of softmax distributions, and the threshold; the rest is
    what mergekit's merges show: rows run along the last axis, the divergence is that of the other
    model from the base, and a quantile p of n entries is the one at int(p (n - 1)) in order. Here
    quantiles are exact; mergekit draws a sample of tensors above 1,000,000 entries, and its masks
    differ from run to run. The divergence is in float64: where a model changed by 1e-3, float32 as
    in mergekit puts some 2 % of the entries on the other side of the threshold.

    Args:
        tensors: Measured rows of the base and of one task, with its scale, published 1.
    """
    base, change = np.asarray(tensors.base), change_of(tensors, 0)
    first, median, third = (cut.threshold for cut in tensors.cuts("quartiles", 0))
    stands_out = _importance(tensors, 0) >= median + 1.5 * (third - first)
    scaled = tensors.weights[0] * change
    return np.asarray(base + np.where(stands_out, scaled, base.dtype.type(0)))


def _quartiles(_: Settings, task: int, size: int, positive: int) -> tuple[int, ...]:
    return tuple(size - int(share * (size - 1)) for share in (0.25, 0.5, 0.75))


def _importance(tensors: Tensors, task: int) -> Array:
    """How much each entry and its row changed.

        I = |m_1 - m0| sum_j q_j log(q_j / p_j),  p, q = softmax of a row of m0 and of m_1

    Args:
        tensors: Whole rows.
        task: Which task.

    Returns:
        In the shape and dtype of the base.
    """
    base, other = np.asarray(tensors.base), np.asarray(tensors.tasks[task])
    columns = base.shape[-1] if base.ndim else 1
    first, second = base.reshape(-1, columns), other.reshape(-1, columns)
    result = np.abs(second - first)
    height = max(1, _BLOCK // columns)
    for start in range(0, len(result), height):
        rows = slice(start, start + height)
        p, q = _log_softmax(first[rows]), _log_softmax(second[rows])
        result[rows] *= (np.exp(q) * (q - p)).sum(axis=1, keepdims=True)
    return np.asarray(result).reshape(base.shape)


def _log_softmax(rows: Array) -> Array:
    shifted = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


ARCEE_FUSION = Method(
    "arcee_fusion",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="Entries of another model that stand out, on the base (Arcee Fusion, 2025).",
    example="bmerge merge A --base BASE --method arcee_fusion",
    formula="m = m_1 where |m_1 - m0| KL(row of m_1, row of m0) stands out, else m0",
    tasks=1,
    takes_scales=False,
    reads_weights=True,
    tensor=TensorRule(
        arcee_fusion,
        "rows",
        measures=(Order("quartiles", _importance, _quartiles, lambda _: 1, only_thresholds=True),),
    ),
)
