"""Reading a curve at a level: what is paid there, and how well the interpolation knows it.

A curve is known at a few scales only. Between them two interpolants are drawn over the scale: a
smooth one (Hermite cubics; monotone for the axis, after Fritsch and Carlson, 1980) and straight
lines. The smooth one is read, and the distance between the two, times `_SAFETY`, bounds the error
of the grid. In the middle of a cell of width h the line is wrong by up to h^2/8 times the second
derivative, and the cubic by an order of h less.
"""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.records import FloatArray

_SAFETY = 2.0  # the cubic may be wrong by as much as this times its distance from the line
_HALVINGS = 30  # of a cell of the grid: a crossing is then exact to nine digits


class Reading(NamedTuple):
    """What is read off at one level, once for the estimate (row 0) and each resample.

    Attributes:
        paid: (1 + resamples,): nats per token above the base; NaN where the level is not reached.
        grid: (1 + resamples,): bound of the error of the interpolation, nats per token.
        scale: (1 + resamples,): the scale at which the axis reaches the level.
    """

    paid: FloatArray
    grid: FloatArray
    scale: FloatArray


def read_curve(
    scales: FloatArray, along: FloatArray, cost: FloatArray, level: float, *, rising: bool
) -> Reading:
    """What is paid where a curve first reaches a level of its axis.

    A measured axis is noisy, and the first of many noisy points below a level comes too early. So
    the axis is first made monotone by least squares (isotonic regression), from the base to the
    extreme point of the estimate; a curve that turns back later is read before it turns.

    Args:
        scales: (points,), increasing; the base's is 0.
        along: (1 + resamples, points): the axis; row 0 is the estimate, column 0 the base.
        cost: (1 + resamples, points): nats per token on the text that pays, likewise.
        level: Where to read.
        rising: Whether the axis rises from the base (a loss) or falls (a toxic share).
    """
    sign = 1.0 if rising else -1.0
    goal = sign * level
    usable = np.isfinite(along).all(axis=0) & np.isfinite(cost).all(axis=0)
    points = len(scales) if usable.all() else int(np.argmin(usable))  # up to a broken model
    if points < 2:
        nothing = np.full(len(along), np.nan)
        return Reading(nothing, nothing, nothing)
    scales, along, cost = scales[:points], along[:, :points], cost[:, :points]
    end = int(np.argmax(sign * along[0])) + 1
    if end == 1:  # no candidate is better than the base
        end = along.shape[1]
    t, x, y = scales[:end], isotonic(sign * along[:, :end]), cost[:, :end]
    reached = x >= goal
    at = np.argmax(reached, axis=1)
    cell = np.maximum(at - 1, 0)
    rows = np.arange(len(x))
    width = t[cell + 1] - t[cell]
    x0, x1, y0, y1 = x[rows, cell], x[rows, cell + 1], y[rows, cell], y[rows, cell + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(at == 0, 0.0, (goal - x0) / (x1 - x0))
        slopes = _monotone_slopes(t, x)
        u = _solve(x0, x1, width * slopes[rows, cell], width * slopes[rows, cell + 1], goal)
        u = np.where(at == 0, 0.0, u)
        slopes = _slopes(t, y)
        smooth = _hermite(u, y0, y1, width * slopes[rows, cell], width * slopes[rows, cell + 1])
        line = y0 + fraction * (y1 - y0)
        if end == 2:  # no third point shows a curvature: up to that of a cubic from its vertex
            grid = _SAFETY * np.abs(y1 - y0) * fraction * (1 - fraction)
        else:
            grid = _SAFETY * np.abs(smooth - line)
    there = reached.any(axis=1)
    return Reading(
        paid=np.where(there, smooth - cost[:, 0], np.nan),
        grid=np.where(there, grid, np.nan),
        scale=np.where(there, t[cell] + u * width, np.nan),
    )


def isotonic(x: FloatArray) -> FloatArray:
    """The nondecreasing rows closest to these, in least squares.

    The fit at j is the largest over i <= j of the smallest over k >= j of the mean of x_i .. x_k
    (Robertson, Wright and Dykstra, Order Restricted Statistical Inference, 1988, section 1.4).

    Args:
        x: (rows, points).
    """
    points = x.shape[1]
    if (np.diff(x, axis=1) >= 0).all():
        return x
    sums = np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)
    start, stop = np.arange(points)[:, None], np.arange(points)[None, :]
    count = np.maximum(stop - start + 1, 1)
    means = (sums[:, None, 1:] - sums[:, :-1, None]) / count  # (rows, start, stop)
    means[:, stop < start] = np.inf
    smallest = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    smallest[:, np.broadcast_to(stop < start, (points, points))] = -np.inf
    return np.asarray(smallest.max(axis=1), np.float64)


def _slopes(t: FloatArray, y: FloatArray) -> FloatArray:
    """(rows, points): derivatives of the parabola through each point and its neighbours."""
    if len(t) == 2:
        return np.repeat(np.diff(y, axis=1) / (t[1] - t[0]), 2, axis=1)
    h = np.diff(t)
    d = np.diff(y, axis=1) / h
    inner = (h[:-1] * d[:, 1:] + h[1:] * d[:, :-1]) / (h[:-1] + h[1:])
    first = ((2 * h[0] + h[1]) * d[:, 0] - h[0] * d[:, 1]) / (h[0] + h[1])
    last = ((2 * h[-1] + h[-2]) * d[:, -1] - h[-1] * d[:, -2]) / (h[-1] + h[-2])
    return np.concatenate([first[:, None], inner, last[:, None]], axis=1)


def _monotone_slopes(t: FloatArray, x: FloatArray) -> FloatArray:
    """(rows, points): derivatives with which the cubics of nondecreasing rows do not turn back.

    A derivative of at most three times the secants beside it is enough (Fritsch and Carlson).
    """
    d = np.diff(x, axis=1) / np.diff(t)
    before = np.concatenate([d[:, :1], d], axis=1)
    after = np.concatenate([d, d[:, -1:]], axis=1)
    return np.asarray(np.clip(_slopes(t, x), 0, 3 * np.minimum(before, after)), np.float64)


def _hermite(
    u: FloatArray, y0: FloatArray, y1: FloatArray, d0: FloatArray, d1: FloatArray
) -> FloatArray:
    """The cubic on [0, 1] with these ends and derivatives, at u."""
    v = 1 - u
    value = v * v * (1 + 2 * u) * y0 + u * u * (3 - 2 * u) * y1 + u * v * (v * d0 - u * d1)
    return np.asarray(value, np.float64)


def _solve(
    x0: FloatArray, x1: FloatArray, d0: FloatArray, d1: FloatArray, goal: float
) -> FloatArray:
    """Where a nondecreasing cubic reaches the goal, by bisection of [0, 1]."""
    low, high = np.zeros_like(x0), np.ones_like(x0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_below = _hermite(middle, x0, x1, d0, d1) < goal
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return high
