"""Run a merging rule over chunks of stored numbers, fused into one pass where numba is there.

A method is plain arithmetic on numbers. A pass widens what is stored, turns stored precisions into likelihood
precisions, re-bases, combines, rounds once, and counts what the report tells. The same bits come out with and without
numba, whatever the chunks; numba takes a second to load or compile, which only a large merge wins back.
"""

from importlib.util import find_spec

from mergekit_bayes.kernels.base import Array, Chunk, Kind, Numbers, Pass, Reduce, Tally, task_key
from mergekit_bayes.kernels.plain import plain_pass, plain_reduction, plain_sums

__all__ = [
    "Array", "Chunk", "Kind", "Numbers", "Pass", "Reduce", "Tally", "can_fuse", "elementwise", "first_pass", "row_sums",
    "task_key",
]  # fmt: skip


MOST_MODELS = 24  # that a compiled loop holds unrolled; with more of them numpy is faster


def can_fuse(models: int) -> bool:
    """True if numba is installed, and worth its while for so many models."""
    return models <= MOST_MODELS and find_spec("numba") is not None


def elementwise(kind: Kind, *, fused: bool) -> Pass:
    """The pass that combines a chunk."""
    if not fused:
        return plain_pass(kind)
    from mergekit_bayes.kernels.fused import fused_pass

    return fused_pass(kind)


def first_pass(kind: Kind, *, fused: bool) -> Reduce:
    """The pass that adds up what the method must know beforehand."""
    if not fused:
        return plain_reduction(kind)
    from mergekit_bayes.kernels.fused import fused_reduction

    return fused_reduction(kind)


def row_sums(stored: Array, row: int, sums: Array, *, fused: bool) -> None:
    """Sums of consecutive rows of `row` stored precisions into `sums` (rows,), float64, in a fixed order."""
    if not fused:
        plain_sums(stored, row, sums)
        return
    from mergekit_bayes.kernels.fused import fused_sums

    fused_sums(stored, row, sums)
