"""Merging rules over whole models, written from the papers in float64, with sorts and loops.

A model is a dictionary of arrays, and so is its precision. `TWINS` has one rule for every method.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from tests.reference import merging


class Problem(NamedTuple):
    """What a rule may need of a merge; `kept[t][n]` are the masks of entries that DARE keeps."""

    base: dict
    tasks: list[dict]
    scales: tuple[float, ...]
    base_precision: dict
    precisions: list[dict]
    guard: float
    settings: dict[str, Any]
    kept: list[dict]


def average(tasks, scales):
    """The weighted mean of the weights."""
    total = sum(scales)
    return {
        n: sum(s * np.float64(t[n]) for s, t in zip(scales, tasks, strict=True)) / total
        for n in tasks[0]
    }


def precision_average(tasks, precisions, scales):
    """The mean of the weights, each entry by its scaled precision."""
    result = {}
    for n in tasks[0]:
        shares = [s * np.float64(p[n]) for s, p in zip(scales, precisions, strict=True)]
        weighed = sum(w * np.float64(t[n]) for w, t in zip(shares, tasks, strict=True))
        result[n] = weighed / sum(shares)
    return result


def task_arithmetic(base, tasks, scales):
    """The base plus scaled task vectors."""
    moves = deltas(base, tasks)
    return {
        n: np.float64(base[n]) + sum(s * v[n] for s, v in zip(scales, moves, strict=True))
        for n in base
    }


def gradient_matching(base, tasks, scales, base_precision, precisions, guard):
    """A sum of natural parameters; where the guard acts, its precision divides the same move."""
    result = {}
    for n in base:
        m0, s0 = np.float64(base[n]), np.float64(base_precision[n])
        posteriors = [(p[n], t[n]) for p, t in zip(precisions, tasks, strict=True)]
        mean, precision = merging.natural_sum((s0, m0), posteriors, scales)
        gains = [s * (np.float64(p) - s0) for s, (p, _) in zip(scales, posteriors, strict=True)]
        guarded = np.maximum(precision, guard * (s0 + sum(abs(g) for g in gains)))
        result[n] = m0 + precision * (mean - m0) / guarded
    return result


def fisher_negation(base, tasks, scales, base_precision, precisions):
    """Each task vector times F_forget / (F_forget + F_retain); the base's precision is F_retain."""
    result = {n: np.array(base[n], np.float64) for n in base}
    for scale, vector, precision in zip(scales, deltas(base, tasks), precisions, strict=True):
        for n in base:
            retain = np.float64(base_precision[n])
            forget = np.clip(np.float64(precision[n]) - retain, 0, None)
            result[n] += scale * vector[n] * forget / (forget + retain)
    return result


def deltas(base, tasks):
    """Task vectors."""
    return [{n: np.float64(t[n]) - np.float64(base[n]) for n in base} for t in tasks]


def flat(tensors):
    """All entries of a model as one vector."""
    return np.concatenate([np.ravel(np.float64(tensors[n])) for n in sorted(tensors)])


def top(values, density):
    """The smallest magnitude among the share `density` of largest ones."""
    count = round(density * values.size)
    return np.inf if count == 0 else np.sort(np.abs(values))[-count]


def elect_and_merge(changes, scales):
    """The mean of the scaled changes whose sign is that of the sum; zero where none agrees."""
    sign = np.sign(sum(changes))
    merged = np.zeros_like(changes[0])
    count = np.zeros_like(changes[0])
    for change, scale in zip(changes, scales, strict=True):
        agrees = (np.sign(change) == sign) & (change != 0)
        merged += np.where(agrees, scale * change, 0)
        count += agrees
    return merged / np.maximum(count, 1)


def ties(base, tasks, scales, density, scope="model"):
    """Trim the task's whole vector (or each tensor), elect, and take the disjoint mean."""
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
    """Drop where `kept` is false, rescale by 1/density, then add up or elect."""
    result = {}
    for n in base:
        moves = enumerate(deltas(base, tasks))
        changes = [np.where(kept[t][n], v[n], 0) / density for t, v in moves]
        added = sum(s * c for s, c in zip(scales, changes, strict=True))
        merged = elect_and_merge(changes, scales) if elect else added
        result[n] = np.float64(base[n]) + merged
    return result


