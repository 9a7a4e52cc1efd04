"""Angles between whole tensors, and weighted sums of them: what rules on the sphere share."""

import math
from collections.abc import Sequence

import numpy as np

from mergekit_bayes.methods.tensors import Array

_ROUNDING = 1e-14  # of a squared norm, below which a difference of such sums means nothing


def norms_of(products: Array) -> Array:
    """The norms of tensors, (models,), from their products, (models, models)."""
    return np.asarray(np.sqrt(np.maximum(np.diag(products), 0.0)))


def norm_of_sum(products: Array, coefficients: Array) -> float:
    """The norm of a weighted sum of tensors, from their products, (models, models)."""
    return math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))


def changes_of(products: Array) -> Array:
    """The products of the task vectors, with zeros for a task that changed nothing.

        <m_s - m0, m_t - m0> = G_st - G_s0 - G_t0 + G_00

    The difference of four large sums does not vanish exactly, so that a change whose square is
    below 1e-14 of those of the models counts as none. In float32 that is half a unit in the last
    place of each entry.

    Args:
        products: (1 + tasks, 1 + tasks), the base's first.

    Returns:
        (tasks, tasks).
    """
    first = products[0]
    found = np.array(products[1:, 1:] - first[1:, None] - first[None, 1:] + first[0])
    is_nothing = np.diag(found) <= _ROUNDING * (np.diag(products)[1:] + first[0])
    found[is_nothing, :] = 0
    found[:, is_nothing] = 0
    return found


def cosines_of(products: Array) -> Array:
    """The cosines between tensors, (models, models); 0 with a tensor of zeros, itself included."""
    norms = norms_of(products)
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(np.clip(products * scale[:, None] * scale[None, :], -1.0, 1.0))


def arc(cosine: Array | float, t: float, line: float) -> tuple[Array, Array]:
    """The coefficients of a point on the arc between two tensors (Shoemake, SIGGRAPH 1985).

        cos a = cosine
        first = sin((1 - t) a) / sin a,  second = sin(t a) / sin a

    Args:
        cosine: Of the angle between them, in [-1, 1]; of each pair where there are several.
        t: How far from the first to the second, 1 being the whole way.
        line: The absolute cosine above which the arc is a line: first = 1 - t, second = t.

    Returns:
        Both, in float64 and the shape of `cosine`.
    """
    cosine = np.asarray(cosine, np.float64)
    is_line = np.abs(cosine) > line
    angle = np.arccos(np.where(is_line, 0.0, cosine))
    first = np.where(is_line, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    return first, np.where(is_line, t, np.sin(t * angle) / np.sin(angle))


def weighted_sum(arrays: Sequence[Array], coefficients: Sequence[float]) -> Array:
    """The sum of tensors by their coefficients.

        sum_i c_i m_i = (sum_i c_i) m_p + sum_i c_i (m_i - m_p),  |c_p| the largest

    Written so, equal tensors whose coefficients sum to 1 give that tensor to the bit in float32,
    and what rounds are the differences of models that are much alike.

    Args:
        arrays: The tensors, or pieces of them, of one shape and dtype.
        coefficients: One for each.
    """
    largest = int(np.argmax(np.abs(coefficients)))
    pivot = arrays[largest]
    total = np.asarray(float(np.sum(coefficients)) * pivot)
    for i, (array, coefficient) in enumerate(zip(arrays, coefficients, strict=True)):
        if i != largest and coefficient != 0:
            total = total + float(coefficient) * (array - pivot)
    return np.asarray(total)
