"""The curvature of a step from its own logits, for IVON with `curvature="ggn"`."""

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_bayes.curvature.ggn import random_root
from mergekit_bayes.curvature.outputs import scored_logits
from mergekit_bayes.draws import mix
from mergekit_bayes.heads import Likelihood
from mergekit_bayes.optim import IVON


def add_logit_curvature(
    optimizer: IVON,
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    of_loss: Likelihood = "categorical",
    micro_batch: int = 0,
) -> None:
    """Give IVON one root-GGN draw on the logits of a batch, where a draw is due.

        with optimizer.sampled_params(train=True):
            outputs = model(**batch)
            add_logit_curvature(optimizer, outputs.logits, batch["labels"])
            outputs.loss.backward()
        optimizer.step()

    Call it in every step before the backward pass of the loss, which needs the same graph. Every
    `curvature_every` steps it makes a backward pass of its own, and otherwise it does nothing.

    Args:
        optimizer: IVON, inside of `sampled_params`.
        logits: Of a causal language model (batch, length, C), or one row an example (n, C).
        labels: Of a language model (batch, length): a token whose next label is -100 is not scored.
        of_loss: What the loss of one observation is: "categorical" for the softmax
            cross-entropy, "bernoulli" for a sum of binary ones, "gaussian" for half a squared
            error.
        micro_batch: Number of the batch within the step, from 0, so that each draws its own signs.

    Raises:
        ValueError: Logits of tokens without labels of their shape.
    """
    if not optimizer.curvature_due:
        return
    if logits.ndim == 3 and (labels is None or labels.shape != logits.shape[:2]):
        raise ValueError(
            f"add_logit_curvature: logits of tokens, {tuple(logits.shape)}, need labels of shape "
            f"{tuple(logits.shape[:2])}, which say what is scored"
        )
    tokens = labels if logits.ndim == 3 else None
    scored = scored_logits(logits, labels, tokens).float()
    rank = dist.get_rank() if dist.is_initialized() else 0
    root = draw_root(optimizer, scored, of_loss, micro_batch, rank)
    optimizer.add_curvature((root * scored).sum(), len(scored))


def draw_root(
    optimizer: IVON, scored: Tensor, of_loss: Likelihood, micro_batch: int, rank: int
) -> Tensor:
    """One random root of the Hessian in the scored logits, drawn for this micro-batch and rank.

    Args:
        optimizer: IVON, whose seed and number of steps give the signs.
        scored: The logits that the loss looks at, (n, C).
        of_loss: As in `add_logit_curvature`.
        micro_batch: Number of the batch within the step.
        rank: Number of the process.
    """
    group = optimizer.param_groups[0]
    seed = mix(group["seed"], group["steps"], micro_batch, rank, 1)
    signs = torch.Generator(scored.device).manual_seed(seed)
    return random_root(scored.detach(), of_loss, signs)