def slerp(one, other, t, scope="tensor"):
    """Along the arc between the directions, applied to the vectors themselves."""
    result = {}
    for n in one:
        tensors = (np.ravel(np.float64(x[n])) for x in (one, other))
        a, b = (flat(one), flat(other)) if scope == "model" else tensors
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        first, second = 1 - t, t
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            first = math.sin((1 - t) * angle) / math.sin(angle)
            second = math.sin(t * angle) / math.sin(angle)
        result[n] = first * np.float64(one[n]) + second * np.float64(other[n])
    return result


def fisher(means, fishers, scales, floor):
    """Fishers over their norms over the whole model, the first one floored."""
    norms = [np.linalg.norm(flat(f)) for f in fishers]
    result = {}
    for n in means[0]:
        weights = []
        for t, (f, norm) in enumerate(zip(fishers, norms, strict=True)):
            floored = np.maximum(np.float64(f[n]), floor) if t == 0 else np.float64(f[n])
            weights.append(scales[t] * floored / norm)
        weighed = sum(w * np.float64(m[n]) for w, m in zip(weights, means, strict=True))
        result[n] = weighed / sum(weights)
    return result


def by_layer(base, tasks, scales, layers, rule):
    """`rule(task vectors, scales)` for the layers, the mean of the changes for all else."""
    result = {}
    for n in base:
        m0, of_tasks = np.float64(base[n]), [np.float64(t[n]) for t in tasks]
        if n in layers:
            result[n] = m0 + rule([t - m0 for t in of_tasks], scales)
        else:
            moves = [s * (t - m0) for s, t in zip(scales, of_tasks, strict=True)]
            result[n] = m0 + sum(moves) / sum(s != 0 for s in scales)
    return result


def whitened(columns):
    """`X (X' X)^(-1/2)`, which has orthonormal columns."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / np.sqrt(values)) @ vectors.T


def tsv_m(base, tasks, scales, layers=()):
    """The largest singular directions of each task vector, side by side and whitened."""

    def rule(moves, scales):
        share = min(moves[0].shape) // len(moves)
        left, values, right = [], [], []
        for move, scale in zip(moves, scales, strict=True):
            u, s, v = np.linalg.svd(move)
            left.append(np.sign(scale) * u[:, :share])
            values.extend(abs(scale) * s[:share])
            right.append(v[:share].T)
        left, right = whitened(np.hstack(left)), whitened(np.hstack(right))
        return sum(s * np.outer(left[:, i], right[:, i]) for i, s in enumerate(values))

    return by_layer(base, tasks, scales, layers, rule)


def iso_c(base, tasks, scales, layers=()):
    """The added task vectors D as `mean(singular values) (D D')^(-1/2) D`."""

    def rule(moves, scales):
        added = sum(s * v for s, v in zip(scales, moves, strict=True))
        is_tall = added.shape[0] > added.shape[1]
        added = added.T if is_tall else added
        squares, vectors = np.linalg.eigh(added @ added.T)
        values = np.sqrt(squares)
        flat = np.mean(values) * (vectors / values) @ vectors.T @ added
        return flat.T if is_tall else flat

    return by_layer(base, tasks, scales, layers, rule)


def consensus(base, tasks, scales, least, threshold):
    """Task arithmetic times the mask of entries in at least `least` of the tasks' TALL masks."""
    moves = deltas(base, tasks)
    result = {}
    for n in base:
        multi = sum(v[n] for v, s in zip(moves, scales, strict=True) if s)
        masks = [
            abs(v[n]) >= threshold * abs(multi - v[n])
            for v, s in zip(moves, scales, strict=True)
            if s
        ]
        kept = np.sum(masks, axis=0) >= least
        added = sum(s * v[n] for v, s in zip(moves, scales, strict=True))
        result[n] = np.float64(base[n]) + kept * added
    return result


