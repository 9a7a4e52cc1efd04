"""The noise and IVON's arithmetic on the CPU, each in one pass over the parameters.

Compiled by numba: import only after checking that numba is installed, as `slicing` does. The
noise is that of Philox 4x32-10 (Salmon et al., SC 2011), which makes a random number from a key
and its place, so that any slice can be drawn alone, and of Box and Muller's transform. Nothing is
contracted or reassociated: every processor computes the same numbers, however tensors are sliced.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bayes.compiled import compiled, inlined

_LANES = 512  # counters of a block; written beside each other, so that the loop is vectorised
BLOCK = 4 * _LANES  # entries drawn together

# sin(pi t) / t in t^2 for |t| <= 1/2, and log(1 + x) / x for sqrt(1/2) - 1 <= x <= sqrt(2) - 1,
# interpolated at the Chebyshev nodes: both within 6e-8 of the function, a unit in float32's last
# place.
_SINE = tuple(np.float32(c) for c in (3.14159265, -5.16771025, 2.55007741, -0.59829132, 0.07765766))
_LOG = tuple(
    np.float32(c)
    for c in (
        1.0,
        -0.49999988,
        0.33334184,
        -0.25002155,
        0.19956978,
        -0.16560696,
        0.14949095,
        -0.1437733,
        0.08743945,
    )
)
_LOG_2 = np.float32(math.log(2))
_ROOT_HALF = np.uint32(0x3F3504F3)  # the bits of sqrt(1/2)

Floats = NDArray[np.float32]


def fits(*tensors: Tensor) -> bool:
    """Return whether the compiled passes work on these tensors, which have one shape."""
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )


def noise(
    out: Tensor, hess: Tensor, decay: Tensor | float, factor: float, seed: int, start: int
) -> None:
    """Draw `eps factor / sqrt(h + d)` with eps ~ N(0, 1), |eps| < 5.8.

    Args:
        out: Contiguous float32, overwritten with the noise.
        hess: h; contiguous float32 of the same shape.
        decay: d, of that shape or a number.
        factor: `sign / sqrt(ess)`.
        seed: Seed of 64 bits.
        start: Number of entries already drawn from this seed; a multiple of `BLOCK`.
    """
    decays, d = _entries_or_number(decay)
    noise_entries(
        _flat(out),
        _flat(hess),
        decays,
        np.float32(d),
        np.float32(factor),
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32(seed >> 32),
        np.uint64(start // BLOCK),
    )


def ivon_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    grad: Tensor,
    noise_grad: Tensor,
    *,
    step: int,
    lr: float,
    ess: float,
    beta1: float,
    beta2: float,
    weight_decay: float | Tensor,
    clip_radius: float,
    debias: bool,
    prior_mean: Tensor | None = None,
) -> None:
    """Make the step of `updates.ivon_update` in one pass, and leave `noise_grad` as it is.

    The arguments are the same; all tensors are contiguous float32.
    """
    ivon_entries(
        _flat(mean),
        _flat(momentum),
        _flat(hess),
        _flat(grad),
        _flat(noise_grad),
        np.float32(ess),
        np.float32(1 - beta2),
        np.float32(0.5 * (1 - beta2) ** 2),
        *_newton(prior_mean, weight_decay, step, lr, beta1, clip_radius, debias),
    )
    torch.autograd.graph.increment_version(mean)  # as every change in place does


def ggn_update(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    grad: Tensor,
    squares: Tensor | None,
    *,
    share: float,
    step: int,
    lr: float,
    beta1: float,
    weight_decay: float | Tensor,
    clip_radius: float,
    debias: bool,
    prior_mean: Tensor | None = None,
) -> None:
    """Make the step of `updates.ggn_update` in one pass.

    The arguments are the same; all tensors are contiguous float32.
    """
    ggn_entries(
        _flat(mean),
        _flat(momentum),
        _flat(hess),
        _flat(grad),
        None if squares is None else _flat(squares),
        np.float32(share),
        *_newton(prior_mean, weight_decay, step, lr, beta1, clip_radius, debias),
    )
    torch.autograd.graph.increment_version(mean)  # as every change in place does


def _newton(
    prior_mean: Tensor | None,
    weight_decay: float | Tensor,
    step: int,
    lr: float,
    beta1: float,
    clip_radius: float,
    debias: bool,
) -> tuple[Floats | np.float32 | None, ...]:
    """Return what both passes need for momentum and mean.

    That is the prior, the share of the gradient, the momentum's correction, clip and rate.
    """
    correction = 1 - beta1**step if debias else 1.0
    decays, decay = _entries_or_number(weight_decay)
    centre = None if prior_mean is None else _flat(prior_mean)
    numbers = (decay, 1 - beta1, correction, clip_radius * correction, lr / correction)
    return centre, decays, *(np.float32(n) for n in numbers)


def _flat(tensor: Tensor) -> Floats:
    return tensor.detach().view(-1).numpy()


def _entries_or_number(value: Tensor | float) -> tuple[Floats | None, float]:
    if isinstance(value, Tensor) and value.ndim:
        return _flat(value), 0.0
    return None, float(value)


@inlined
def _philox(low, high, key0, key1):
    """Return four words of 32 random bits, from a counter and a key."""
    c0, c1, c2, c3 = low, high, np.uint32(0), np.uint32(0)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * np.uint64(c0)
        p1 = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1 = np.uint32(np.uint32(p1 >> np.uint64(32)) ^ c1 ^ key0), np.uint32(p1)
        c2, c3 = np.uint32(np.uint32(p0 >> np.uint64(32)) ^ c3 ^ key1), np.uint32(p0)
        key0, key1 = (
            np.uint32(key0 + np.uint32(0x9E3779B9)),
            np.uint32(key1 + np.uint32(0xBB67AE85)),
        )
    return c0, c1, c2, c3


@inlined
def _sine_of_pi(t):
    u = t * t
    return t * (_SINE[0] + u * (_SINE[1] + u * (_SINE[2] + u * (_SINE[3] + u * _SINE[4]))))


@inlined
def _minus_log(u):
    """Return -log(u), 0 < u < 1."""
    bits = np.uint32(np.float32(u).view(np.uint32) - _ROOT_HALF)
    exponent = np.float32(np.int32(bits) >> np.int32(23))
    x = np.uint32((bits & np.uint32(0x7FFFFF)) + _ROOT_HALF).view(np.float32) - np.float32(1)
    high = _LOG[5] + x * (_LOG[6] + x * (_LOG[7] + x * _LOG[8]))
    log = x * (_LOG[0] + x * (_LOG[1] + x * (_LOG[2] + x * (_LOG[3] + x * (_LOG[4] + x * high)))))
    return -(exponent * _LOG_2 + log)


@inlined
def _normal_pair(a, b):
    """Return two normal numbers from two words of bits.

    The first word makes the radius, the second an angle on a half circle; one bit tells the half.
    """
    u = np.float32((np.float32(a >> np.uint32(9)) + np.float32(0.5)) * np.float32(2**-23))
    radius = np.sqrt(np.float32(2) * _minus_log(u))
    t = np.float32(np.int32(b) >> np.int32(8)) * np.float32(2**-24)
    cosine = np.float32(_sine_of_pi(np.float32(0.5) - abs(t)))
    cosine = np.uint32(cosine.view(np.uint32) ^ np.uint32(b << np.uint32(31))).view(np.float32)
    return radius * _sine_of_pi(t), radius * cosine


@compiled(error_model="numpy")
def noise_entries(out, hess, decays, decay, factor, key0, key1, first):
    """Draw the noise of `noise`, from block `first` on; `decays` is None or d of each entry."""
    eps = np.empty((4, _LANES), np.float32)
    flat = eps.reshape(BLOCK)
    for start in range(0, out.size, BLOCK):
        counter = (first + np.uint64(start // BLOCK)) * np.uint64(_LANES)
        low, high = np.uint32(counter), np.uint32(counter >> np.uint64(32))
        for lane in range(min(_LANES, out.size - start)):
            a, b, c, d = _philox(np.uint32(low + np.uint32(lane)), high, key0, key1)
            eps[0, lane], eps[1, lane] = _normal_pair(a, b)
            eps[2, lane], eps[3, lane] = _normal_pair(c, d)
        stop = min(start + BLOCK, out.size)
        o, h = out[start:stop], hess[start:stop]
        if decays is None:
            for i in range(o.size):
                o[i] = flat[i] * (factor / np.sqrt(h[i] + decay))
        else:
            p = decays[start:stop]
            for i in range(o.size):
                o[i] = flat[i] * (factor / np.sqrt(h[i] + p[i]))


@inlined
def _lerp(x, y, share):
    """Interpolate from x to y, in the form that is exact at both ends."""
    return x + share * (y - x) if share < np.float32(0.5) else y - (np.float32(1) - share) * (y - x)


@inlined
def _moved(mean, centre, momentum, hess, decay, correction, clip, rate):
    """Return the mean after `updates.newton_step`, of one entry; a NaN passes both bounds."""
    direction = (momentum + decay * correction * (mean - centre)) / (hess + decay)
    direction = -clip if direction < -clip else direction
    direction = clip if direction > clip else direction
    return mean - rate * direction


@compiled(error_model="numpy")
def ivon_entries(
    mean,
    momentum,
    hess,
    grad,
    noise_grad,
    ess,
    a2,
    half,
    centre,
    decays,
    decay,
    a1,
    correction,
    clip,
    rate,
):
    """Make the step of `ivon_update`; `a1` and `a2` are 1 - b1 and 1 - b2, `half` is a2^2 / 2."""
    for i in range(mean.size):
        d = decay if decays is None else decays[i]
        m_p = np.float32(0) if centre is None else centre[i]
        momentum[i] = _lerp(momentum[i], grad[i], a1)
        curvature = hess[i] + d
        change = hess[i] - ess * noise_grad[i] * curvature
        hess[i] = hess[i] - a2 * change + half * (change * change / curvature)
        mean[i] = _moved(mean[i], m_p, momentum[i], hess[i], d, correction, clip, rate)


@compiled(error_model="numpy")
def ggn_entries(
    mean, momentum, hess, grad, squares, share, centre, decays, decay, a1, correction, clip, rate
):
    """Make the step of `ggn_update`; `centre`, `decays` and `squares` may be None."""
    for i in range(mean.size):
        d = decay if decays is None else decays[i]
        m_p = np.float32(0) if centre is None else centre[i]
        momentum[i] = _lerp(momentum[i], grad[i], a1)
        if squares is not None:
            hess[i] = _lerp(hess[i], squares[i], share)
        mean[i] = _moved(mean[i], m_p, momentum[i], hess[i], d, correction, clip, rate)
