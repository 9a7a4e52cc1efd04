"""One token for each row, drawn from its nucleus by the Gumbel-max trick, without a sort.

The nucleus of `top_p` is the fewest likeliest tokens whose probabilities reach that sum, and those
tied with the last of them. A token t is in it just where

    sum of p_s over the tokens s with p_s > p_t  <  top_p

so one pass answers for one token. The token with the largest `log p + g` of the whole distribution
is therefore found first, which is in the nucleus with a probability of at least `top_p`. If it is
not, then no token up to its probability is, and the next one is sought among those above it. The
token is that of a search in the sorted nucleus, to the bit: a sum of float32 numbers from 2^-29 on,
as float64 holds it below 1, is exact in any order.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bayes.draws import word
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.records import FloatArray

Keys = NDArray[np.uint64]
Tokens = NDArray[np.int64]

_BLOCK = 1 << 17  # probabilities of the rows that are worked on together, for the processor's cache
_TINY = np.finfo(np.float32).tiny
_SCALE = 2.0**32


def pick(logits: Tensor, keys: Keys, top_p: float) -> Tensor:
    """One token for each row: the token of the nucleus with the largest `log p + g`.

    g is Gumbel noise, independent for each token, so that a token is drawn with probability p.

    Args:
        logits: (rows, tokens), float32.
        keys: (rows,), the key of each row's noise.
        top_p: The nucleus; 1 is the whole distribution.

    Raises:
        CheckpointError: The probabilities are not numbers.
    """
    p = logits.softmax(-1).cpu().numpy()
    tokens = np.arange(p.shape[1], dtype=np.uint64)
    size = max(1, _BLOCK // p.shape[1])
    picked = [
        _pick_block(p[i : i + size], word(keys[i : i + size, None], tokens), top_p)
        for i in range(0, len(p), size)
    ]
    return torch.from_numpy(np.concatenate(picked))


def _pick_block(p: NDArray[np.float32], words: Keys, top_p: float) -> Tokens:
    if not np.isfinite(p.sum()):
        raise CheckpointError(
            "the model's next-token probabilities are not numbers. Its weights hold NaN or "
            "infinity, or the temperature is too near to 0."
        )
    result = np.empty(len(p), np.int64)
    rows = np.arange(len(p))  # those of the block that have no token yet
    least = _least(words)
    while True:
        picked = _highest(p, words, least)
        result[rows] = picked
        if top_p >= 1:
            return result
        above = p * (p > p[np.arange(len(p)), picked, None])
        outside = torch.from_numpy(above).sum(1, dtype=torch.float64).numpy() >= top_p
        if not outside.any():
            return result
        p, words, least, rows = above[outside], words[outside], least[outside], rows[outside]


def _highest(p: NDArray[np.float32], words: Keys, least: NDArray[np.float32]) -> Tokens:
    """The token of each row with the largest `log p + g`, the first one of equals.

    The largest `log p - log(-log u)` is the smallest `-log(u) / p`. Since `1 - u <= -log u`, a
    token with `(1 - u) / p` above the `-log(u) / p` of another one does not have it. The token with
    about the smallest `(1 - u) / p` leaves few others, and only these need their logarithms.
    """
    each = np.arange(len(p))
    near = (p / least).argmax(axis=1)
    bound = -np.log(_uniform(words[each, near])) / p[each, near].astype(np.float64)
    bound *= _SCALE * (1 + 1e-6)  # rounding
    candidates = np.flatnonzero(least <= p * bound.astype(np.float32)[:, None])
    heights = p.ravel()[candidates]
    normal = heights >= _TINY
    candidates, heights = candidates[normal], heights[normal]
    rows, tokens = np.divmod(candidates, p.shape[1])
    height = np.log(heights, dtype=np.float64) + gumbel(words.ravel()[candidates])
    highest = np.maximum.reduceat(height, np.searchsorted(rows, each))
    winners = np.flatnonzero(height == highest[rows])
    first = np.searchsorted(rows[winners], each)
    picked: Tokens = tokens[winners[first]]
    return picked


def _least(words: Keys) -> NDArray[np.float32]:
    """At most `(1 - u) 2^32`, in float32, whose steps are 256 up to 2^32. It is 2^-22 or more."""
    high = (words >> np.uint64(32)).astype(np.float32)
    np.subtract(np.float32(_SCALE - 512), high, out=high)
    return np.maximum(high, np.float32(2.0**-22), out=high)


def gumbel(words: Keys) -> FloatArray:
    """Standard Gumbel noise from random words (`draws.word` of a row's key and a token)."""
    noise: FloatArray = -np.log(-np.log(_uniform(words)))
    return noise


def _uniform(words: Keys) -> FloatArray:
    uniform: FloatArray = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform
