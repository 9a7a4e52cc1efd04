"""Which entries of a task vector stay: the largest, those in the middle, or what is drawn.

The functions at the end are the ways of dropping that methods share: `trimmed` (TIES), `dropped`
(DARE), `drawn_by_rank` and `magprune` (DELLA), and `without_outliers` (Model Breadcrumbs). Each
makes the sparse task vector of one task.

Where entries are equal, the first in memory counts as the larger one for the largest and for those
in the middle, and as the smaller one for ranks, so that a merge is the same on every machine.
mergekit leaves this to its library's sort, whose order of equal entries is not stated.
"""

from collections.abc import Mapping

import numpy as np

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods.base import FactInputs, Parameter
from mergekit_bayes.methods.tensors import Array, Setting, Tensors

_BLOCK = 1 << 22  # entries that are ranked at a time: a sort takes five times their memory

_AS_THEY_ARE: Mapping[str, Setting] = {}

DENSITY = Parameter("density", 1.0, "share of each task vector that is kept", 0, 1)
SEED = Parameter("seed", 0, "of the random numbers, a whole number", 0, 2**53)
DELLA_PARAMETERS = (
    Parameter("density", 0.7, "mean share of each row that is kept", 1e-6, 1),
    Parameter(
        "epsilon", 0.14, "range of the probabilities of being kept, around the density", 0, 1
    ),
    SEED,
)
BREADCRUMBS_PARAMETERS = (
    Parameter("density", 0.1, "share of each tensor's changes that is kept", 0, 1),
    Parameter("gamma", 0.01, "share of them that is dropped as the largest", 0, 1),
)


def largest(values: Array, count: int) -> Array:
    """Where the `count` largest of some numbers are.

    Zeros are left out where the `count` reaches them: whether an entry of zero is kept changes
    nothing.

    Args:
        values: Non-negative, of any shape.
        count: How many; less than 1 takes none.

    Returns:
        Booleans in the same shape.
    """
    flat = values.reshape(-1)
    if count >= flat.size:
        return np.ones(values.shape, bool)
    if count <= 0:
        return np.zeros(values.shape, bool)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    kept: Array = flat > threshold
    if threshold > 0:
        equal = np.flatnonzero(flat == threshold)
        kept[equal[: count - np.count_nonzero(kept)]] = True
    return kept.reshape(values.shape)


def middle(values: Array, count: int, above: int) -> Array:
    """Where the `count` numbers are that come after the `above` largest ones.

    Args:
        values: Non-negative, of any shape.
        count: How many.
        above: How many larger ones are left out.

    Returns:
        Booleans in the same shape.
    """
    return largest(values, count + above) & ~largest(values, above)


def rank_probabilities(change: Array, lowest: float, step: float) -> Array:
    """A probability for each entry by the rank of its magnitude in its row.

        p = lowest + step r,  r = 0 for the smallest of a row, 1 for the next, ...

    Args:
        change: (..., n): rows along the last axis; one row of one entry without axes.
        lowest: That of the smallest entry, dimensionless.
        step: From one rank to the next.

    Returns:
        In the shape of `change`, in its dtype.
    """
    rows = change.reshape(-1, change.shape[-1] if change.ndim else 1)
    result = np.empty_like(rows)
    ranked = lowest + step * np.arange(rows.shape[1])
    height = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), height):
        order = np.argsort(np.abs(rows[start : start + height]), axis=1, kind="stable")
        np.put_along_axis(result[start : start + height], order, ranked[None], axis=1)
    return result.reshape(change.shape)


def change_of(tensors: Tensors, task: int) -> Array:
    """What a task changed of the base."""
    assert tensors.base is not None
    return np.asarray(tensors.tasks[task] - tensors.base)


def thinned(change: Array, kept: Array, settings: Mapping[str, Setting] = _AS_THEY_ARE) -> Array:
    """A change with the entries that are kept, at the size that it had where `rescale` asks so.

    It is changed in place.

        d' = d [kept] sum |d| / sum |d [kept]|

    The sums are over the whole tensor, in float64. This is mergekit's rescaling. DARE and DELLA
    divide each entry by the probability that it is kept, which makes d' right on average; here d'
    has the L1 norm of d in every draw. Where all entries are kept alike, as by DARE, that is right
    on average in large tensors; where large ones are kept more often, as by DELLA, they come out
    larger than they were, and small ones smaller. A tensor of which no entry is kept does not
    change.

    Args:
        change: What a task changed.
        kept: Booleans of its shape.
        settings: With `rescale`, where it is one of them.
    """
    rescales = bool(settings.get("rescale"))
    before = _l1_norm(change) if rescales else 0.0
    np.copyto(change, 0, where=~kept)
    after = _l1_norm(change) if rescales else 0.0
    if after > 0:
        change *= before / after
    return change


def _l1_norm(change: Array) -> float:
    return float(np.abs(change).sum(dtype=np.float64))


