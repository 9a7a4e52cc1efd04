"""The diagonal of the Fisher information without a draw, for models of few classes."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.squares import Scored, squared_gradients
from mergekit_bayes.curvature.sums import ENTRIES, Keeping
from mergekit_bayes.errors import ConfigError

_MOST = 64  # outputs; each of them is a backward pass for every observation


def exact_fisher_diagonal(
    model: Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Add up the Fisher diagonal of the summed loss over some batches, at the model's weights.

        F = sum_n sum_y p(y | x_n) ( grad log p(y | x_n) )^2
          = sum_n sum_k ( grad <v_nk, z_n> )^2,         sum_k v_nk v_nk' = A_n

    No bias and no variance: the expectation over labels is taken, not drawn, and no observation
    shares a backward pass with another one. The second line needs fewer passes than the first one:
    C - 1 an observation for a softmax over C classes (`exact_roots`), one of two classes, and C
    for other likelihoods. What is left is the choice of the observations.

    Each row of a batch runs by itself, so that batches save nothing.

    Args:
        model: As for `squares.squared_gradients`, with at most 64 outputs.
        batches: As for `squares.squared_gradients`.
        seed: Not used: nothing is drawn.
        keep: How finely the sums are kept, and where.

    Returns:
        Tensors for every parameter that requires a gradient; tied parameters once.

    Raises:
        ConfigError: The model has more than 64 outputs.
    """
    return squared_gradients(model, _rows(batches), _roots, seed=seed, keep=keep)


def _rows(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches of one row each."""
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            yield {name: tensor[i : i + 1] for name, tensor in batch.items()}


def _roots(scored: Scored) -> Iterator[Tensor]:
    outputs = scored.logits.shape[-1]
    refuse_outputs(outputs)
    roots = exact_roots(scored.logits, scored.loss.likelihood)
    roots.mul_(scored.loss.scale(outputs) ** 0.5)
    for n, of_one in enumerate(roots):
        for root in of_one:
            alone = torch.zeros_like(scored.logits)
            alone[n] = root
            yield alone


def refuse_outputs(count: int) -> None:
    """Refuse a model with more outputs than the exact Fisher is affordable for.

    Args:
        count: C, the number of outputs of an observation.

    Raises:
        ConfigError: There are more than 64.
    """
    if count > _MOST:
        raise ConfigError(
            f"fisher-exact: the model has {count:,} outputs, and each of them costs a backward "
            f"pass for every observation; at most {_MOST} are taken. Choose the estimator ggn, "
            "which is unbiased for the same curvature."
        )


def exact_roots(logits: Tensor, likelihood: str) -> Tensor:
    """Return vectors v_k with `sum_k v_k v_k'` the Hessian of the loss in the logits.

    The covariance of a categorical, `diag(p) - p p'`, has the Cholesky factor (Tanabe and Sagae,
    1992), with q_k the sum of the p after entry k and q_-1 = 1,

        v_k[k] = sqrt(p_k q_k / q_{k-1}),   v_k[i] = -p_i sqrt(p_k / (q_{k-1} q_k)) for i > k

    and zero before k. The last v is zero and left out, since p_C-1 is what the others leave.

        bernoulli      v_k = sqrt(p_k (1 - p_k)) e_k
        gaussian       v_k = e_k

    Args:
        logits: z, shape (n, C); without a graph.
        likelihood: As for `ggn.random_root`.

    Returns:
        Shape (n, C - 1, C) for a softmax over C > 1 classes, else (n, C, C).

    Example:
        >>> exact_roots(torch.zeros(1, 2), "categorical")
        tensor([[[ 0.5000, -0.5000]]])
    """
    if likelihood == "gaussian":
        return torch.diag_embed(torch.ones_like(logits))
    if likelihood == "bernoulli":
        return torch.diag_embed((logits.sigmoid() * (-logits).sigmoid()).sqrt())
    p = logits.cpu().double().softmax(-1)
    # Summed from behind: 1 minus a sum from the front has no digits left where p_0 is near 1.
    sums = p.flip(-1).cumsum(-1).flip(-1).clamp(min=torch.finfo(p.dtype).tiny)
    before, after, first = sums[:, :-1], sums[:, 1:], p[:, :-1]  # q_{k-1}, q_k, p_k
    size = (first / before).sqrt() / after.sqrt()  # the product may be below all numbers
    roots = torch.triu(-p[:, None, :] * size[:, :, None], diagonal=1)
    roots.diagonal(dim1=1, dim2=2).copy_(after * size)
    return roots.to(logits)
