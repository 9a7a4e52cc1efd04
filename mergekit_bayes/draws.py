"""SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): random words from a key and a counter.

A word depends on its key and counter alone, so that chunks, threads and machines agree.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Words: TypeAlias = Any  # uint64: a number or an array, of numpy or inside numba

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def word(key: Words, counter: Words) -> Words:
    """Word number `counter` of the stream `key`, 64 random bits.

    The generator's n-th output from the seed `key` is `word(key, n)`, counted from 1. Runs
    unchanged inside numba. Arrays of numpy wrap around modulo 2^64 silently; single numbers of
    numpy do too, with a warning.

    Args:
        key: uint64. Take it from a hash: keys that differ by a small multiple of the generator's
            step give overlapping streams.
        counter: uint64.
    """
    z = key + counter * np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def mix(*numbers: int) -> int:
    """A 63-bit seed from a few integers; neighbouring integers give unrelated seeds.

    Each number goes in by `seed = word(seed + number, 1)`, written for Python's integers, which are
    faster here than numpy's.
    """
    return _mixed(numbers) >> 1


def mixes(head: Sequence[int], numbers: Sequence[int], last: int) -> list[int]:
    """Return `mix(*head, number, last)` of each of the numbers, which are not negative."""
    with np.errstate(over="ignore"):
        keys = np.array(numbers, np.uint64) + np.uint64(_mixed(head))
        keys = word(keys, np.uint64(1)) + np.uint64(last)
        seeds: list[int] = (word(keys, np.uint64(1)) >> np.uint64(1)).tolist()
    return seeds


def _mixed(numbers: Sequence[int]) -> int:
    seed = 0
    for number in numbers:
        z = (seed + number + _STEP) & _MASK
        z = ((z ^ (z >> 30)) * _FIRST) & _MASK
        z = ((z ^ (z >> 27)) * _SECOND) & _MASK
        seed = z ^ (z >> 31)
    return seed
