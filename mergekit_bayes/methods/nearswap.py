"""Take another model's weights where they are near (alchemonaut)."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.tensors import Array, TensorRule, Tensors, by_tensor


def nearswap(tensors: Tensors) -> Array:
    """Move each entry of the base to the other model's, but by no more than `t`.

        w    = min(1, t / |m_1 - m0|)
        mean = w m_1 + (1 - w) m0  =  m0 + min(max(m_1 - m0, -t), t)

    Source: the card of the model QuartetAnemoi-70B-t0.0001 (alchemonaut on the Hub) and mergekit's
    documentation; no paper known. Both have the first form; the second is the same, and divides by
    no difference that may be zero. A negative `t` leaves the base as it is, as in mergekit.

    Args:
        tensors: The base and one task; `t` is in units of the weights.
    """
    assert tensors.base is not None
    (task,) = tensors.tasks
    base, t = tensors.base, max(tensors.number("t"), 0.0)
    change = task - base
    return np.where(np.abs(change) <= t, task, base + np.clip(change, -t, t))


NEARSWAP = Method(
    "nearswap",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="The other model's weights where they are near the base's, and a step towards them "
    "elsewhere (alchemonaut).",
    example="bmerge merge A --base BASE --method nearswap --param t=0.0001",
    formula="m = w m_1 + (1 - w) m0,  w = min(1, t / |m_1 - m0|)",
    parameters=(Parameter("t", 0.0001, "the largest change of an entry, in units of the weights"),),
    tasks=1,
    takes_scales=False,
    tensor=TensorRule(nearswap, "entries"),
)
