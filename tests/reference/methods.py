"""Merging rules over whole models, written from the papers in float64 with sorts and loops over tensors.

A model is a dictionary of arrays.
"""

import math

import numpy as np


def deltas(base, tasks):
    return [{n: np.float64(t[n]) - np.float64(base[n]) for n in base} for t in tasks]


def flat(tensors):
    return np.concatenate([np.ravel(np.float64(tensors[n])) for n in sorted(tensors)])


def top(values, density):
    """The smallest magnitude among the share `density` of largest ones."""
    count = round(density * values.size)
    return np.inf if count == 0 else np.sort(np.abs(values))[-count]


def elect_and_merge(changes, scales):
    """The mean, over those whose sign is that of the sum, of scaled changes; zero where nobody agrees."""
    sign = np.sign(sum(changes))
    merged = np.zeros_like(changes[0])
    count = np.zeros_like(changes[0])
    for change, scale in zip(changes, scales, strict=True):
        agrees = (np.sign(change) == sign) & (change != 0)
        merged += np.where(agrees, scale * change, 0)
        count += agrees
    return merged / np.maximum(count, 1)


def ties(base, tasks, scales, density, scope="model"):
    """Trim over the task's whole vector (or tensor by tensor), elect, and take the disjoint mean."""
    vectors = deltas(base, tasks)
    result = {}
    limits = [top(flat(v), density) for v in vectors]
    for n in base:
        trimmed = []
        for vector, limit in zip(vectors, limits, strict=True):
            least = top(np.ravel(vector[n]), density) if scope == "tensor" else limit
            trimmed.append(np.where(np.abs(vector[n]) >= least, vector[n], 0))
        result[n] = np.float64(base[n]) + elect_and_merge(trimmed, scales)
    return result


def dare(base, tasks, scales, density, kept, *, elect):
    """Drop where `kept` is false, rescale by 1/density, then add up or elect. `kept[t][n]` are masks."""
    result = {}
    for n in base:
        changes = [np.where(kept[t][n], v[n], 0) / density for t, v in enumerate(deltas(base, tasks))]
        merged = elect_and_merge(changes, scales) if elect else sum(s * c for s, c in zip(scales, changes, strict=True))
        result[n] = np.float64(base[n]) + merged
    return result


def slerp(one, other, t, scope="tensor"):
    """Along the arc between the directions, applied to the vectors themselves."""
    result = {}
    for n in one:
        a, b = (flat(one), flat(other)) if scope == "model" else (np.ravel(np.float64(x[n])) for x in (one, other))
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        first, second = 1 - t, t
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        result[n] = first * np.float64(one[n]) + second * np.float64(other[n])
    return result


def fisher(means, fishers, scales, floor):
    """Fishers per observation, each divided by its norm over the whole model, the first floored before."""
    norms = [np.linalg.norm(flat(f)) for f in fishers]
    result = {}
    for n in means[0]:
        weights = []
        for t, (f, norm) in enumerate(zip(fishers, norms, strict=True)):
            own = np.maximum(np.float64(f[n]), floor) if t == 0 else np.float64(f[n])
            weights.append(scales[t] * own / norm)
        total = sum(weights)
        result[n] = sum(w * np.float64(m[n]) for w, m in zip(weights, means, strict=True)) / total
    return result
