"""Changes of tensors that are made of several products, one below the other.

Such a tensor is a stack of experts, or fused of projections that were adapted apart. A tensor may
also be a piece of what one product changes: one expert of a stack, or half of one.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.dense import Product
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.views import Segment


class Piece(NamedTuple):
    """Rows of one product of a layer, and the rows of the stored tensor that they change.

    Attributes:
        layer: The layer, with its expert if it has several.
        transposed: Whether the tensor is stored as (d_in, d_out).
        rows: The product's rows, as stored: of B, or of A' if transposed.
        at: The first row of the tensor, stacked matrices taken as one, that they change.
    """

    layer: Layer
    transposed: bool
    rows: slice
    at: int


class Stack(NamedTuple):
    """Products one below the other. Rows that none of them covers are zero.

    Attributes:
        starts: The first row of each product, ascending.
        products: The products, all with the same number of columns.
    """

    starts: tuple[int, ...]
    products: tuple[Product, ...]

    def entries(self, start: int, stop: int) -> Array:
        """Entries `start:stop` in flat order; see `Product.entries`."""
        left, right = self.products[0]
        width = right.shape[1]
        out: Array = np.zeros(stop - start, left.dtype)
        first = max(0, bisect_right(self.starts, start // width) - 1)
        for at, product in zip(self.starts[first:], self.products[first:], strict=True):
            offset = at * width
            if offset >= stop:
                break
            begin, end = max(start, offset), min(stop, offset + product.left.shape[1] * width)
            if begin < end:
                out[begin - start : end - start] = product.entries(begin - offset, end - offset)
        return out


def pieces_of(
    layer: Layer, segments: Sequence[Segment], *, transposed: bool
) -> dict[str, list[Piece]]:
    """The pieces of a layer by the stored tensor that they change.

    Args:
        layer: The layer.
        segments: Where the rows of the adapted tensor are stored.
        transposed: Whether it is (d_in, d_out) there.
    """
    height = layer.columns if transposed else layer.rows  # of one product
    pieces: dict[str, list[Piece]] = {}
    for segment in segments:
        row, stop = segment.start, segment.start + segment.rows
        while row < stop:
            expert, first = divmod(row, height)
            rows = min(height - first, stop - row)
            at = segment.at + row - segment.start
            owner = layer._replace(expert=expert) if layer.experts > 1 else layer
            piece = Piece(owner, transposed, slice(first, first + rows), at)
            pieces.setdefault(segment.name, []).append(piece)
            row += rows
    return pieces


def stack_pieces(pieces: Sequence[Piece], make: Callable[[Piece], Product]) -> Stack:
    """The change of a stored tensor, or its variance.

    Args:
        pieces: The tensor's pieces, by their first row.
        make: The product of which a piece has some rows.
    """
    products = [(make(piece), piece.rows) for piece in pieces]
    cut = [Product(np.ascontiguousarray(p.left[:, rows]), p.right) for p, rows in products]
    return Stack(tuple(piece.at for piece in pieces), tuple(cut))
