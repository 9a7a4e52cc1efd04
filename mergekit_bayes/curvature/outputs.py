"""The outputs of a model that its loss looks at, and the likelihood of that loss."""

from torch import Tensor
from torch.nn import Module

_IGNORED = -100  # the label that transformers' losses leave out


def scored_logits(logits: Tensor, labels: Tensor | None, tokens: Tensor | None) -> Tensor:
    """Return the logits that the loss looks at, shape (n, C).

    Args:
        logits: Of a language model (batch, length, C), of a classifier (batch, C).
        labels: Of a language model (batch, length); a token is scored where the next label is
            not -100. None, or of another shape, for a classifier.
        tokens: Input tokens (batch, length).
    """
    has_labels = labels is not None and tokens is not None and labels.shape == tokens.shape
    if labels is not None and has_labels and logits.ndim == 3:
        return logits[:, :-1][labels[:, 1:] != _IGNORED]
    return logits.reshape(-1, logits.shape[-1])


def likelihood(model: Module) -> str:
    """Return the likelihood of the loss that a transformers model trains with.

    Returns:
        "categorical" for softmax, "bernoulli" for an independent sigmoid per logit, "gaussian"
        for the squared error, as `ggn.random_root` takes it.
    """
    problem = getattr(model.config, "problem_type", None)
    if problem is None and getattr(model.config, "num_labels", 2) == 1:
        return "gaussian"  # transformers then trains with the squared error
    if problem == "regression":
        return "gaussian"
    return "bernoulli" if problem == "multi_label_classification" else "categorical"
