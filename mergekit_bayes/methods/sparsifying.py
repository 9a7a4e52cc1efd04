"""Which entries of a task vector stay: the largest, those in the middle, or what is drawn.

The functions at the end are the ways of dropping that methods share: `trimmed` (TIES), `dropped`
(DARE), `drawn_by_rank` and `magprune` (DELLA), and `without_outliers` (Model Breadcrumbs). Each
makes the sparse task vector of one task in a piece of a tensor; the lists of measures beside them
say what must be known of the whole tensor before.

Where entries are equal, the first in memory counts as the larger one for the largest and for those
in the middle, and as the smaller one for ranks, so that a merge is the same on every machine.
mergekit leaves this to its library's sort, whose order of equal entries is not stated.
"""

from collections.abc import Callable

import numpy as np

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods.base import FactInputs, Parameter
from mergekit_bayes.methods.tensors import (
    Array,
    Order,
    Settings,
    Sum,
    Tensors,
    number_of,
)

_BLOCK = 1 << 22  # entries that are ranked at a time: a sort takes five times their memory

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


def thinned(change: Array, kept: Array) -> Array:
    """A change with the entries that are kept, and zeros elsewhere. It is changed in place."""
    np.copyto(change, 0, where=~kept)
    return change


def resized(tensors: Tensors, task: int, change: Array, kept: Array) -> Array:
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
        tensors: A piece, with the L1 norms, and perhaps the setting `rescale`.
        task: Which task.
        change: What it changed there.
        kept: Booleans of its shape.
    """
    thinned(change, kept)
    if _rescales(tensors.settings):
        before, after = (tensors.total("norms", 2 * task + i) for i in (0, 1))
        if after > 0:
            change *= before / after
    return change


def norms_of(keeps: Callable[[Tensors, int], Array]) -> Sum:
    """The measure of L1 norms of each task vector, and of what is kept of it, for `rescale`.

    Args:
        keeps: `(tensors, task) -> booleans` of a piece: which entries of a task vector are kept.
    """

    def sizes(tensors: Tensors, k: int) -> Array:
        change = change_of(tensors, k // 2)
        if k % 2:
            np.copyto(change, 0, where=~keeps(tensors, k // 2))
        return np.abs(change, out=change)

    return Sum("norms", sizes, lambda tasks: 2 * tasks, _rescales)


def _rescales(settings: Settings) -> bool:
    return bool(settings.get("rescale"))


def _magnitude(tensors: Tensors, task: int) -> Array:
    change = change_of(tensors, task)
    return np.abs(change, out=change)


def trimmed(tensors: Tensors, task: int) -> Array:
    """The largest entries of a task vector: those whose magnitude is among the first `density`.

    Of the n entries of a tensor int(density n) stay, and at least one where the density is not
    zero.

    Args:
        tensors: A piece measured by `TRIMMED`, with the settings `density` and `rescale`.
        task: Which task.
    """
    return resized(tensors, task, change_of(tensors, task), _among_largest(tensors, task))


def _among_largest(tensors: Tensors, task: int) -> Array:
    (cut,) = tensors.cuts("largest", task)
    return cut.keeps(_magnitude(tensors, task), tensors.start)


def _largest_count(settings: Settings, task: int, size: int, _: int) -> tuple[int, ...]:
    density = number_of(settings, "density", task)
    return (max(int(density * size), int(density > 0)),)


TRIMMED = (
    Order("largest", _magnitude, _largest_count, lambda tasks: tasks),
    norms_of(_among_largest),
)


def dropped(tensors: Tensors, task: int) -> Array:
    """The entries of a task vector whose draw is below `density`.

    Args:
        tensors: A piece measured by `DROPPED`, with draws and the settings `density` and
            `rescale`.
        task: Which task.
    """
    return resized(tensors, task, change_of(tensors, task), _below_density(tensors, task))


def _below_density(tensors: Tensors, task: int) -> Array:
    assert tensors.draws is not None
    return np.asarray(tensors.draws(task) < tensors.number("density", task))


DROPPED = (norms_of(_below_density),)


def drawn_by_rank(tensors: Tensors, task: int) -> Array:
    """A draw of the entries of a task vector, likelier for larger ones of a row, as in mergekit.

        [draw < density - epsilon + 2 epsilon r / (n - 1)],  r = 0, ..., n - 1 by magnitude

    Rows run along the last axis, and have n entries; the only entry of a row is kept with
    probability `density`, where mergekit fails. At a density of 0 or 1 all are dropped or kept,
    whatever epsilon is.

    Args:
        tensors: Rows measured by `DRAWN_BY_RANK`, with draws and the settings `density`,
            `epsilon` and `rescale`.
        task: Which task.

    Raises:
        ArithmeticError: Probabilities that are not between 0 and 1.
    """
    density = tensors.number("density", task)
    if not 0 < density < 1:
        change = change_of(tensors, task)
        return change if density >= 1 else np.zeros_like(change)
    kept = _below_rank_probability(tensors, task)  # first, as it takes the most memory
    return resized(tensors, task, change_of(tensors, task), kept)


def _below_rank_probability(tensors: Tensors, task: int) -> Array:
    assert tensors.draws is not None
    density, epsilon = tensors.number("density", task), tensors.number("epsilon", task)
    if not 0 < density < 1:
        return np.full(tensors.tasks[task].shape, density >= 1)
    _refuse_window(density, epsilon, "epsilon")
    draws = tensors.draws(task)  # first, as it takes the most memory while it is made
    change = change_of(tensors, task)
    columns = change.shape[-1] if change.ndim else 1
    low, step = density - epsilon, 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    probabilities = rank_probabilities(change, low if columns > 1 else density, step)
    return np.asarray(draws < probabilities)


DRAWN_BY_RANK = (norms_of(_below_rank_probability),)


def magprune(tensors: Tensors, task: int) -> Array:
    """MagPrune (Deep et al., 2024): entries drawn by rank in their row, divided by probability.

        q  = density + epsilon ((r + 1/2) / n - 1/2),  r = 0, ..., n - 1 by magnitude
        d' = d [draw < q] / q

    q is one minus the probability of dropping, over a window of width `epsilon` with `density` as
    its mean. Each d' is right on average.

    Args:
        tensors: Whole rows, with draws and the settings `density` and `epsilon`.
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
        tensors: A piece measured by `WITHOUT_OUTLIERS`, with the settings `density` and `gamma`,
            and perhaps `rescale`.
        task: Which task.
    """
    return resized(tensors, task, change_of(tensors, task), _in_the_middle(tensors, task))


def _in_the_middle(tensors: Tensors, task: int) -> Array:
    lower, upper = tensors.cuts("middle", task)
    values = _magnitude(tensors, task)
    return lower.keeps(values, tensors.start) & ~upper.keeps(values, tensors.start)


def _middle_counts(settings: Settings, task: int, size: int, _: int) -> tuple[int, ...]:
    count = int(number_of(settings, "density", task) * size)
    above = min(int(number_of(settings, "gamma", task) * size), size - count)
    return count + above, above


WITHOUT_OUTLIERS = (
    Order("middle", _magnitude, _middle_counts, lambda tasks: tasks),
    norms_of(_in_the_middle),
)
