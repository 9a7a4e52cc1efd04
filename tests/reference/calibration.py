"""Accuracy, log loss, Brier score and calibration error, one example at a time, in plain floats."""

import math


def scores(probabilities, labels, bins):
    """(accuracy, nll, brier, ece) as Guo et al. (2017) and Brier (1950) write them."""
    n = len(labels)
    right = [
        float(max(range(len(p)), key=p.__getitem__) == y)
        for p, y in zip(probabilities, labels, strict=True)
    ]
    nll = -sum(math.log(p[y]) for p, y in zip(probabilities, labels, strict=True)) / n
    brier = sum(
        sum((p[c] - (c == y)) ** 2 for c in range(len(p)))
        for p, y in zip(probabilities, labels, strict=True)
    )
    ece = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        here = [
            i
            for i, p in enumerate(probabilities)
            if low <= max(p) < high or (b == bins - 1 and max(p) == 1)
        ]
        if here:
            accuracy = sum(right[i] for i in here) / len(here)
            confidence = sum(max(probabilities[i]) for i in here) / len(here)
            ece += len(here) / n * abs(accuracy - confidence)
    return sum(right) / n, nll, brier / n, ece
