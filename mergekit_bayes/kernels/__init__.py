"""Run a merging rule over chunks of stored numbers, fused into one pass where numba is installed.

A method is plain arithmetic on numbers. A pass widens what is stored, turns stored precisions into
likelihood precisions, re-bases, combines, rounds once, and counts what the report states. The same
bits come out with and without numba, whatever the chunks; numba takes a second to load or compile,
which only a large merge wins back.
"""

from mergekit_bayes.kernels.base import Array, Chunk, Kind, Numbers, Pass, Reduce, Tally, task_key
from mergekit_bayes.kernels.passes import can_fuse, elementwise, first_pass, row_sums

__all__ = [
    "Array",
    "Chunk",
    "Kind",
    "Numbers",
    "Pass",
    "Reduce",
    "Tally",
    "can_fuse",
    "elementwise",
    "first_pass",
    "row_sums",
    "task_key",
]
