"""The losses of an adaptation in the outputs of a model, one number an observation, in nats.

Every function takes logits that `curvature.outputs.scored_logits` has selected, so that a token of
a language model and a row of a classifier are treated alike.
"""

import torch
from torch import Tensor

from mergekit_bayes.heads import Likelihood


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def log_likelihood(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """`log p(y | z)` of each observation, up to a constant for the Gaussian.

        categorical    z_y - logsumexp(z)
        bernoulli      sum_c log sigmoid((2 y_c - 1) z_c)
        gaussian       -|z - y|^2 / 2

    Args:
        logits: z, (n, C).
        labels: y: class numbers (n,), or numbers (n, C).
        likelihood: As `curvature.ggn.random_root` names it.
    """
    if likelihood == "categorical":
        return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    if likelihood == "bernoulli":
        return torch.nn.functional.logsigmoid((2 * labels - 1) * logits).sum(-1)
    return -0.5 * (logits - labels).square().sum(-1)


def divergence(teacher: Tensor, logits: Tensor, likelihood: Likelihood) -> Tensor:
    """`KL(p_0 || p)` of each observation, in nats: the function-space part of a K-prior.

        categorical    sum_c p_0c log(p_0c / p_c)
        bernoulli      sum_c KL(Bernoulli(sigmoid z_0c) || Bernoulli(sigmoid z_c))
        gaussian       |z - z_0|^2 / 2

    Its Hessian in z at z_0 is that of the negative log-likelihood, so that near the start it is
    the quadratic of the generalised Gauss-Newton matrix.

    Args:
        teacher: z_0, (n, C), without a graph.
        logits: z, (n, C).
        likelihood: As in `log_likelihood`.
    """
    if likelihood == "gaussian":
        return 0.5 * (logits - teacher).square().sum(-1)
    if likelihood == "bernoulli":
        p = teacher.sigmoid()
        log = torch.nn.functional.logsigmoid
        yes = p * (log(teacher) - log(logits))
        no = (1 - p) * (log(-teacher) - log(-logits))
        return (yes + no).sum(-1)
    log_p0 = teacher.log_softmax(-1)
    return (log_p0.exp() * (log_p0 - logits.log_softmax(-1))).sum(-1)


def npo(log_p: Tensor, log_p0: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, here for each observation (Zhang et al., COLM 2024).

        -(2 / beta) log sigmoid(-beta (log p - log p_0))

    It is bounded below by 0, which it approaches where p falls far below p_0. Its slope in log p
    is `2 sigmoid(beta (log p - log p_0))`: 1 at the start, as of `ascent`, and 0 far below. For
    beta to 0 it becomes `ascent` plus a constant.

    Args:
        log_p: Log-likelihood under the model, (n,).
        log_p0: Log-likelihood under the start, (n,), without a graph.
        beta: Inverse temperature, > 0.
    """
    return -(2 / beta) * torch.nn.functional.logsigmoid(-beta * (log_p - log_p0))


def ascent(log_p: Tensor) -> Tensor:
    """`log p`: minus the loss, whose minimisation removes a training row exactly. Not bounded."""
    return log_p


def kl_uniform(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """`KL(u || p)`, with u the uniform distribution over the outputs, in nats. Bounded by 0.

    Args:
        logits: (n, C).
        likelihood: "categorical" or "bernoulli".
    """
    if likelihood == "gaussian":
        raise ValueError("a Gaussian output has no uniform distribution")
    return divergence(torch.zeros_like(logits), logits, likelihood)