def regmean(tasks, grams, scales, alpha, layers=()):
    """The solution of the normal equations for the layers, with `grams[t][n]`; else the average."""
    result = average(tasks, scales)
    for n in layers:
        left, right = 0, 0
        for task, gram, scale in zip(tasks, grams, scales, strict=True):
            tempered = np.float64(gram[n]).copy()
            tempered[~np.eye(len(tempered), dtype=bool)] *= alpha
            left, right = left + scale * tempered, right + scale * tempered @ np.float64(task[n]).T
        result[n] = (np.linalg.inv(left) @ right).T
    return result


def ace(base, tasks, scales, epsilon=0.01, threshold=0.3, share=0.3, layers=()):
    """Closed form with covariances of task vectors; `layers` of a rank above `share` of it."""

    def rule(moves, scales):
        sizes = [np.sum(v**2) for v in moves]
        logs = np.log(sizes)
        gamma = np.var(logs, ddof=1) / np.mean(logs) ** 2 if len(moves) > 1 else 0
        inputs = moves[0].shape[1]
        above, below, scaled = 0, 0, []
        for move, scale in zip(moves, scales, strict=True):
            rows = move - np.ones((len(move), 1)) * np.mean(move, axis=0)
            covariance = sum(np.outer(row, row) for row in rows)
            trace = np.trace(covariance) if gamma > threshold else 1
            scaled.append(covariance / trace)
            regular = scaled[-1] + epsilon / trace * np.eye(inputs)
            above, below = above + scale * rows @ regular, below + regular
        prior = np.ones((inputs, 1)) * np.sum(sum(scaled), axis=0) / inputs
        if gamma <= threshold:
            return above @ np.linalg.inv(below + prior)
        first = above @ np.linalg.inv(below + prior / np.mean(sizes))
        residual = sum(
            s * v @ (c - below / len(moves)) for s, v, c in zip(scales, moves, scaled, strict=True)
        )
        u, s, v = np.linalg.svd(first + residual)
        kept = int(share * len(s))
        return first + np.mean(s[:kept]) * sum(np.outer(u[:, i], v[i]) for i in range(kept))

    return by_layer(base, tasks, scales, layers, rule)


def _dare(p, *, elect):
    return dare(p.base, p.tasks, p.scales, p.settings["density"], p.kept, elect=elect)


TWINS = {
    "average": lambda p: average(p.tasks, p.scales),
    "precision_average": lambda p: precision_average(p.tasks, p.precisions, p.scales),
    "task_arithmetic": lambda p: task_arithmetic(p.base, p.tasks, p.scales),
    "gradient_matching": lambda p: gradient_matching(
        p.base, p.tasks, p.scales, p.base_precision, p.precisions, p.guard
    ),
    "fisher": lambda p: fisher(p.tasks, p.precisions, p.scales, p.settings["floor"]),
    "fisher_negation": lambda p: fisher_negation(
        p.base, p.tasks, p.scales, p.base_precision, p.precisions
    ),
    "ties": lambda p: ties(p.base, p.tasks, p.scales, p.settings["density"], p.settings["scope"]),
    "dare_linear": lambda p: _dare(p, elect=False),
    "dare_ties": lambda p: _dare(p, elect=True),
    "slerp": lambda p: slerp(*p.tasks, p.settings["t"], p.settings["scope"]),
    "ace": lambda p: ace(p.base, p.tasks, p.scales),
    "consensus": lambda p: consensus(
        p.base, p.tasks, p.scales, p.settings["k"], p.settings["lambda"]
    ),
    "iso_c": lambda p: iso_c(p.base, p.tasks, p.scales),
    "regmean": lambda p: regmean(p.tasks, p.precisions, p.scales, p.settings["alpha"]),
    "tsv_m": lambda p: tsv_m(p.base, p.tasks, p.scales),
}
