"""What mergekit's methods compute, restated in float64 for one tensor.

The restatements were written from mergekit's documentation and the papers it names, and fitted to
what mergekit 0.1.5 does with small tensors. They share no code with the package, whose rules they
judge. A rule returns the merged tensor and which of its entries another rounding may choose
otherwise: those whose change lies within one rounding of the threshold of a selection, or whose
sum of changes lies within one rounding of zero where a sign is elected.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

COLLINEAR = 0.9995  # cosine from which on slerp interpolates linearly
SPREADS = 1.5  # interquartile ranges above the median from which on arcee fusion takes a change


class Inputs(NamedTuple):
    """One tensor of all models.

    Attributes:
        base: That of the base model; None without one.
        models: Those of the other models.
        settings: The method's; those of single models are lists.
        unit: Relative rounding of the dtype in which mergekit works, such as 2^-24.
        kept: Of a method that drops entries at random: those that it kept, a model each.
    """

    base: Array | None
    models: list[Array]
    settings: Mapping[str, Any]
    unit: float = 2.0**-24
    kept: list[Mask] | None = None

    @property
    def changes(self) -> list[Array]:
        """The task vectors."""
        assert self.base is not None
        return [model - self.base for model in self.models]

    def numbers(self, name: str, default: float) -> list[float]:
        """One number for each model."""
        value = self.settings.get(name, default)
        return (
            [float(v) for v in value]
            if isinstance(value, list)
            else [float(value)] * len(self.models)
        )

    def number(self, name: str, default: float) -> float:
        """One number for all models."""
        value = self.settings.get(name, default)
        return float(value[0] if isinstance(value, list) else value)


Restated: TypeAlias = tuple[Array, Mask]
Rule: TypeAlias = Callable[[Inputs], Restated]


def certain(merged: Array) -> Restated:
    """A tensor that depends on no selection."""
    return merged, np.zeros(merged.shape, bool)


def linear(x: Inputs) -> Restated:
    """sum w m, over sum w if `normalize`."""
    weights = x.numbers("weight", 1)
    total = sum(weights) if x.settings.get("normalize", True) else 1.0
    return certain(sum(w * t for w, t in zip(weights, x.models, strict=True)) / total)


def _arc(t: float, a: Array, b: Array, collinear: float = 1.0) -> Array:
    """The spherical interpolation of two tensors, whose lengths are kept as they are."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.sum(a * b) / lengths) if lengths else 0.0
    if abs(cosine) > collinear or abs(cosine) >= 1 - 1e-12:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


def slerp(x: Inputs) -> Restated:
    """From the base to the other model; linear where they are nearly collinear."""
    assert x.base is not None
    return certain(_arc(x.number("t", 0), x.base, x.models[0], COLLINEAR))


def nuslerp(x: Inputs) -> Restated:
    """Between two models, or their task vectors; a whole tensor, a row or a column at a time."""
    a, b = x.models if x.base is None else x.changes
    first, second = x.numbers("weight", 1)
    t = second / (first + second) if first + second else 0.5
    if x.settings.get("nuslerp_flatten", True) or a.ndim < 2:
        merged = _arc(t, a, b)
    else:
        axis = -1 if x.settings.get("nuslerp_row_wise", False) else 0
        pairs = zip(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), strict=True)
        merged = np.moveaxis(np.stack([_arc(t, u, v) for u, v in pairs]), 0, axis)
    return certain(merged if x.base is None else x.base + merged)


def multislerp(x: Inputs) -> Restated:
    """The normalised mean of the directions, with the mean length."""
    tensors = x.models if x.base is None else x.changes
    weights = x.numbers("weight", 1)
    if x.settings.get("normalize_weights", True):
        weights = [w / sum(weights) for w in weights]
    lengths = [float(np.linalg.norm(t)) for t in tensors]
    mean = sum(w * t / n for w, t, n in zip(weights, tensors, lengths, strict=True))
    length = sum(w * n for w, n in zip(weights, lengths, strict=True))
    merged = mean / np.linalg.norm(mean) * length
    return certain(merged if x.base is None else x.base + merged)


