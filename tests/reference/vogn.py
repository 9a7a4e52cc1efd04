"""VOGN restated slowly, one entry at a time, in float64.

Khan et al., ICML 2018; Osawa et al., NeurIPS 2019.
"""


def step(mean, momentum, hess, gradients, *, lr, beta1, beta2, delta, centre=0.0):
    """One update; `gradients` are those of single examples at the sample.

    Returns mean, momentum and hess.
    """
    n = len(gradients)
    hess = beta2 * hess + (1 - beta2) * sum(g * g for g in gradients) / n
    momentum = beta1 * momentum + (1 - beta1) * (sum(gradients) / n + delta * (mean - centre))
    return mean - lr * momentum / (hess + delta), momentum, hess
