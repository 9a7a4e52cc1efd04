"""Numbers as they are stored, inside numba: bfloat16 bits, float32 and float64.

Each function here is compiled by the types of its arguments: what is stored as an integer is
bfloat16 bits, anything else is a number. `zero` is one of the arithmetic, float32 or float64. The
plain functions are only names for numba.
"""

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

from mergekit_bayes.compiled import inlined
from mergekit_bayes.draws import word
from mergekit_bayes.gaussian import constant, select

inlined(word)


def widen(stored, zero):
    """A stored number in the arithmetic's dtype."""


def rounded(value, like):
    """A number of the arithmetic as it is stored, rounded to nearest, ties to even."""


def magnitude(stored):
    """The bits without the sign: in order of magnitude, infinity and NaN last."""


def precision_bits(stored):
    """The bits of a stored precision."""


def infinity(stored):
    """The bits of infinity."""


def is_bad(stored):
    """Whether a stored mean is infinite or NaN."""


def is_bad_precision(stored):
    """Whether a stored precision is negative, infinite or NaN."""


def draw(key, entry, zero):
    """The uniform number in [0, 1) of an entry; see `kernels.base.keyed_draws`."""


def unwidened(value, zero):
    """`value`, which must be of the arithmetic's dtype; anything else is numba's TypingError."""


@overload(select, jit_options={"forceinline": True})
def _select(condition, yes, no):
    return lambda condition, yes, no: yes if condition else no


@overload(constant, jit_options={"forceinline": True})
def _constant(value, like):
    if like == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


@overload(widen, jit_options={"forceinline": True})
def _widen(stored, zero):
    if isinstance(stored, types.Integer):
        if zero == types.float32:
            return lambda stored, zero: np.uint32(np.uint32(stored) << np.uint32(16)).view(
                np.float32
            )
        return lambda stored, zero: np.float64(
            np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
        )
    if zero == types.float32:
        return lambda stored, zero: np.float32(stored)
    return lambda stored, zero: np.float64(stored)


@overload(rounded, jit_options={"forceinline": True})
def _rounded(value, like):
    if isinstance(like, types.Integer):

        def to_nearest_even(value, like):
            bits = np.float32(value).view(np.uint32)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return to_nearest_even
    if like == types.float32:
        return lambda value, like: np.float32(value)
    return lambda value, like: np.float64(value)


@overload(magnitude, jit_options={"forceinline": True})
def _magnitude(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: np.uint16(np.uint32(stored) & np.uint32(0x7FFF))
    if stored == types.float32:
        return lambda stored: np.uint32(np.float32(stored).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return lambda stored: np.uint64(
        np.float64(stored).view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF)
    )


@overload(precision_bits, jit_options={"forceinline": True})
def _precision_bits(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: stored
    return lambda stored: np.float32(stored).view(np.uint32)


@overload(infinity, jit_options={"forceinline": True})
def _infinity(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: np.uint16(0x7F80)
    if stored == types.float32:
        return lambda stored: np.uint32(0x7F800000)
    return lambda stored: np.uint64(0x7FF0000000000000)


@overload(is_bad, jit_options={"forceinline": True})
def _is_bad(stored):
    if isinstance(stored, types.Integer):
        return lambda stored: (np.uint32(stored) & np.uint32(0x7F80)) == np.uint32(0x7F80)
    if stored == types.float32:
        return lambda stored: (
            (np.float32(stored).view(np.uint32) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        )
    return lambda stored: not np.isfinite(stored)


@overload(is_bad_precision, jit_options={"forceinline": True})
def _is_bad_precision(stored):
    # As integers, the good ones lie below infinity; minus zero is good, too.
    if isinstance(stored, types.Integer):
        return lambda stored: (
            (np.uint32(stored) >= np.uint32(0x7F80)) & (np.uint32(stored) != np.uint32(0x8000))
        )
    return lambda stored: (
        (np.float32(stored).view(np.uint32) >= np.uint32(0x7F800000))
        & (np.float32(stored).view(np.uint32) != np.uint32(0x80000000))
    )


@overload(draw, jit_options={"forceinline": True})
def _draw(key, entry, zero):
    real = np.float32 if zero == types.float32 else np.float64

    def uniform(key, entry, zero):
        bits = word(key, entry + np.uint64(1)) >> np.uint64(40)
        return real(np.float32(bits) * np.float32(2.0**-24))

    return uniform


@overload(unwidened, jit_options={"forceinline": True})
def _unwidened(value, zero):
    if value != zero:
        raise TypingError(f"Result widened from {zero} to {value}")
    return lambda value, zero: value
