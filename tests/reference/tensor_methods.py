"""Rules for whole tensors, written from their sources in float64, with loops over entries.

Each is `(base, tasks, weights, settings) -> array`; `TENSOR_TWINS` has one for every name.
"""

import itertools
import math

import numpy as np


def flat(array):
    """The entries as a list of Python floats."""
    return [float(x) for x in np.asarray(array, np.float64).reshape(-1)]


def dot(one, other):
    """The product of two lists."""
    return math.fsum(x * y for x, y in zip(one, other, strict=True))


def norm(one):
    """The length of a list."""
    return math.sqrt(dot(one, one))


def added(lists, factors):
    """The sum of lists, each times a factor."""
    return [
        math.fsum(f * x for f, x in zip(factors, xs, strict=True))
        for xs in zip(*lists, strict=True)
    ]


def change(task, base):
    """What a task changed of the base."""
    return [x - y for x, y in zip(task, base, strict=True)]


def shares(weights):
    """Weights over their sum."""
    return [w / math.fsum(weights) for w in weights]


def along_arc(one, other, t, line):
    """The point on the arc between two vectors; on the line beyond the absolute cosine `line`."""
    lengths = norm(one) * norm(other)
    cosine = max(-1.0, min(1.0, dot(one, other) / lengths)) if lengths > 0 else 0.0
    if abs(cosine) > line:
        return added([one, other], [1 - t, t])
    angle = math.acos(cosine)
    factors = [math.sin((1 - t) * angle), math.sin(t * angle)]
    return added([one, other], [f / math.sin(angle) for f in factors])


def linear(base, tasks, weights, settings):
    """The weighted sum, or average."""
    weights = shares(weights) if settings["normalize"] else weights
    return added([flat(t) for t in tasks], weights)


def slerp(base, tasks, weights, settings):
    """From the base to one model."""
    return along_arc(flat(base), flat(tasks[0]), settings["t"], 0.9995)


def passthrough(base, tasks, weights, settings):
    """One model, scaled."""
    return [settings["scale"] * x for x in flat(tasks[0])]


def nearswap(base, tasks, weights, settings):
    """By the weight min(1, t / |difference|)."""
    merged = []
    for x, y in zip(flat(base), flat(tasks[0]), strict=True):
        w = 1.0 if x == y else max(0.0, min(1.0, settings["t"] / abs(x - y)))
        merged.append(w * y + (1 - w) * x)
    return merged


def nuslerp(base, tasks, weights, settings):
    """Along the arc of two models or changes, or of each of their vectors."""
    t = 0.5 if abs(sum(weights)) < 1e-7 else weights[1] / sum(weights)
    one, other = (np.float64(m) if base is None else np.float64(m) - base for m in tasks)
    if settings["nuslerp_flatten"] or np.ndim(one) == 0:
        merged = np.reshape(along_arc(flat(one), flat(other), t, 1 - 1e-12), np.shape(one))
    else:
        axis = 0 if settings["nuslerp_row_wise"] else np.ndim(one) - 1
        merged = np.zeros(np.shape(one))
        for index in itertools.product(*(range(n) for i, n in enumerate(one.shape) if i != axis)):
            place = (*index[:axis], slice(None), *index[axis:])
            merged[place] = along_arc(flat(one[place]), flat(other[place]), t, 1 - 1e-12)
    return merged if base is None else base + merged


def multislerp(base, tasks, weights, settings):
    """Through the tangent space at the mean of directions, as mergekit's documentation says."""
    if len(tasks) == 1:
        return flat(tasks[0])
    weights = shares(weights) if settings["normalize_weights"] else weights
    vectors = [flat(t) if base is None else change(flat(t), flat(base)) for t in tasks]
    units = [[x / (norm(v) + settings["eps"]) for x in v] for v in vectors]
    mean = added(units, weights)
    if norm(mean) <= max(settings["eps"], 1e-6 * sum(abs(w) for w in weights)):
        merged = added(vectors, weights)
    else:
        mean = [x / norm(mean) for x in mean]
        tangents = [added([u, mean], [1, -dot(u, mean)]) for u in units]
        step = added(tangents, weights)
        size = norm(step)
        if size > 0:
            mean = added([mean, step], [math.cos(size), math.sin(size) / size])
        length = math.fsum(w * norm(v) for w, v in zip(weights, vectors, strict=True))
        merged = [length * x for x in mean]
    return merged if base is None else added([flat(base), merged], [1, 1])


def karcher(base, tasks, weights, settings):
    """By steps of exp and log in the space of the tensors themselves."""
    vectors, weights = [flat(t) for t in tasks], shares(weights)
    length = math.fsum(w * norm(v) for w, v in zip(weights, vectors, strict=True))
    voting = [(w, v) for w, v in zip(weights, vectors, strict=True) if w > 0 and norm(v) > 0]
    if not voting:
        return [0.0] * len(vectors[0])
    weights = shares([w for w, _ in voting])
    units = [[x / norm(v) for x in v] for _, v in voting]
    mean = added(units, weights)
    if norm(mean) < max(settings["tol"], 1e-7):
        mean = units[0]
    mean = [x / norm(mean) for x in mean]
    for _ in range(settings["max_iter"]):
        logs = []
        for unit in units:
            cosine = max(-1.0, min(1.0, dot(unit, mean)))
            rest = added([unit, mean], [1, -cosine])
            opposite = norm(rest) < 1e-6
            logs.append([0.0 if opposite else x * math.acos(cosine) / norm(rest) for x in rest])
        step = added(logs, weights)
        if norm(step) < settings["tol"] or norm(step) == 0:
            break
        mean = added([mean, step], [math.cos(norm(step)), math.sin(norm(step)) / norm(step)])
        mean = [x / norm(mean) for x in mean]
    return [length * x for x in mean]


def model_stock(base, tasks, weights, settings):
    """By the mean of the cosines of all pairs, of a tensor or of each of its vectors."""
    base, tasks = np.float64(base), [np.float64(t) for t in tasks]
    if settings["filter_wise"] and base.ndim > 1:
        merged = np.zeros(base.shape)
        for index in np.ndindex(base.shape[:-1]):
            merged[index] = _stock(flat(base[index]), [flat(t[index]) for t in tasks])
        return merged
    return _stock(flat(base), [flat(t) for t in tasks])


def _stock(base, tasks):
    cosines = []
    for one, other in itertools.combinations([change(t, base) for t in tasks], 2):
        lengths = norm(one) * norm(other)
        cosines.append(dot(one, other) / lengths if lengths > 0 else 0.0)
    cosine, count = math.fsum(cosines) / len(cosines), len(tasks)
    denominator = 1 + (count - 1) * cosine
    t = count * cosine / denominator if abs(denominator) >= 1e-6 else 0.0
    return added([base, *tasks], [1 - t] + [t / count] * count)


TENSOR_TWINS = {
    "karcher": karcher,
    "linear": linear,
    "model_stock": model_stock,
    "multislerp": multislerp,
    "nearswap": nearswap,
    "nuslerp": nuslerp,
    "passthrough": passthrough,
    "slerp": slerp,
}
