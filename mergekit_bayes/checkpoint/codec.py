"""Stored bytes to float32 and back, with one rounding, for every mergeable dtype."""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, TensorSource, TensorSpec

# The mergeable dtypes that numpy has, too.
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def decode(raw: Array, dtype: str) -> Array:
    """Convert raw bytes of a mergeable dtype to float32 (float64 for F64).

    The result may share memory with `raw`.
    """
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype in _F8:
        return _F8[dtype].values[raw.view(np.uint8)]
    return raw.view("<f8" if dtype == "F64" else "<f4")


def encode(values: Array, dtype: str) -> memoryview:
    """Round float32 (float64 for F64) to nearest even, once, into the bytes of a mergeable dtype.

    A value that rounds beyond the largest becomes infinity, or NaN in F8_E4M3, which has no
    infinity. Nothing is clipped to the largest value, so that `overflowed` can count it.
    """
    if dtype in _F8:
        return _encode_f8(values, dtype)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        if (nan := (bits & 0x7FFFFFFF) > 0x7F800000).any():
            rounded[nan] = 0x7FC0  # rounding up would carry some NaNs over to zero
        return rounded.view(np.uint8).data
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=_NUMPY_DTYPES[dtype]).view(np.uint8).data


def overflowed(data: memoryview, dtype: str) -> int:
    """Count the entries that are infinity or NaN in bytes that `encode` returned for `dtype`."""
    if dtype in _F8:
        return int(np.count_nonzero((np.frombuffer(data, np.uint8) & 0x7F) >= _F8[dtype].infinity))
    if dtype == "BF16":
        return int(np.count_nonzero((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80))
    return int(np.count_nonzero(~np.isfinite(np.frombuffer(data, _NUMPY_DTYPES[dtype]))))


def is_bad_mean(values: Array) -> NDArray[np.bool_]:
    """Which entries are not a mean: infinite or NaN."""
    bad: NDArray[np.bool_] = ~np.isfinite(values)
    return bad


def is_bad_precision(values: Array) -> NDArray[np.bool_]:
    """Which entries are not a precision: negative, infinite or NaN. Zero of any sign is valid."""
    return ~(np.isfinite(values) & (values >= 0))


def chunks(spec: TensorSpec, size: int) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of at most `size` elements that together cover a tensor."""
    for start in range(0, spec.size, size):
        yield start, min(start + size, spec.size)


def read_chunk(source: TensorSource, name: str, start: int, stop: int) -> Array:
    """Read elements `start:stop` of a tensor in flat order, as float32 (float64 for F64)."""
    dtype = source.specs[name].dtype
    item = ITEM_SIZE[dtype]
    raw = np.empty((stop - start) * item, np.uint8)
    source.read_bytes(name, start * item, raw.data)
    return decode(raw, dtype)


def read_tensor(source: TensorSource, name: str) -> Array:
    """Read all of a tensor in its shape, as float32 (float64 for F64)."""
    spec = source.specs[name]
    return read_chunk(source, name, 0, spec.size).reshape(spec.shape)


class _Float8(NamedTuple):
    """An 8-bit floating-point format."""

    mantissa: int  # bits
    bias: int  # of the exponent
    infinity: int  # the first code that is not a finite number
    values: Array  # float32 of all 256 codes


def _float8(mantissa: int, bias: int, infinity: int, code_of_infinity: float) -> _Float8:
    codes = np.arange(128)
    exponent, fraction = codes >> mantissa, codes & ((1 << mantissa) - 1)
    fraction = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
    values = np.ldexp(fraction.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa)
    values[infinity:] = np.nan
    values[infinity] = code_of_infinity
    return _Float8(mantissa, bias, infinity, np.concatenate([values, -values]))


# "OCP 8-bit floating point specification", 2023. E4M3 spends its last code on NaN and has no
# infinity.
_F8 = {"F8_E4M3": _float8(3, 7, 0x7F, math.nan), "F8_E5M2": _float8(2, 15, 0x7C, math.inf)}


def _encode_f8(values: Array, dtype: str) -> memoryview:
    # The upper half of the bits is enough if its last bit also says whether the lower half held
    # anything ("round to odd"). The code of each upper half is then looked up in a table, which is
    # several times faster than computing it.
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) | ((bits & np.uint32(0xFFFF)) != 0)
    codes: Array = _f8_codes(dtype)[odd]
    return codes.data


@cache
def _f8_codes(dtype: str) -> Array:
    """Code of every float32 whose lower sixteen bits are zero, indexed by its upper sixteen."""
    f8, bits = _F8[dtype], np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Normal numbers: drop the low bits of the fraction to nearest even; a carry moves into the
    # exponent by itself.
    dropped = 23 - f8.mantissa
    code = (
        magnitude + np.uint32((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & np.uint32(1))
    ) >> dropped
    # Subnormal ones: the sum's last bit is worth one step, so that the addition itself rounds to
    # nearest even.
    step = 2.0 ** (1 - f8.bias - f8.mantissa)
    offset = np.float32(step * 2**23)
    with np.errstate(invalid="ignore"):
        steps = (magnitude.view(np.float32) + offset).view(np.uint32) - offset.view(np.uint32)
    smallest_normal = np.float32(2.0 ** (1 - f8.bias)).view(np.uint32)
    code = np.where(
        magnitude < smallest_normal, steps, code - np.uint32((127 - f8.bias) << f8.mantissa)
    )
    code = np.minimum(code, np.uint32(f8.infinity))
    code[magnitude > 0x7F800000] = 0x7F
    signed: Array = (code | ((bits >> 24) & np.uint32(0x80))).astype(np.uint8)
    return signed
