"""IVON restated slowly, one entry at a time, in float64 (Shen et al., ICML 2024)."""

import math


def step(
    mean,
    momentum,
    hess,
    samples,
    *,
    k,
    lr,
    ess,
    beta1,
    beta2,
    delta,
    hess_init,
    clip=math.inf,
    rescale_lr=True,
    debias=True,
    centre=0.0,
):
    """One update; `samples` are (epsilon, gradient at the sample). Returns mean, momentum, hess.

    The prior is N(centre, 1 / (ess delta)).
    """
    grads, curvatures = [], []
    for epsilon, gradient in samples:
        sigma = 1 / math.sqrt(ess * (hess + delta))
        grads.append(gradient)
        curvatures.append(gradient * epsilon * sigma / sigma**2)
    ghat, fhat = sum(grads) / len(grads), sum(curvatures) / len(curvatures)
    momentum = beta1 * momentum + (1 - beta1) * ghat
    new = (
        beta2 * hess
        + (1 - beta2) * fhat
        + 0.5 * (1 - beta2) ** 2 * (hess - fhat) ** 2 / (hess + delta)
    )
    gbar = momentum / (1 - beta1**k) if debias else momentum
    rate = lr * (hess_init + delta) if rescale_lr else lr
    direction = (gbar + delta * (mean - centre)) / (new + delta)
    return mean - rate * max(-clip, min(clip, direction)), momentum, new
