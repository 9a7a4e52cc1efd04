"""bSAM restated slowly, one entry at a time, in float64 (Moellenhoff and Khan, ICLR 2023)."""

import math


def step(
    mean,
    momentum,
    hess,
    gradient_at,
    epsilon,
    *,
    lr,
    ess,
    beta1,
    beta2,
    delta,
    rho,
    damping,
    centre=0.0,
):
    """One update; `gradient_at` gives the gradient of the mean loss at a weight.

    Returns mean, momentum and hess.
    """
    s = hess + delta
    noisy = gradient_at(mean + epsilon / math.sqrt(ess * s))
    gradient = gradient_at(mean + rho * noisy / s)
    momentum = beta1 * momentum + (1 - beta1) * (gradient + delta * (mean - centre))
    new = mean - lr * momentum / s
    # s is averaged with sqrt(s) |g| + damping + delta, which for h = s - delta leaves delta out
    return new, momentum, beta2 * hess + (1 - beta2) * (math.sqrt(s) * abs(noisy) + damping)
