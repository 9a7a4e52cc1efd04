"""The magnitudes of DoRA, folded into a weight (Liu et al., *DoRA*, ICML 2024).

    W' = m / ||W + s B A|| (W + s B A)

The norm is that of the weights of one output: a row of a linear layer or of a flattened kernel, a
column of a matrix that is stored transposed, and a column of a table of embeddings, over all its
tokens. Norms are computed in one pass over the tensor, in blocks that do not depend on what is
read, with sums in float64.
"""

from collections.abc import Callable

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.lora.dense import Product

_BLOCK = 1 << 20  # entries whose squares are summed at a time


def output_norms(
    read: Callable[[int, int], Array], shape: tuple[int, int], product: Product, *, by_column: bool
) -> Array:
    """The norms of the outputs of `W + left' right`, float64.

    Args:
        read: Entries of W by their range in flat order, float32 or float64.
        shape: Shape of the stored matrix; of a kernel, (d_out, the rest).
        product: The change.
        by_column: Whether an output is a column of the stored matrix.
    """
    height, width = shape
    norms = np.zeros(width if by_column else height)
    step = max(1, _BLOCK // width)
    for first in range(0, height, step):
        rows = slice(first, min(height, first + step))
        start, stop = rows.start * width, rows.stop * width
        values = product.entries(start, stop)
        values += read(start, stop)
        squares = np.square(values.reshape(-1, width), dtype=np.float64)
        if by_column:
            norms += squares.sum(0)
        else:
            norms[rows] = squares.sum(1)
    return np.sqrt(norms)
