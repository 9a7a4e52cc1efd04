"""Precisions that are given by fewer numbers than one an entry, before they are stored."""

from typing import NamedTuple, TypeAlias

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.posterior.forms import low_rank_shape


class RankOne(NamedTuple):
    """A precision of rank one, `S[i, j] = rows[i] * columns[j]`, of a tensor of shape (r, c, d).

    Attributes:
        rows: Shape (r, 1, 1), 1/weight^2.
        columns: Shape (1, c, d), without a unit.
    """

    rows: Array
    columns: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it belongs to."""
        return (*self.rows.shape[:1], *self.columns.shape[1:])

    @property
    def size(self) -> int:
        """Number of entries of that tensor."""
        return self.rows.size * self.columns.size


class Matrices(NamedTuple):
    """Precisions of whole directions: a matrix for one axis of a tensor, the same for all others.

    The precision of a row w of a weight of shape (..., r, c) is `w' S w` with S for its c entries;
    `left` is the same for columns, and S for their r entries.

    Attributes:
        blocks: The blocks on the diagonal of S, (..., k, n, n), symmetric, 1/weight^2. What stands
            before k are the leading axes of the tensor, each with its own S.
        is_left: Whether S is for the axis before the last.
    """

    blocks: Array
    is_left: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape by which `forms` knows them."""
        return (*self.blocks.shape, 1) if self.is_left else self.blocks.shape

    @property
    def size(self) -> int:
        """How many numbers are stored."""
        return self.blocks.size


class Kronecker(NamedTuple):
    """A precision as a sum of Kronecker products, `<w, S w> = sum_k tr(w' L_k w R_k)`.

    Attributes:
        left: The L_k, (..., k, r, r) for a weight of shape (..., r, c), symmetric, 1/weight^2.
        right: The R_k, (..., k, c, c), symmetric, without a unit.
    """

    left: Array
    right: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape by which `forms` knows them."""
        (r, _), (c, _) = self.left.shape[-2:], self.right.shape[-2:]
        return (*self.left.shape[:-2], r * r + c * c, 1, 1)

    @property
    def size(self) -> int:
        """How many numbers are stored."""
        return self.left.size + self.right.size


class LowRank(NamedTuple):
    """A precision of directions of low rank beside a diagonal, `S = diag(d) + U' U`.

    It is for one axis of n entries, and the same for all indices of the other, as `Matrices`.

    Attributes:
        diagonal: d, (..., n), not negative, 1/weight^2. What stands before n are the leading axes
            of the tensor, each with its own S.
        factor: U, (..., k, n), 1/weight.
        is_left: Whether S is for the axis before the last.
    """

    diagonal: Array
    factor: Array
    is_left: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape by which `forms` knows them."""
        *leading, rank, n = self.factor.shape
        return low_rank_shape(leading, rank, n, -2 if self.is_left else -1)

    @property
    def size(self) -> int:
        """How many numbers are stored."""
        return self.diagonal.size + self.factor.size

    def entries(self) -> Array:
        """The diagonal of S: the precision of each entry given all others, (..., n)."""
        result: Array = self.diagonal + np.square(self.factor).sum(-2)
        return result


Directions: TypeAlias = Matrices | Kronecker | LowRank
