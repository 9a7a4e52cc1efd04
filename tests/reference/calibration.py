"""Accuracy, log loss, Brier score and calibration error, one example at a time, in plain floats."""

import math


def scores(probabilities, labels, bins):
    """(accuracy, nll, brier, ece) as Guo et al. (2017) and Brier (1950) write them."""
    n = len(labels)
    examples = list(zip(probabilities, labels, strict=True))
    right = [float(max(range(len(p)), key=p.__getitem__) == y) for p, y in examples]
    nll = -sum(math.log(p[y]) for p, y in examples) / n
    brier = sum((p[c] - (c == y)) ** 2 for p, y in examples for c in range(len(p))) / n
    ece = 0.0
    for b in range(bins):
        low, high, last = b / bins, (b + 1) / bins, b == bins - 1
        inside = [
            i for i, (p, _) in enumerate(examples) if low <= max(p) < high or (last and max(p) == 1)
        ]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            confidence = sum(max(probabilities[i]) for i in inside) / len(inside)
            ece += len(inside) / n * abs(accuracy - confidence)
    return sum(right) / n, nll, brier, ece
