"""Philox 4x32-10 and the transform of Box and Muller in plain integers and float64."""

import math

BLOCK, LANES = 2048, 512


def philox(counter, key):
    """Four words of 32 bits from a counter of four and a key of two (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normal(seed, entry):
    """The normal number at one place.

    A block of 2,048 entries holds the four numbers of 512 counters, by rows.
    """
    block, (row, lane) = entry // BLOCK, divmod(entry % BLOCK, LANES)
    counter = block * LANES + lane
    words = philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    a, b = words[:2] if row < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((a >> 9) + 0.5) / 2**23))
    angle = math.pi * ((b - 2**32 if b >> 31 else b) >> 8) / 2**24
    half = -1 if b & 1 else 1
    return radius * math.cos(angle) * half if row % 2 else radius * math.sin(angle)
