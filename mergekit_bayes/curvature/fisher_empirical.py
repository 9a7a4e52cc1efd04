"""The diagonal of the empirical Fisher: squared gradients of the loss at the observed labels."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.squares import Scored, squared_gradients
from mergekit_bayes.curvature.sums import ENTRIES, Keeping
from mergekit_bayes.errors import MismatchError


def empirical_fisher_diagonal(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Estimate the empirical Fisher diagonal of the summed loss over some batches.

        v_n = grad_z -log p(y_n | z_n)                 at the observed label y_n
        F   = sum over batches of ( grad sum_n r_n <v_n, z_n> )^2,   r_n in {-1, +1} at random

    Its expectation is `sum_n (grad l_n)^2`, the squared gradient of each observation by itself.
    Gradients at observed labels do not have mean zero, so that the square of their sum would hold
    cross terms: up to n^2 times the squared mean gradient. The random signs r_n make them vanish in
    expectation. So it is unbiased for the empirical Fisher at any batch size, and exact where a
    batch is one observation; the relative variance of a batch is at most 2.

    For the Fisher information, which the other estimators here find, the empirical one is biased by
    how far the labels are from what the model expects. It agrees where the labels are as if drawn
    from the model; it is larger where the model fits badly, and goes to zero where the labels are
    known by heart, since it then squares residuals that training has removed. Use it to compare
    with published work that does.

    The likelihood of a squared error `s/2 |z - y|^2` has the variance 1/s, and v is s (z - y). A
    mean over C sigmoid outputs is 1/C of a log-likelihood, so that F is 1/C of that likelihood's.

    Args:
        model: As for `squares.squared_gradients`.
        batches: Mappings with `input_ids`, `attention_mask` and `labels`: of a model of tokens of
            the inputs' shape, else class numbers, shape (batch,), or numbers, shape (batch, C).
        seed: Seed of the signs.
        keep: How finely the sums are kept, and where.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.

    Raises:
        MismatchError: A batch has no labels.
    """
    return squared_gradients(model, batches, _roots, seed=seed, keep=keep)


def _roots(scored: Scored) -> Iterator[Tensor]:
    if scored.targets is None:
        raise MismatchError(
            "fisher-empirical: the data have no labels, which this estimator looks at. Name their "
            "column, or take an estimator that needs none."
        )
    z, likelihood = scored.logits, scored.loss.likelihood
    scale = scored.loss.scale(z.shape[-1])
    factor = scale if likelihood == "gaussian" else scale**0.5
    signs = torch.empty_like(z[:, :1]).bernoulli_(0.5, generator=scored.generator)
    yield score(z, scored.targets, likelihood).mul_(signs.mul_(2).sub_(1) * factor)


def score(logits: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Return the gradient of each observation's loss in its logits, shape (n, C).

        categorical    softmax(z) - onehot(y)
        bernoulli      sigmoid(z) - y
        gaussian       z - y

    Args:
        logits: z, shape (n, C).
        targets: Class numbers, shape (n,), or numbers, n C of them.
        likelihood: As for `ggn.random_root`.

    Example:
        >>> score(torch.zeros(1, 2), torch.tensor([1]), "categorical")
        tensor([[ 0.5000, -0.5000]])
    """
    if likelihood == "categorical":
        p = logits.softmax(-1)
        return p.scatter_add_(-1, targets.reshape(-1, 1), -torch.ones_like(p[:, :1]))
    expected = logits.sigmoid() if likelihood == "bernoulli" else logits
    return expected - targets.reshape(logits.shape).to(logits.dtype)