def trimmed(tensors: Tensors, task: int) -> Array:
    """The largest entries of a task vector: those whose magnitude is among the first `density`.

    Of n entries int(density n) stay, and at least one where the density is not zero.

    Args:
        tensors: The whole tensor, with the settings `density` and `rescale`.
        task: Which task.
    """
    change, density = change_of(tensors, task), tensors.number("density", task)
    count = max(int(density * change.size), int(density > 0))
    return thinned(change, largest(np.abs(change), count), tensors.settings)


def dropped(tensors: Tensors, task: int) -> Array:
    """The entries of a task vector whose draw is below `density`.

    Args:
        tensors: The whole tensor, with draws and the settings `density` and `rescale`.
        task: Which task.
    """
    assert tensors.draws is not None
    kept = np.asarray(tensors.draws(task) < tensors.number("density", task))
    return thinned(change_of(tensors, task), kept, tensors.settings)


def drawn_by_rank(tensors: Tensors, task: int) -> Array:
    """A draw of the entries of a task vector, likelier for larger ones of a row, as in mergekit.

        [draw < density - epsilon + 2 epsilon r / (n - 1)],  r = 0, ..., n - 1 by magnitude

    Rows run along the last axis, and have n entries; the only entry of a row is kept with
    probability `density`, where mergekit fails. At a density of 0 or 1 all are dropped or kept,
    whatever epsilon is.

    Args:
        tensors: The whole tensor, with draws and the settings `density`, `epsilon`, `rescale`.
        task: Which task.

    Raises:
        ArithmeticError: Probabilities that are not between 0 and 1.
    """
    assert tensors.draws is not None
    density = tensors.number("density", task)
    if not 0 < density < 1:
        change = change_of(tensors, task)
        return change if density >= 1 else np.zeros_like(change)
    epsilon = tensors.number("epsilon", task)
    _refuse_window(density, epsilon, "epsilon")
    draws = tensors.draws(task)  # first, as it takes the most memory while it is made
    change = change_of(tensors, task)
    columns = change.shape[-1] if change.ndim else 1
    low, step = density - epsilon, 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    probabilities = rank_probabilities(change, low if columns > 1 else density, step)
    return thinned(change, np.asarray(draws < probabilities), tensors.settings)


def magprune(tensors: Tensors, task: int) -> Array:
    """MagPrune (Deep et al., 2024): entries drawn by rank in their row, divided by probability.

        q  = density + epsilon ((r + 1/2) / n - 1/2),  r = 0, ..., n - 1 by magnitude
        d' = d [draw < q] / q

    q is one minus the probability of dropping, over a window of width `epsilon` with `density` as
    its mean. Each d' is right on average.

    Args:
        tensors: The whole tensor, with draws and the settings `density` and `epsilon`.
        task: Which task.

    Raises:
        ArithmeticError: Probabilities that are not between 0 and 1.
    """
    assert tensors.draws is not None
    density, epsilon = tensors.number("density", task), tensors.number("epsilon", task)
    _refuse_window(density, epsilon / 2, "epsilon / 2")
    draws, change = tensors.draws(task), change_of(tensors, task)
    columns = change.shape[-1] if change.ndim else 1
    step = epsilon / max(1, columns)
    probabilities = rank_probabilities(change, density - epsilon / 2 + step / 2, step)
    change /= probabilities
    return thinned(change, np.asarray(draws < probabilities))


def refused_window(inputs: FactInputs) -> None:
    """Refuse settings of MagPrune that give no probabilities, before anything is read.

    Raises:
        ConfigError: They do not.
    """
    density, epsilon = (float(inputs.settings[name]) for name in ("density", "epsilon"))
    try:
        _refuse_window(density, epsilon / 2, "epsilon / 2")
    except ArithmeticError as error:
        raise ConfigError(f"--param epsilon={epsilon:g}: {error}.") from None


def _refuse_window(density: float, half: float, what: str) -> None:
    if not (density - half > 0 and density + half <= 1):
        raise ArithmeticError(
            f"entries cannot be kept with probabilities from {density - half:.6g} to "
            f"{density + half:.6g}: expected density - {what} > 0 and density + {what} <= 1. "
            "Take a smaller epsilon, or another density"
        )


def without_outliers(tensors: Tensors, task: int) -> Array:
    """The entries of a task vector in the middle: neither the largest nor the smallest ones.

    Of n entries, min(int(gamma n), n - int(density n)) largest go, and of the others the
    int(density n) largest stay.

    Args:
        tensors: The whole tensor, with the settings `density` and `gamma`, and perhaps `rescale`.
        task: Which task.
    """
    change = change_of(tensors, task)
    count = int(tensors.number("density", task) * change.size)
    above = min(int(tensors.number("gamma", task) * change.size), change.size - count)
    return thinned(change, middle(np.abs(change), count, above), tensors.settings)
