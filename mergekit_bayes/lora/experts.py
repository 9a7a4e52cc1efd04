"""The factors of stacked experts, whose E products share one pair on disk.

    dW[e] = s B_e A_e,  A_e = A[e r : (e + 1) r],  B_e = B[:, e :: E]

A is (E r, d_in), with the experts one after another; B is (d_out, r E), with the expert as the
fastest index of its columns (PEFT 0.21, `ParamWrapper`). Adapters of Unsloth may have B grouped as
A is, `B_e = B[:, e r : (e + 1) r]`; see `parameters.is_grouped`.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.layers import Factors, Layer

_T = TypeVar("_T")
Pair = tuple[Array | None, Array | None]  # of A and B
_OF_EXPERT = re.compile(r"\[\d+\]$")


def of_expert(layer: Layer, whole: Pair) -> Pair:
    """The factors of the expert that a layer means, (r, d_in) and (d_out, r).

    Args:
        layer: The layer, with its expert.
        whole: A and B of all experts, or their precisions; None stays None.
    """
    assert layer.expert is not None
    a, b = whole
    rows = slice(layer.expert * layer.rank, (layer.expert + 1) * layer.rank)
    columns = rows if layer.is_grouped else slice(layer.expert, None, layer.experts)
    return None if a is None else a[rows], None if b is None else b[:, columns]


def join_experts(factors: Sequence[Factors]) -> Factors:
    """The factors of all experts as they are stored; one pair as it is."""
    if len(factors) == 1:
        return factors[0]
    b = np.stack([pair.b for pair in factors], axis=-1)
    return Factors(np.concatenate([pair.a for pair in factors]), b.reshape(len(b), -1))


def by_expert(name: str, layer: Layer) -> dict[str, Layer]:
    """A layer as one for each of its experts, `name[0]` and so on; as it is if there is just one.

    Args:
        name: What the layer is called.
        layer: The layer.
    """
    if layer.experts == 1:
        return {name: layer}
    return {f"{name}[{e}]": layer._replace(expert=e) for e in range(layer.experts)}


def group_experts(names: Mapping[str, object]) -> dict[str, list[str]]:
    """The names that `by_expert` gave, by the name that it was given; in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_OF_EXPERT.sub("", name), []).append(name)
    return groups


class Recent(Generic[_T]):
    """A few values that were made last, for several threads.

    A pair of factors is read whole for each of its experts, many times in a row.
    """

    def __init__(self, most: int) -> None:
        """Keep `most` values."""
        self._most, self._lock = most, Lock()
        self._values: OrderedDict[Hashable, _T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The value of a key, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value
