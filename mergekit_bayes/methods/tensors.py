"""The contract of a rule that merges a tensor as a whole, beside the elementwise one of `base`.

Some rules need more of a tensor than one entry: products of the models (slerp, Karcher means), the
largest entries (della, breadcrumbs), or a quantile (arcee fusion). Such a rule is one function,
`combine(tensors) -> array`, in plain numpy, which is given a tensor of all models in float32
(float64 where F64 is written). What it reads says how much must be in memory:

- `entries`: it is elementwise. It is given flat pieces of the tensor, and streams.
- `products`: it is elementwise but for the products of the models' whole tensors, which are
  measured first (`Tensors.products`). It is given flat pieces, and streams.
- `tensor`: it is given the whole tensor, in its shape.

What it cannot merge it says in an ArithmeticError, whose text the user gets with the tensor's name.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.gaussian import Gaussian

Array: TypeAlias = NDArray[Any]
Reads: TypeAlias = Literal["entries", "products", "tensor"]
Setting: TypeAlias = float | str | tuple[float, ...]  # a tuple has one number for each task


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
    """

    base: Array | None
    tasks: tuple[Array, ...]
    weights: tuple[float, ...]
    settings: Mapping[str, Setting]
    products: Array | None = None
    draws: Callable[[int], Array] | None = None

    @property
    def changes(self) -> tuple[Array, ...]:
        """What each task changed of the base: the task vectors."""
        assert self.base is not None
        return tuple(task - self.base for task in self.tasks)

    def number(self, name: str, task: int = 0) -> float:
        """A setting that is a number, of one task where it differs."""
        value = self.settings[name]
        return float(value[task] if isinstance(value, tuple) else value)


class TensorRule(NamedTuple):
    """A rule for whole tensors.

    Attributes:
        combine: `(tensors) -> array` of a task's shape, and of its dtype up to promotion.
        reads: What it needs at a time.
        reads_all: `(settings) -> bool`: whether it needs the whole tensor by these settings, and no
            products, whatever `reads` says; None where settings do not matter.
    """

    combine: Callable[[Tensors], Array]
    reads: Reads = "tensor"
    reads_all: Callable[[Mapping[str, Setting]], bool] | None = None

    def needs(self, settings: Mapping[str, Setting]) -> Reads:
        """What it needs at a time of a tensor with these settings."""
        is_whole = self.reads_all is not None and self.reads_all(settings)
        return "tensor" if is_whole else self.reads


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
