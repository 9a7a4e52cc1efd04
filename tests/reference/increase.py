"""The increase of a quadratic loss, from the losses themselves: evaluated at two points."""

import numpy as np


def loss(x, mean, curvature, gradient):
    """A summed loss that is quadratic around `mean`, entry by entry."""
    d = np.float64(x) - np.float64(mean)
    return float(np.sum(np.float64(gradient) * d + np.float64(curvature) * d * d / 2))


def gradient(mean, base, pull=0.0, decay=0.0):
    """That of the data at the end of a training which was pulled to the base, or to zero."""
    return -pull * (np.float64(mean) - np.float64(base)) - decay * np.float64(mean)


def increase(merged, mean, base, curvature, count, pull=0.0, decay=0.0):
    """In nats an observation, by tensor, of models that are dictionaries of arrays.

    Args:
        merged: The merge.
        mean: The model.
        base: What it was trained from.
        curvature: That of its summed loss.
        count: Its observations.
        pull: Precision of the pull to the base.
        decay: Precision of the pull to zero.
    """
    found = {}
    for n in mean:
        g = gradient(mean[n], base[n], pull, decay)
        at = [loss(x, mean[n], curvature[n], g) for x in (merged[n], mean[n])]
        found[n] = (at[0] - at[1]) / count
    return found


def distance(merged, mean, base, curvature):
    """`|merged - mean| / |base - mean|` in the norm of the curvature."""
    far, near = (
        sum(2 * loss(x[n], mean[n], curvature[n], 0.0) for n in mean) for x in (merged, base)
    )
    return np.sqrt(far / near)