def karcher(x: Inputs) -> Restated:
    """The Karcher mean of the directions, with the mean length."""
    lengths = [float(np.linalg.norm(t)) for t in x.models]
    units = [t / n for t, n in zip(x.models, lengths, strict=True)]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(int(x.number("max_iter", 10))):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = float(np.clip(np.sum(mean * unit), -1, 1))
            angle = np.arccos(cosine)
            if angle > 1e-8:
                tangent += angle / np.sin(angle) * (unit - cosine * mean) / len(units)
        step = float(np.linalg.norm(tangent))
        if step < x.number("tol", 1e-5):
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
    return certain(mean * (sum(lengths) / len(lengths)))


def _largest(sizes: Array, count: int, unit: float) -> tuple[Mask, Mask]:
    """The `count` largest entries, and those within a rounding of the threshold."""
    flat = sizes.ravel()
    chosen = np.zeros(flat.size, bool)
    if count <= 0 or count >= flat.size:
        chosen[:] = count > 0
        return chosen.reshape(sizes.shape), np.zeros(sizes.shape, bool)
    order = np.argsort(-flat, kind="stable")
    chosen[order[:count]] = True
    low, high = flat[order[count]], flat[order[count - 1]]
    slack = 2 * unit
    unsure = (flat >= low * (1 - slack)) & (flat <= high * (1 + slack)) & (flat > 0)
    # Where the two entries at the threshold are further apart, no rounding swaps them.
    unsure &= high * (1 - slack) <= low * (1 + slack)
    return chosen.reshape(sizes.shape), unsure.reshape(sizes.shape)


def _elected(changes: list[Array], weights: list[float], unit: float) -> tuple[list[Mask], Mask]:
    """Which weighted changes have the sign of their sum, plus if that is zero."""
    weighted = [w * c for w, c in zip(weights, changes, strict=True)]
    total = sum(weighted)
    size = sum(np.abs(w) for w in weighted)
    sign = np.where(np.asarray(total) >= 0, 1.0, -1.0)
    agreeing = [np.sign(w) == sign for w in weighted]
    unsure = (np.abs(total) <= 2 * len(changes) * unit * size) & (size > 0)
    return agreeing, np.asarray(unsure)


def _add(x: Inputs, changes: list[Array], elect: bool, normalize: bool, unsure: Mask) -> Restated:
    """The base plus `lambda` times the changes, of which only those that agree if `elect`."""
    assert x.base is not None
    weights = x.numbers("weight", 1)
    agreeing = [np.ones(x.base.shape, bool)] * len(changes)
    if elect:
        agreeing, contested = _elected(changes, weights, x.unit)
        unsure = unsure | contested
    total = sum(w * c * m for w, c, m in zip(weights, changes, agreeing, strict=True))
    if x.settings.get("normalize", normalize):
        divisor = np.asarray(sum(w * m for w, m in zip(weights, agreeing, strict=True)))
        total = total / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    return x.base + x.number("lambda", 1) * total, unsure


def task_arithmetic(x: Inputs) -> Restated:
    """The base plus the weighted task vectors."""
    return _add(x, x.changes, False, False, np.zeros(x.models[0].shape, bool))


def ties(x: Inputs) -> Restated:
    """The int(density n) largest entries of task vectors, at least one; weighted signs elected."""
    changes, unsure = [], np.zeros(x.models[0].shape, bool)
    for change, density in zip(x.changes, x.numbers("density", 1), strict=True):
        count = max(int(density * change.size), int(density > 0))
        chosen, close = _largest(np.abs(change), count, x.unit)
        changes.append(change * chosen)
        unsure |= close
    return _add(x, changes, True, True, unsure)


def _breadcrumbs(x: Inputs, elect: bool) -> Restated:
    """Task vectors without their largest and smallest entries."""
    changes, unsure = [], np.zeros(x.models[0].shape, bool)
    settings = zip(x.changes, x.numbers("density", 1), x.numbers("gamma", 0.01), strict=True)
    for change, density, gamma in settings:
        kept = int(density * change.size)
        top = min(int(gamma * change.size), change.size - kept)
        most, close = _largest(np.abs(change), kept + top, x.unit)
        removed, close_too = _largest(np.abs(change), top, x.unit)
        changes.append(change * (most & ~removed))
        unsure |= close | close_too
    return _add(x, changes, elect, False, unsure)


