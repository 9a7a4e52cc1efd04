"""Which loss a transformers model trains with, and a classifier's mean over a whole step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergekit_bayes.curvature.outputs import CAUSAL, SEQUENCE, loss_name
from mergekit_bayes.errors import ConfigError

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput


def classification_loss(
    outputs: "SequenceClassifierOutput",
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy, mean over the examples of the whole step.

    The loss inside transformers' classifiers is the mean of one micro-batch. They accept the count
    of the step without using it, so the Trainer adds those means up: with k micro-batches on each
    of R ranks the gradient is k R times too large.

    Args:
        outputs: What the model returned, with `logits` (n, C).
        labels: Class numbers, (n,).
        num_items_in_batch: Examples of the whole step; None for those given here.
    """
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float(), labels.view(-1), reduction="sum"
    )
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def is_causal(model: torch.nn.Module) -> bool:
    """Whether the loss scores each next token of a decoder."""
    # The name comes first, because a model that is not of transformers may have no config.
    return loss_name(model) == CAUSAL and not getattr(model.config, "is_encoder_decoder", False)


def is_single_label(model: torch.nn.Module, labels: Tensor | None) -> bool:
    """Whether transformers gives a sequence classifier softmax cross-entropy for such labels."""
    problem = getattr(model.config, "problem_type", None)
    if problem is None and labels is not None:
        count = getattr(model.config, "num_labels", 0)
        return bool(count > 1 and labels.dtype in (torch.long, torch.int))
    return bool(problem == "single_label_classification")


def refuse_other_losses(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a loss that `curvature="ggn"` cannot use: its logits have another size or place.

    Raises:
        ConfigError: The model is neither a causal language model nor a classifier with one label.
    """
    name, labels, tokens = loss_name(model), batch.get("labels"), batch.get("input_ids")
    has_both = labels is not None and tokens is not None
    if has_both and is_causal(model) and labels.shape == tokens.shape:  # type: ignore[union-attr]
        return
    if name == SEQUENCE and is_single_label(model, labels):
        return
    raise ConfigError(
        "curvature='ggn' knows causal language models and classifiers with one label, and the "
        f"loss of this {type(model).__name__} ({name or 'unknown'}) is neither, or its labels are "
        "of another shape. Use curvature='price'."
    )
