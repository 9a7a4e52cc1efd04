"""The diagonal of the generalised Gauss-Newton matrix by random square roots (root-GGN).

For a softmax likelihood the GGN is the Fisher information. Its output factor `diag(p) - p p'` has
the random square root below, which needs no labels and no per-example gradients, and stays bounded
on confident models, where sampled labels hardly ever show the other class.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.squares import Scored, squared_gradients
from mergekit_bayes.curvature.sums import ENTRIES, Keeping

_WORDS = 1 << 16  # words that are drawn at once, which a processor's cache holds
_BLOCK = 1 << 18  # logits from which vectors are made at once


def ggn_diagonal(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Estimate the GGN diagonal of the summed loss over some batches, at the model's weights.

        p   = softmax(z)                               per observation, a constant
        v   = sqrt(p) * r - p * sum(sqrt(p) * r)       r in {-1, +1}^C at random
        F   = sum over batches of ( grad sum_n <v_n, z_n> )^2

    for softmax; `random_root` has the v of the other likelihoods. Those of a model of transformers
    are scaled to the loss that transformers trains it with (`outputs.TrainedLoss.scale`: the mean
    over C outputs, and a squared error without 1/2).

    One backward a batch. It is unbiased at any batch size: with z_n the logits of observation n,
    J_n their Jacobian and E[v_n v_n'] = A_n (see `random_root`),

        E[( sum_n J_n' v_n )( sum_m J_m' v_m )'] = sum_n J_n' A_n J_n

    because observations of one batch have independent signs, whose cross terms vanish. More
    batches mean more draws; the relative error is about sqrt(2 / batches).

    Args:
        model: A model of tokens if batches hold `labels` of the inputs' shape (a causal one is
            scored where the next label is not -100, a masked one or a classifier of tokens where
            the label itself is not), else a classifier. Dropout is off meanwhile.
        batches: Mappings with `input_ids`, `attention_mask` and, for models of tokens, `labels`.
            Other labels only say by their dtype which loss a classifier without `problem_type`
            trains with.
        seed: Seed of the signs.
        keep: How finely the sums are kept, and where.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.
    """
    return squared_gradients(model, batches, signed_roots, seed=seed, keep=keep)


def signed_roots(scored: Scored) -> Iterator[Tensor]:
    """The vectors of `squared_gradients`: a random root of the loss that the model trains with."""
    root = random_root(scored.logits, scored.loss.likelihood, scored.generator)
    yield root.mul_(scored.loss.scale(scored.logits.shape[-1]) ** 0.5)


def random_root(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Draw vectors v with `E[v v']` the Hessian of the loss in the logits.

        categorical    v = sqrt(p) * r - p * sum(sqrt(p) * r),   p = softmax(z)
        bernoulli      v = sqrt(p (1 - p)) * r,                  p = sigmoid(z)
        gaussian       v = r

    with r in {-1, +1}^C at random, so that E[r r'] is the identity. For the categorical,
    v = (I - p 1') diag(sqrt(p)) r, and (I - p 1') diag(p) (I - 1 p') = diag(p) - p p'.

    Args:
        logits: z, shape (n, C); without a graph.
        likelihood: "categorical" for softmax, "bernoulli" for an independent sigmoid per logit,
            "gaussian" for the squared error `0.5 |z - y|^2`.
        generator: Generator of the signs, on the device of the logits.

    Returns:
        One v for each observation, shape (n, C).

    Example:
        With p = (1/2, 1/2), v is (0, 0) for equal signs, else (1, -1) / sqrt(2) or its negative:
        E[v v'] is [[1/4, -1/4], [-1/4, 1/4]].

        >>> v = random_root(torch.zeros(1000, 2), "categorical", torch.Generator().manual_seed(0))
        >>> v.unique(dim=0)
        tensor([[-0.7071,  0.7071],
                [ 0.0000,  0.0000],
                [ 0.7071, -0.7071]])
    """
    signs = random_signs(logits, generator)
    if likelihood == "gaussian":
        return signs
    if likelihood == "bernoulli":
        p = logits.sigmoid()
        return signs * (p * (1 - p)).sqrt()
    # By blocks of rows, since the logits of a language model may take a gigabyte.
    rows = max(1, _BLOCK // logits.shape[-1])
    for start in range(0, len(logits), rows):
        p = logits[start : start + rows].softmax(-1)
        signed = signs[start : start + rows].mul_(p.sqrt())
        signed.sub_(p.mul_(signed.sum(-1, keepdim=True)))
    return signs


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw -1 or +1 for every entry, as `bernoulli_(0.5)` does, in a third of its time on CPUs.

    torch compares the lowest 53 bits of a 64-bit word with p, as a fraction, so that of p = 1/2 the
    bit 52 decides. Where torch draws otherwise (by MKL, on Intel's processors), it does so here.

    Args:
        like: A tensor whose shape, dtype and device the result has.
        generator: Generator on that device.
    """
    if like.device.type != "cpu" or not _draws_words():
        return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return _signs_of_words(like, generator)


def _signs_of_words(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.empty(like.shape, dtype=like.dtype)
    flat, words = signs.view(-1), torch.empty(_WORDS, dtype=torch.int64)
    for start in range(0, flat.numel(), _WORDS):
        part = flat[start : start + _WORDS]
        drawn = words[: part.numel()].random_(generator=generator)
        part.copy_(drawn.bitwise_right_shift_(51).bitwise_and_(2))
    return signs.neg_().add_(1)


@cache
def _draws_words() -> bool:
    """Whether torch's signs are those of words, on this processor."""
    like, drawn, words = torch.empty(512), torch.Generator(), torch.Generator()
    signs = like.clone().bernoulli_(0.5, generator=drawn.manual_seed(0)).mul_(2).sub_(1)
    is_same = torch.equal(signs, _signs_of_words(like, words.manual_seed(0)))
    return is_same and torch.equal(drawn.get_state(), words.get_state())
