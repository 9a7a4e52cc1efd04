"""A fixed sample of entries of a checkpoint's tensors, the same places in every model.

On every axis at most 32 evenly spaced indices are looked at, so that rows and columns of different
tensors are looked at in the same places.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.layers import EMBEDDINGS, group_layers
from mergekit_bayes.checkpoint.specs import TensorSource
from mergekit_bayes.correlation import mean_ranks

SIDE = 32  # indices of an axis that are looked at
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of an expert, in the name of a tensor
_SMALL = 16  # length of an axis below which a matrix shows no structure
_AT_ONCE = 1 << 16  # entries of a tensor that is read in one piece

_Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """The entries of one tensor that are looked at.

    Attributes:
        name: The tensor.
        values: (rows, columns) in float64; one column for a vector.
        shape: (rows, columns) of the tensor, whose axes after the first are joined.
        is_embedding: Whether it is an embedding by its name: it has rows of tokens that no text
            held.
    """

    name: str
    values: _Matrix
    shape: tuple[int, int]
    is_embedding: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a layer, and large enough to show structure."""
        return min(self.shape) >= _SMALL and not self.is_embedding

    @cached_property
    def logs(self) -> _Matrix:
        """Logarithms of the values that are positive numbers, flat."""
        values = self.values.ravel()
        return np.log(values[np.isfinite(values) & (values > 0)])

    @cached_property
    def ranks(self) -> _Matrix:
        """Ranks of the values."""
        return mean_ranks(self.values)


def positions(length: int) -> NDArray[np.int64]:
    """The indices of an axis that are looked at: at most `SIDE`, evenly spaced."""
    count = min(length, SIDE)
    return (np.arange(count) * length + length // 2) // max(count, 1)


def two_axes(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows and columns: the axes after the first are joined."""
    rows = shape[0] if shape else 1
    return rows, int(np.prod(shape[1:]))


def read_grids(source: TensorSource, names: Mapping[str, str]) -> dict[str, Grid]:
    """Read the entries of a precision or of a mean that are looked at.

    Args:
        source: Its tensors.
        names: Those with one number an entry, by the name under which they are looked at.
    """
    embeddings = set(group_layers(names).get(EMBEDDINGS, ()))
    return {
        name: _read_grid(source, stored, name, is_embedding=name in embeddings)
        for name, stored in names.items()
    }


def _read_grid(source: TensorSource, stored: str, name: str, *, is_embedding: bool) -> Grid:
    shape = source.specs[stored].shape
    rows, columns = two_axes(shape)
    places = positions(columns)
    if columns == 1:
        values = read_chunk(source, stored, 0, rows)[positions(rows), None]
    elif rows * columns <= _AT_ONCE:
        values = read_chunk(source, stored, 0, rows * columns).reshape(rows, columns)
        values = values[positions(rows)][:, places]
    else:
        first, last = (int(places[0]), int(places[-1])) if places.size else (0, -1)
        found = [
            read_chunk(source, stored, row * columns + first, row * columns + last + 1)
            for row in positions(rows).tolist()
        ]
        values = np.stack(found)[:, places - first] if found else np.zeros((0, 0))
    return Grid(name, values.astype(np.float64), (rows, columns), is_embedding)


def sampled_names(names: Iterable[str], layers: int) -> list[str]:
    """The tensors of some layers, evenly spaced, and of experts the first.

    Args:
        names: Names of tensors.
        layers: How many numbered layers; those of all stacks count as one.
    """
    groups = list(group_layers(names).items())
    numbered = [layer for layer, _ in groups if layer[-1].isdigit()]
    kept = {numbered[i * len(numbered) // layers] for i in range(layers)} if numbered else None
    found: list[str] = []
    for layer, members in groups:
        if kept is None or layer in kept:
            first = {_INDEX.sub("#", n.removeprefix(layer)): n for n in reversed(members)}
            found += [name for name in members if name in first.values()]
    return found