def _dropped(x: Inputs, elect: bool, normalize: bool = False) -> Restated:
    """Task vectors without the entries that were dropped, with the sum of sizes that they had."""
    assert x.kept is not None
    changes = []
    for change, kept in zip(x.changes, x.kept, strict=True):
        rest = np.abs(change * kept).sum()
        scale = np.abs(change).sum() / rest if rest and x.settings.get("rescale", True) else 1.0
        changes.append(change * kept * scale)
    return _add(x, changes, elect, normalize, np.zeros(x.models[0].shape, bool))


def sce(x: Inputs) -> Restated:
    """Positions of high variance, weights by mean squares, signs elected by the plain sum."""
    changes, unsure = x.changes, np.zeros(x.models[0].shape, bool)
    share = x.number("select_topk", 1)
    if share < 1:
        variance = np.var(np.stack(changes), axis=0)
        count = int(share * np.count_nonzero(variance))
        chosen, unsure = _largest(variance, count, 8 * x.unit)
        changes = [c * chosen for c in changes]
    squares = [float(np.mean(c**2)) for c in changes]
    weights = [s / sum(squares) if sum(squares) else 1 / len(squares) for s in squares]
    agreeing, contested = _elected(changes, [1.0] * len(changes), x.unit)
    total = sum(w * c * m for w, c, m in zip(weights, changes, agreeing, strict=True))
    divisor = np.asarray(sum(w * m for w, m in zip(weights, agreeing, strict=True)))
    assert x.base is not None
    merged = x.base + total / np.where(divisor < 1e-8, 1.0, divisor)
    return merged, unsure | contested


def model_stock(x: Inputs) -> Restated:
    """Between the base and the mean of the models, by the mean cosine of the task vectors."""
    assert x.base is not None
    by_row = bool(x.settings.get("filter_wise", False)) and x.base.ndim > 1
    shape = (x.base.shape[0], -1) if by_row else (1, -1)
    changes = [c.reshape(shape) for c in x.changes]
    cosines = []
    for i, one in enumerate(changes):
        for other in changes[:i]:
            lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            products = np.sum(one * other, axis=1)
            cosines.append(products / np.where(lengths > 0, lengths, 1.0))
    cosine, n = sum(cosines) / len(cosines), len(changes)
    t = n * cosine / (1 + (n - 1) * cosine)
    mean = sum(changes) / n
    return certain(x.base + (t[:, None] * mean).reshape(x.base.shape))


def nearswap(x: Inputs) -> Restated:
    """Towards the other model by t over the distance of an entry, at most 1."""
    assert x.base is not None
    (change,) = x.changes
    far = np.abs(change)
    share = np.where(far > 0, x.number("t", 0) / np.where(far > 0, far, 1.0), 1.0)
    return certain(x.base + np.minimum(share, 1.0) * change)


def arcee_fusion(x: Inputs) -> Restated:
    """The other model's entries of high importance: change times divergence of the softmaxes."""
    assert x.base is not None
    new, old = _log_softmax(x.models[0]), _log_softmax(x.base)
    divergence = np.sum(np.exp(new) * (new - old), axis=-1, keepdims=True)
    importance = np.abs(x.models[0] - x.base) * divergence
    flat = np.sort(importance.ravel())
    first, middle, third = (flat[int(p * (flat.size - 1))] for p in (0.25, 0.5, 0.75))
    threshold = middle + SPREADS * (third - first)
    # The divergence is a sum of small differences, which loses digits.
    slack = 16384 * x.unit * (np.abs(importance) + threshold)
    unsure = np.abs(importance - threshold) <= slack
    return np.where(importance > threshold, x.models[0], x.base), unsure


def _log_softmax(tensor: Array) -> Array:
    shifted = tensor - tensor.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def passthrough(x: Inputs) -> Restated:
    """The one model, times `scale`."""
    return certain(x.models[0] * x.number("scale", 1))


RULES: dict[str, Rule] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": lambda x: _dropped(x, False),
    "dare_ties": lambda x: _dropped(x, True),
    "della_linear": lambda x: _dropped(x, False),
    "della": lambda x: _dropped(x, True, True),
    "breadcrumbs": lambda x: _breadcrumbs(x, False),
    "breadcrumbs_ties": lambda x: _breadcrumbs(x, True),
    "sce": sce,
    "model_stock": model_stock,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": passthrough,
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
