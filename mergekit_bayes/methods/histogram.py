"""A histogram of magnitudes: how a first pass finds a threshold without sorting.

A float32 magnitude is binned by its upper 19 bits without the sign, the exponent and 11 bits of the
mantissa, so that bins are in order of magnitude and an edge is known to one part in 2,048.
"""

import numpy as np
from numpy.typing import NDArray

SHIFT = 12  # mantissa bits that a bin drops
BINS = 1 << (31 - SHIFT)


def bin_of(magnitude: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bin of each non-negative float32 value."""
    bits = np.ascontiguousarray(magnitude, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits >> np.uint32(SHIFT)


def edge(index: int) -> float:
    """The smallest magnitude in a bin."""
    return float(np.array(index << SHIFT, np.uint32).view(np.float32))


def threshold(histogram: NDArray[np.int64], density: float) -> float:
    """The magnitude that the share `density` of largest entries has, rounded down to a bin's edge.

    Entries of at least this magnitude are that share or more: entries tied at the threshold all
    count, as published, and so do those within one part in 2,048 below it. The changes of a
    bfloat16 model have few distinct magnitudes, which makes the share grow.
    """
    at_or_above = histogram[::-1].cumsum()[::-1]
    least = max(1, round(density * int(at_or_above[0])))
    return edge(max(0, int(np.searchsorted(-at_or_above, -least, side="right")) - 1))
