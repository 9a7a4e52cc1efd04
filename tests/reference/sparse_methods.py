"""Sparse task vectors over one tensor, in float64, by loops over entries and sorts.

A tensor is an array; everything else is lists of floats. `RECIPES` has mergekit's rules, `PAPERS`
those that `bmerge merge --method` names. Each takes a `Problem`.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """One tensor of a merge; settings of a task are lists, `draws` has an array for each task."""

    base: Any
    tasks: list
    weights: list
    settings: dict
    draws: list


def merged(rule, problem):
    """The merged tensor."""
    found = rule(problem)
    return np.array(found, np.float64).reshape(np.shape(problem.base))


def _entries(array):
    return [float(x) for x in np.ravel(array)]


def _changes(p):
    base = _entries(p.base)
    return [[m - b for m, b in zip(_entries(t), base, strict=True)] for t in p.tasks]


def _setting(p, name, t):
    value = p.settings[name]
    return value[t] if isinstance(value, list | tuple) else value


def _largest_first(values):
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _rows(p):
    """Lists of the entries' places, one list for each row."""
    shape = np.shape(p.base) or (1,)
    length = shape[-1]
    return [list(range(i, i + length)) for i in range(0, math.prod(shape), length)]


def _ranks(p, change):
    """Of each entry: its rank in its row, 0 for the smallest, and the length of the row."""
    found = [None] * len(change)
    for row in _rows(p):
        for rank, place in enumerate(sorted(row, key=lambda i: (abs(change[i]), i))):
            found[place] = (rank, len(row))
    return found


def _only(change, places):
    return [x if i in places else 0.0 for i, x in enumerate(change)]


def _l1(p, change, sparse):
    if not p.settings.get("rescale"):
        return sparse
    kept = sum(abs(x) for x in sparse)
    return [x * sum(abs(y) for y in change) / kept for x in sparse] if kept else sparse


# Ways of dropping: the sparse change of task t.


def _all(p, t):
    return _changes(p)[t]


def _trim(p, t):
    change, density = _changes(p)[t], _setting(p, "density", t)
    count = int(density * len(change))
    if density > 0 and count == 0:
        count = 1
    order = _largest_first([abs(x) for x in change])
    return _l1(p, change, _only(change, set(order[:count])))


def _drop(p, t):
    change, density = _changes(p)[t], _setting(p, "density", t)
    draws = _entries(p.draws[t])
    kept = {i for i, u in enumerate(draws) if u < density}
    return _l1(p, change, _only(change, kept))


def _drop_by_rank(p, t):
    change, density = _changes(p)[t], _setting(p, "density", t)
    epsilon, draws = _setting(p, "epsilon", t), _entries(p.draws[t])
    if density >= 1:
        return change
    if density <= 0:
        return [0.0] * len(change)
    kept = set()
    for i, (rank, n) in enumerate(_ranks(p, change)):
        keep = density if n == 1 else density - epsilon + 2 * epsilon * rank / (n - 1)
        if draws[i] < keep:
            kept.add(i)
    return _l1(p, change, _only(change, kept))


def _magprune(p, t):
    change, draws = _changes(p)[t], _entries(p.draws[t])
    density, epsilon = p.settings["density"], p.settings["epsilon"]
    result = []
    for x, u, (rank, n) in zip(change, draws, _ranks(p, change), strict=True):
        # The largest of a row has the least probability of being dropped, in steps of epsilon / n.
        drop = (1 - density) - epsilon / 2 + epsilon / n * (n - 1 - rank + 0.5)
        result.append(x / (1 - drop) if u < 1 - drop else 0.0)
    return result


def _breadcrumbs(p, t):
    change = _changes(p)[t]
    n, density, gamma = len(change), _setting(p, "density", t), _setting(p, "gamma", t)
    kept = int(density * n)
    outliers = min(int(gamma * n), n - kept)
    order = _largest_first([abs(x) for x in change])
    return _l1(p, change, _only(change, set(order[outliers : outliers + kept])))


# Ways of adding.


def _weighed(p, drop):
    """mergekit's sum: weights, divided by their sum if `normalize`, times lambda."""
    sparse = [drop(p, t) for t in range(len(p.tasks))]
    divisor = math.fsum(p.weights) if p.settings["normalize"] else 1.0
    divisor = divisor if abs(divisor) >= 1e-8 else 1.0
    return [
        b
        + p.settings["lambda"]
        * math.fsum(w * d[i] for w, d in zip(p.weights, sparse, strict=True))
        / divisor
        for i, b in enumerate(_entries(p.base))
    ]


