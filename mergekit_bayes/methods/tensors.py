"""The contract of a rule that merges a tensor as a whole, beside the elementwise one of `base`.

Some rules need more of a tensor than one entry: products of the models (slerp, Karcher means), the
largest entries (breadcrumbs), ranks in a row (della), or a quantile (arcee fusion). Such a rule is
one function, `combine(tensors) -> array`, in plain numpy, which is given a tensor of all models in
float32 (float64 where F64 is written). What it reads says how much must be in memory:

- `entries`: it is elementwise, but for what is measured first. It is given flat pieces of the
  tensor, and streams.
- `products`: likewise, and what is measured first are the products of the models' whole tensors
  (`Tensors.products`).
- `rows`: it is given whole rows of the last axis, (rows, n), and streams.
- `tensor`: it is given the whole tensor, in its shape.

What a rule must know of the whole tensor before it gets a piece, it declares as `measures`: sums,
and thresholds of the largest entries. They are taken piece by piece, too (`measuring`).

What it cannot merge it says in an ArithmeticError, whose text the user gets with the tensor's name.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.gaussian import Gaussian

Array: TypeAlias = NDArray[Any]
Reads: TypeAlias = Literal["entries", "products", "rows", "tensor"]
Setting: TypeAlias = float | str | tuple[float, ...]  # a tuple has one number for each task
Settings: TypeAlias = Mapping[str, Setting]


class Cut(NamedTuple):
    """The c largest of a tensor's values: all above a threshold, and the first of those equal.

        kept = value > threshold or (value = threshold and flat index < limit)

    Zeros are left out where they are reached, unless c is all there is: whether a change of zero is
    kept makes no difference.

    Attributes:
        threshold: The c-th largest value, in units of the values.
        limit: A flat index in the whole tensor.
    """

    threshold: float
    limit: int

    def keeps(self, values: Array, start: int) -> Array:
        """Which values of a piece are among the largest.

        Args:
            values: Non-negative, of any shape.
            start: Flat index of the first one in the whole tensor.

        Returns:
            Booleans in the same shape.
        """
        kept: Array = np.asarray(values > self.threshold, order="C")
        ties = max(0, min(self.limit - start, values.size))
        if ties:
            flat = values.reshape(-1)[:ties]
            kept.reshape(-1)[:ties] |= flat == self.threshold
        return kept


Cuts: TypeAlias = tuple[tuple[Cut, ...], ...]  # for each list of values, one for each rank
Measured: TypeAlias = Mapping[str, Any]  # Cuts, or sums in float64 (lists,), by name


class Tensors(NamedTuple):
    """One tensor of all models, or a piece of it.

    Attributes:
        base: The base's; None without one.
        tasks: Those of the tasks, each of the base's shape.
        weights: One for each task, dimensionless.
        settings: The method's, as they hold in this tensor.
        products: Of a rule that reads them: the sum over all entries of the whole tensor of the
            product of each two models, (models, models) in float64, the base first if there is one.
        draws: Of a random rule: uniform numbers in [0, 1) for the entries of a task, in their
            shape, by the task's index.
        start: Flat index of the first entry in the whole tensor.
        size: Entries of the whole tensor, where the rule has measures.
        measured: The result of each measure by its name: cuts, or sums as float64 (lists,).
    """

    base: Array | None
    tasks: tuple[Array, ...]
    weights: tuple[float, ...]
    settings: Settings
    products: Array | None = None
    draws: Callable[[int], Array] | None = None
    start: int = 0
    size: int = 0
    measured: Measured = MappingProxyType({})

    @property
    def changes(self) -> tuple[Array, ...]:
        """What each task changed of the base: the task vectors."""
        assert self.base is not None
        return tuple(task - self.base for task in self.tasks)

    def number(self, name: str, task: int = 0) -> float:
        """A setting that is a number, of one task where it differs."""
        return number_of(self.settings, name, task)

    def cuts(self, name: str, index: int) -> tuple[Cut, ...]:
        """What an `Order` of this name found in its list `index`, in the order of its ranks."""
        cuts: Cuts = self.measured[name]
        return cuts[index]

    def total(self, name: str, index: int) -> float:
        """What a `Sum` of this name added up in its list `index`."""
        return float(self.measured[name][index])


def number_of(settings: Settings, name: str, task: int = 0) -> float:
    """A setting that is a number, of one task where it differs."""
    value = settings[name]
    return float(value[task] if isinstance(value, tuple) else value)


class Order(NamedTuple):
    """A measure: which values of a list are the largest.

    Attributes:
        name: Of the result, a `Cut` for each list and rank.
        values: `(tensors, k) -> array` of a piece's values of list k, not negative.
        ranks: `(settings, k, size, positive) -> counts`: of how many largest values the cut is
            wanted, from the `size` of the tensor and how many values are `positive`.
        lists: `number of tasks -> number of lists`.
        by_positive: Whether `ranks` asks for the number of positive values; otherwise it is given
            0, and nothing is read for ranks that take all values or none.
        only_thresholds: Whether ties are not cut, and thresholds are wanted of all values, too:
            the c-th largest is the entry at n - c in ascending order.
        is_needed: `(settings) -> bool`: whether it is measured; None for always.
    """

    name: str
    values: Callable[[Tensors, int], Array]
    ranks: Callable[[Settings, int, int, int], tuple[int, ...]]
    lists: Callable[[int], int]
    by_positive: bool = False
    only_thresholds: bool = False
    is_needed: Callable[[Settings], bool] | None = None


class Sum(NamedTuple):
    """A measure: the sum of a list of values over the whole tensor, in float64.

    Attributes:
        name: Of the result, float64 (lists,).
        values: `(tensors, k) -> array` of a piece's values of list k.
        lists: `number of tasks -> number of lists`.
        is_needed: `(settings) -> bool`: whether it is measured; None for always.
    """

    name: str
    values: Callable[[Tensors, int], Array]
    lists: Callable[[int], int]
    is_needed: Callable[[Settings], bool] | None = None


class TensorRule(NamedTuple):
    """A rule for whole tensors.

    Attributes:
        combine: `(tensors) -> array` of a task's shape, and of its dtype up to promotion.
        reads: What it needs at a time.
        reads_by: `(settings) -> reads`: what it needs by these settings, whatever `reads` says;
            None where settings do not matter.
        measures: What is measured of the whole tensor before, in this order; each may use the
            results of those before it.
    """

    combine: Callable[[Tensors], Array]
    reads: Reads = "tensor"
    reads_by: Callable[[Settings], Reads] | None = None
    measures: tuple[Order | Sum, ...] = ()

    def needs(self, settings: Settings) -> Reads:
        """What it needs at a time of a tensor with these settings."""
        return self.reads if self.reads_by is None else self.reads_by(settings)

    def piece_shape(self, settings: Settings, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of pieces of a tensor; -1 where they may be cut.

        Args:
            settings: The method's, as they hold in this tensor.
            shape: That of the tensor. One axis, or none, is one row.

        Returns:
            `shape`, (-1, n) or (-1,).
        """
        needs = self.needs(settings)
        if needs == "tensor":
            return shape
        return (-1, max(1, shape[-1] if shape else 1)) if needs == "rows" else (-1,)


def by_tensor(*_: object) -> Gaussian:
    """Stand where a method has no elementwise rule: it merges by `Method.tensor` alone."""
    raise AssertionError("this method merges whole tensors")


def changes_products(products: Array) -> Array:
    """The products of the task vectors, from those of base and tasks.

        <m_s - m0, m_t - m0> = G_st - G_s0 - G_t0 + G_00

    Args:
        products: (1 + tasks, 1 + tasks), the base's first.

    Returns:
        (tasks, tasks).
    """
    first = products[0]
    return np.asarray(products[1:, 1:] - first[1:, None] - first[None, 1:] + first[0])
