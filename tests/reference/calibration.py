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


def squared_error(probabilities, labels, bins):
    """The mean of d_i d_j over the pairs i != j of each bin, weighted by the bin's examples."""
    members = {}
    for p, y in zip(probabilities, labels, strict=True):
        right = float(max(range(len(p)), key=p.__getitem__) == y)
        members.setdefault(min(int(max(p) * bins), bins - 1), []).append(right - max(p))
    total = 0.0
    for gaps in members.values():
        pairs = [a * b for i, a in enumerate(gaps) for j, b in enumerate(gaps) if i != j]
        if pairs:
            total += len(gaps) * sum(pairs) / len(pairs)
    return total / len(labels)
