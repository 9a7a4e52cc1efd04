"""The outputs of a model that its loss looks at, and the likelihood of that loss."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.heads import Likelihood, head_of

_IGNORED = -100  # the label that transformers' losses leave out

# Names of transformers' losses, in `model.loss_function.__name__`.
CAUSAL, SEQUENCE = "ForCausalLMLoss", "ForSequenceClassificationLoss"
_WORDS: dict[Likelihood, str] = {
    "categorical": "softmax cross-entropy",
    "bernoulli": "binary cross-entropy of each output",
    "gaussian": "squared error",
}
_IN_PLACE = ("ForMaskedLMLoss", "ForTokenClassification")  # a label is that of its own token


class TrainedLoss(NamedTuple):
    """The loss that a model trains with, for one observation.

    Attributes:
        likelihood: "categorical" for softmax, "bernoulli" for an independent sigmoid per logit,
            "gaussian" for the squared error, as `ggn.random_root` takes it.
        averages: Whether it is the mean over the outputs where `ggn.random_root` takes the sum.
            That of a regression then has no factor 1/2 either.
        shifts: Whether a label is scored by the token before it.
        reason: What says so; a clause for messages.
    """

    likelihood: Likelihood
    averages: bool
    shifts: bool
    reason: str

    def scale(self, outputs: int) -> float:
        """The Hessian in the logits over that of the loss of `ggn.random_root`.

            gaussian     2/C    of 1/C |z - y|^2, over 1/2 |z - y|^2
            bernoulli    1/C    of a mean of C cross-entropies, over their sum
            categorical  1

        Args:
            outputs: C, the number of logits of an observation.
        """
        if not self.averages or self.likelihood == "categorical":
            return 1.0
        return (2.0 if self.likelihood == "gaussian" else 1.0) / outputs

    @property
    def name(self) -> str:
        """The loss in words, as posteriors record it: precisions of one name have one unit."""
        is_mean = self.averages and self.likelihood != "categorical"
        return _WORDS[self.likelihood] + (", mean over the outputs" if is_mean else "")

    def describe(self) -> str:
        """The loss in words, and what says so."""
        return f"{_WORDS[self.likelihood]} ({self.reason})"


def loss_name(model: Module) -> str | None:
    """Name of the loss function of a transformers model; None where it has none."""
    return getattr(getattr(model, "loss_function", None), "__name__", None)


def trained_loss(model: Module, labels: Tensor | None = None) -> TrainedLoss:
    """The loss that transformers gives a model, decided as `transformers.loss` decides it.

    Sequence classifiers have the mean over their outputs of the squared error (without 1/2) or of
    the binary cross-entropy, by `problem_type`. Where that is not written, transformers looks at
    the labels: class numbers mean softmax, other numbers a sigmoid for each. Without labels the
    names of the labels decide (`heads.read_head`), and last softmax is assumed. A module that is
    not of transformers, with a config, has the losses of `ggn.random_root`.

    Args:
        model: The model; its `config` may have `problem_type`, `num_labels` and `id2label`.
        labels: Labels that it trains with, if they are known.
    """
    name, config = loss_name(model), getattr(model, "config", None)
    if name is not None and name != SEQUENCE:
        shifts = name not in _IN_PLACE and not getattr(config, "is_encoder_decoder", False)
        return TrainedLoss("categorical", False, shifts, f"transformers gives it {name}")
    problem, outputs = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    averages = name == SEQUENCE
    if problem is None and outputs > 1 and labels is not None:
        is_class = labels.dtype in (torch.long, torch.int)
        reason = "its labels are class numbers" if is_class else "its labels are no class numbers"
        return TrainedLoss("categorical" if is_class else "bernoulli", averages, True, reason)
    head = head_of(config)
    if head.likelihood is None:
        return TrainedLoss("categorical", averages, True, f"assumed: {head.reason}")
    return TrainedLoss(head.likelihood, averages, True, head.reason)


def scored_logits(
    logits: Tensor, labels: Tensor | None, tokens: Tensor | None, *, shifts: bool = True
) -> Tensor:
    """Return the logits that the loss looks at, shape (n, C).

    Args:
        logits: Of a model of tokens (batch, length, C), of a classifier (batch, C).
        labels: Of a model of tokens (batch, length); a label that is not -100 is scored. None, or
            of another shape, for a classifier.
        tokens: Input tokens (batch, length).
        shifts: A label is scored by the token before it, as in a causal language model, and not
            by its own.
    """
    if labels is not None and _by_token(logits, labels, tokens):
        if shifts:
            return logits[:, :-1][labels[:, 1:] != _IGNORED]
        return logits[labels != _IGNORED]
    return logits.reshape(-1, logits.shape[-1])


def scored_targets(
    logits: Tensor, labels: Tensor | None, tokens: Tensor | None, *, shifts: bool = True
) -> Tensor | None:
    """Return the observed labels of the logits that `scored_logits` returns, in their order.

    Returns:
        Class numbers, shape (n,), or numbers, shape (n, C) or (n,) for one output; None without
        labels. The arguments are those of `scored_logits`.
    """
    if labels is None or not _by_token(logits, labels, tokens):
        return labels
    shown = labels[:, 1:] if shifts else labels
    return shown[shown != _IGNORED]


def numbers(logits: Tensor) -> Tensor:
    """Return the logits, of which some may be -inf: a class that the model rules out.

    Args:
        logits: Shape (n, C).

    Raises:
        CheckpointError: The probabilities are not numbers.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise CheckpointError(
            "the model's outputs on the data are not numbers. Its weights hold NaN or infinity, or "
            f"its outputs overflow in {str(logits.dtype).removeprefix('torch.')}. Take weights "
            "that are numbers, and float32 to compute with."
        )
    return logits


def _by_token(logits: Tensor, labels: Tensor | None, tokens: Tensor | None) -> bool:
    """Whether each token has a label of its own."""
    has_labels = labels is not None and tokens is not None and labels.shape == tokens.shape
    return has_labels and logits.ndim == 3


def likelihood(model: Module, labels: Tensor | None = None) -> Likelihood:
    """Return the likelihood of the loss that a model trains with; see `trained_loss`."""
    return trained_loss(model, labels).likelihood
