"""Precisions that are matrices, for readers that know numbers only."""

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.specs import Array, PrecisionSource
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.posterior.factors import LowRank
from mergekit_bayes.posterior.stored import DIAGONAL, StoredPrecisions, named


def matrices_in(precision: PrecisionSource | None) -> tuple[str, ...]:
    """The tensors whose precisions are matrices, by the precision's names."""
    return precision.matrices if isinstance(precision, StoredPrecisions) else ()


def refuse_matrices(precision: PrecisionSource | None, reader: str, what_to_do: str) -> None:
    """Refuse a precision with matrices where numbers are read.

    Args:
        precision: The precision.
        reader: What reads it, the subject of a sentence.
        what_to_do: The last sentence of the message.

    Raises:
        PrecisionError: It has matrices.
    """
    names = matrices_in(precision)
    if not names or not isinstance(precision, StoredPrecisions):
        return
    info = precision.info
    made_by = "" if info is None or info.estimator is None else f" (--estimator {info.estimator})"
    raise PrecisionError(
        f"{precision.where(names[0])}: the precision of '{names[0]}' and {len(names) - 1} more are "
        f"matrices{made_by}, and {reader} reads one number an entry. {what_to_do}"
    )


def diagonal(precision: PrecisionSource, name: str) -> Array | None:
    """The precision of each entry given all others: the diagonal of matrices, in float32.

    Args:
        precision: The precision.
        name: One of its names.

    Returns:
        One number for each place on the axis of the matrices, or for each entry where there are
        matrices for both axes; None for a precision of numbers.
    """
    if not isinstance(precision, StoredPrecisions) or name not in precision.matrices:
        return None
    parts = [read_tensor(precision.in_files, part) for part in precision.parts(name)]
    if precision.parts(name)[0] == named(DIAGONAL, name):
        of_diagonal, factor = parts
        return LowRank(of_diagonal, factor).entries()
    diagonals: list[Array] = [np.einsum("...ii->...i", part) for part in parts]
    if len(diagonals) == 1:
        return diagonals[0]
    left, right = diagonals
    entries: Array = np.einsum("...ki,...kj->...ij", left, right)
    return entries