def _elected(p, drop):
    """mergekit's election: by weighed changes, zero counting as positive."""
    sparse = [drop(p, t) for t in range(len(p.tasks))]
    result = []
    for i, b in enumerate(_entries(p.base)):
        votes = [(w, w * d[i]) for w, d in zip(p.weights, sparse, strict=True)]
        sign = 1 if math.fsum(x for _, x in votes) >= 0 else -1
        agreeing = [(w, x) for w, x in votes if x * sign > 0]
        move = math.fsum(x for _, x in agreeing)
        divisor = math.fsum(w for w, _ in agreeing)
        if p.settings["normalize"] and divisor:
            move /= divisor
        result.append(b + p.settings["lambda"] * move)
    return result


def _scaled(p, drop):
    sparse = [drop(p, t) for t in range(len(p.tasks))]
    return [
        b + math.fsum(w * d[i] for w, d in zip(p.weights, sparse, strict=True))
        for i, b in enumerate(_entries(p.base))
    ]


def _majority(p, drop):
    """The published election: by unweighed changes, of the tasks whose scale is not zero."""
    sparse = [drop(p, t) for t in range(len(p.tasks))]
    result = []
    for i, b in enumerate(_entries(p.base)):
        votes = [(w, d[i]) for w, d in zip(p.weights, sparse, strict=True) if w]
        total = math.fsum(x for _, x in votes)
        agreeing = [w * x for w, x in votes if (x > 0 and total > 0) or (x < 0 and total < 0)]
        result.append(b + math.fsum(agreeing) / max(1, len(agreeing)))
    return result


def sce(p):
    """Select by variance, weigh by mean squares, erase minorities, and average."""
    changes, scales = (
        [d for d, w in zip(_changes(p), p.weights, strict=True) if w],
        [w for w in p.weights if w],
    )
    n, share = len(_entries(p.base)), p.settings["select_topk"]
    if share < 1 and changes:
        columns = [[d[i] for d in changes] for i in range(n)]
        means = [math.fsum(c) / len(c) for c in columns]
        variances = [
            0.0 if len(set(c)) == 1 else math.fsum((x - m) ** 2 for x in c) / len(c)
            for c, m in zip(columns, means, strict=True)
        ]
        differing = sum(v > 0 for v in variances)
        count = int(round(share * differing, 4))
        chosen = set(_largest_first(variances)[:count])
        changes = [_only(d, chosen) for d in changes]
    squares = [math.fsum(x * x for x in d) / n for d in changes]
    result = []
    for i, b in enumerate(_entries(p.base)):
        sign = 1 if math.fsum(d[i] for d in changes) >= 0 else -1
        agree = [t for t, d in enumerate(changes) if d[i] * sign > 0]
        total = math.fsum(squares[t] for t in agree)
        move = math.fsum(scales[t] * squares[t] * changes[t][i] for t in agree)
        result.append(b + (move / total if total else 0.0))
    return result


def arcee_fusion(p):
    """Importance by row divergence, quartiles by sorting."""
    base, other = _entries(p.base), _entries(p.tasks[0])
    importance = [0.0] * len(base)
    for row in _rows(p):
        first = math.fsum(math.exp(base[i]) for i in row)
        second = math.fsum(math.exp(other[i]) for i in row)
        pairs = [(math.exp(base[i]) / first, math.exp(other[i]) / second) for i in row]
        divergence = math.fsum(q * math.log(q / p_) for p_, q in pairs)
        for i in row:
            importance[i] = abs(other[i] - base[i]) * divergence
    ordered = sorted(importance)
    quartiles = [ordered[(len(ordered) - 1) * k // 4] for k in (1, 2, 3)]
    threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])
    pairs = zip(base, other, importance, strict=True)
    return [b + p.weights[0] * (m - b) if x >= threshold else b for b, m, x in pairs]


RECIPES = {
    "task_arithmetic": lambda p: _weighed(p, _all),
    "ties": lambda p: _elected(p, _trim),
    "dare_linear": lambda p: _weighed(p, _drop),
    "dare_ties": lambda p: _elected(p, _drop),
    "della": lambda p: _elected(p, _drop_by_rank),
    "della_linear": lambda p: _weighed(p, _drop_by_rank),
    "breadcrumbs": lambda p: _weighed(p, _breadcrumbs),
    "breadcrumbs_ties": lambda p: _elected(p, _breadcrumbs),
    "sce": sce,
    "arcee_fusion": arcee_fusion,
}
PAPERS = {
    "della": lambda p: _majority(p, _magprune),
    "della_linear": lambda p: _scaled(p, _magprune),
    "breadcrumbs": lambda p: _scaled(p, _breadcrumbs),
    "breadcrumbs_ties": lambda p: _majority(p, _breadcrumbs),
    "sce": sce,
    "arcee_fusion": arcee_fusion,
}
