"""Sums of products of rows, of which the diagonal and the largest directions are kept.

    A = sum_i x_i x_i'  ~  diag(d) + U' U        for rows x_i of n numbers; U is (k, n)

In memory are the diagonal of A, which is exact, and U: one tensor of shape (1 + k, n), the diagonal
first. New rows are put below U, and of all these the k directions with the largest sums of squares
are kept: U' U never exceeds A, so that d, what the diagonal has beside it, is not negative. What is
left out of one step does not come back, which is why U is not the best of its rank for A.
"""

import torch
from torch import Tensor

_LEAST = 128  # rows that are added at a time, where so many are there


def sketch_shape(leading: tuple[int, ...], rank: int, n: int) -> tuple[int, ...]:
    """The shape of sketches with these leading axes."""
    return (*leading, 1 + rank, n)


def add_rows(sketch: Tensor, rows: Tensor) -> None:
    """Add rows to a sketch.

    Args:
        sketch: (1 + k, n), float32; it is overwritten.
        rows: (any number, n), float32.
    """
    rank = len(sketch) - 1
    for some in torch.split(rows, max(_LEAST, 4 * rank)):
        _add(sketch, some, some.square().sum(0))


def add_sketch(sketch: Tensor, other: Tensor) -> None:
    """Add another sketch, (1 + m, n), of other rows."""
    _add(sketch, other[1:], other[0])


def diagonal_and_factor(sketches: Tensor) -> tuple[Tensor, Tensor]:
    """d, (..., n), and U, (..., k, n), of sketches."""
    diagonal, factor = sketches[..., 0, :].double(), sketches[..., 1:, :]
    rest = diagonal - factor.double().square().sum(-2)
    return rest.clamp_(min=0).float(), factor


def _add(sketch: Tensor, rows: Tensor, squares: Tensor) -> None:
    sketch[0] += squares
    found = _largest(torch.cat([sketch[1:], rows]), len(sketch) - 1)
    sketch[1 : 1 + len(found)] = found


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest singular values of rows times their right singular vectors, (k, n) or fewer.

    They are found in the smaller one of both Gram matrices. Where that is not finite none of them
    is, which whoever stores them refuses.
    """
    if len(rows) <= k:
        return rows
    is_short = len(rows) <= rows.shape[1]
    gram = rows @ rows.T if is_short else rows.T @ rows
    if not gram.isfinite().all():
        return torch.full_like(rows[:k], torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    if is_short:
        largest: Tensor = vectors[:, -k:].T @ rows
        return largest
    scaled: Tensor = values[-k:].clamp(min=0).sqrt()[:, None] * vectors[:, -k:].T
    return scaled
