"""What an adapter does to one tensor of its base, entry by entry.

    Added       W + s B A                    a layer of LoRA, perhaps with the base moved (`moved`)
    Rescaled    m / ||W + s B A|| (W + s B A)  DoRA: one ratio for each output of the module
    Shifted     b + s b_B                    `lora_bias`: the bias of a layer's B
    Rows        W with some rows replaced    trained tokens

Each changes a range of entries in place, and every entry has the same bits whatever the range.
"""

from collections.abc import Callable
from threading import Lock
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.dense import Product, rectangles
from mergekit_bayes.lora.pieces import Stack

_T = TypeVar("_T")


class Change(Protocol):
    """A change of a tensor."""

    def apply(self, values: Array, start: int) -> None:
        """Turn entries of the base's tensor into those of the adapted one, in place.

        Args:
            values: The entries from `start` on, in flat order, float32 or float64.
            start: Index of the first one.
        """
        ...


class Added(NamedTuple):
    """`W + left' right`, or a stack of such products."""

    product: Product | Stack

    def apply(self, values: Array, start: int) -> None:
        """See `Change`."""
        values += self.product.entries(start, start + values.size)


class Rescaled(NamedTuple):
    """`ratio (W + left' right)`, a ratio for each row of the stored matrix, or for each column."""

    product: Product
    ratios: Array  # (rows,) or (columns,)
    by_column: bool

    def apply(self, values: Array, start: int) -> None:
        """See `Change`."""
        values += self.product.entries(start, start + values.size)
        for rows, columns, at in rectangles(start, start + values.size, self.product.width):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            block = values[at : at + shape[0] * shape[1]].reshape(shape)
            block *= self.ratios[columns] if self.by_column else self.ratios[rows, None]


class Shifted(NamedTuple):
    """A vector with another one added."""

    addend: Array  # (d_out,)

    def apply(self, values: Array, start: int) -> None:
        """See `Change`."""
        values += self.addend[start : start + values.size]


class Rows(NamedTuple):
    """A table with some rows replaced."""

    indices: Array  # (k,), ascending
    rows: Array  # (k, columns)

    def apply(self, values: Array, start: int) -> None:
        """See `Change`."""
        stop, width = start + values.size, self.rows.shape[1]
        first = int(np.searchsorted(self.indices, start // width))
        for index, row in zip(self.indices[first:], self.rows[first:], strict=True):
            begin = int(index) * width
            if begin >= stop:
                break
            low, high = max(begin, start), min(begin + width, stop)
            values[low - start : high - start] = row[low - begin : high - begin]


class Once(Generic[_T]):
    """A function of a name that computes each value once, and keeps it; safe in several threads."""

    def __init__(self, make: Callable[[str], _T]) -> None:
        """Wrap a function."""
        self._make = make
        self._made: dict[str, _T] = {}
        self._locks: dict[str, Lock] = {}
        self._lock = Lock()

    def __call__(self, name: str) -> _T:
        """The value of a name. Threads that ask for one name wait for the first of them."""
        with self._lock:
            lock = self._locks.setdefault(name, Lock())
        with lock:
            if name not in self._made:
                self._made[name] = self._make(name)
            return self._made[name]
