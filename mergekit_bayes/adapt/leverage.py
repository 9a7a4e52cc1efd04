"""The leverage of examples by the memory-perturbation equation (Nickl et al., NeurIPS 2023).

Removing an example j from the data of a Gaussian posterior of precision S moves its outputs by
about `v_j e_j`, and so raises its own loss, to first order, by

    s_j  =  e_j' v_j e_j  =  sum_p sigma_p^2 g_{j,p}^2            [nats]

    e_j  = dl_j/df, the prediction error: softmax(f) - onehot(y) of each observation, or f - y
    v_j  = J_j Sigma J_j', the prediction variance, with Sigma = diag(sigma^2), sigma^2 = 1/S
    g_j  = J_j' e_j, the gradient of the loss summed over the observations of the example

The second form needs neither J_j nor v_j: one gradient an example gives the product of error and
variance, exactly for the stored diagonal. It is large where the model errs and where its weights
are uncertain, at the examples that the posterior rests on and that a memory should hold; a text
that the model wrote has `e e'` with the mean A = diag(p) - p p', so that the mean of s_j is then
the leverage `tr(A_j v_j)` of classical regression. It is a sum over the example, so that longer
examples have more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.losses import log_likelihood
from mergekit_bayes.adapt.teacher import run, scored
from mergekit_bayes.checkpoint.codec import is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.models.places import Place, find_places
from mergekit_bayes.models.sampling import open_stored, sampling_obstacle
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.records import FloatArray


class Variance(NamedTuple):
    """The posterior variance of the weights at one place of a model.

    Attributes:
        place: Where they are.
        sigma2: 1/S, weight^2: of the shape of the place or one that broadcasts to it.
    """

    place: Place
    sigma2: Tensor


def self_influence(
    model: Module, batches: Iterable[Mapping[str, Tensor]], variances: Sequence[Variance]
) -> FloatArray:
    """The leverage `s_j` of single examples, in nats of the summed loss.

    One forward and one backward of one example each; no draws. Beside the model it needs one
    gradient and the variances, two numbers a weight.

    Args:
        model: A causal language model or a sequence classifier. Its mode, its gradients and which
            of its parameters require one are as before afterwards.
        batches: Of one example each, from `models.encode.Collate`, with labels, on the device of
            the model.
        variances: Of all weights that count; weights without one are taken as known.

    Returns:
        (examples,)
    """
    parameters = list({id(v.place.parameter): v.place.parameter for v in variances}.values())
    scores = []
    with _differentiable(model, parameters):
        for batch in batches:
            loss = _summed_loss(model, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            by_parameter = dict(zip(map(id, parameters), gradients, strict=True))
            score = torch.zeros((), dtype=torch.float64, device=loss.device)
            for place, sigma2 in variances:
                gradient = by_parameter[id(place.parameter)]
                if gradient is not None:
                    square = place.view(gradient.contiguous()).float().square()
                    score += (sigma2 * square).sum(dtype=torch.float64)
            scores.append(score)
    return np.array([float(score) for score in scores])


def _summed_loss(model: Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that the model trains with, summed over the observations of a batch."""
    logits, labels = scored(run(model, batch), batch["labels"], batch["input_ids"])
    loss = trained_loss(model, batch["labels"])
    scale = loss.scale(logits.shape[-1])
    return -scale * log_likelihood(logits, labels, loss.likelihood).sum()


@contextmanager
def _differentiable(model: Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """The model in eval mode, with gradients of these parameters; afterwards as before."""
    required = [parameter.requires_grad for parameter in parameters]
    with evaluating(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, was_required in zip(parameters, required, strict=True):
                parameter.requires_grad_(was_required)


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def refuse_unknown_variance(ref: str) -> None:
    """Refuse a model whose stored posterior gives its weights no variance. Reads headers only.

    Raises:
        ConfigError: There is no precision, it is of other weights, or it has no proper prior.
        CheckpointError: There is no such model, or a file cannot be read.
        PrecisionError: The record of the precision cannot be read.
    """
    with open_stored(ref) as posterior:
        _refuse_unknown(ref, posterior)


def read_variances(
    ref: str, model: Module, *, pool: Literal["tensor", "row"] | None = None
) -> list[Variance]:
    """Read the variance of each weight from the stored posterior, sigma^2 = 1/S.

    Args:
        ref: The model as the user named it; of an adapter its own posterior is read.
        model: The same model, loaded; the variances go to the devices of its parameters.
        pool: Replace S by its mean over each tensor or row first.

    Raises:
        ConfigError: As `refuse_unknown_variance`.
        MismatchError: The names or shapes of the precision are not the model's.
        PrecisionError: It has entries that are negative, zero or not finite.
    """
    with open_stored(ref) as posterior:
        _refuse_unknown(ref, posterior)
        source = posterior.precision
        assert source is not None
        variances = []
        for place in find_places(model, posterior):
            stored = _pooled(read_tensor(source, place.name), pool)
            bad = int(np.count_nonzero(is_bad_precision(stored) | (stored == 0)))
            if bad:
                raise PrecisionError(
                    f"{source.where(place.name)}: the precision of '{place.name}' has {bad} "
                    "entries that are zero, negative or not finite. Estimate it again."
                )
            sigma2 = torch.from_numpy(np.asarray(np.float32(1) / stored))
            variances.append(Variance(place, sigma2.to(place.parameter.device)))
    return variances


def _refuse_unknown(ref: str, posterior: Posterior) -> None:
    if not posterior.has_precision:
        obstacle: str | None = "none is stored with it"
    elif posterior.info is not None and posterior.info.mean.blocks != posterior.identity:
        obstacle = "the stored one was taken at other weights"
    else:
        obstacle = sampling_obstacle(posterior.info)
    if obstacle is not None:
        raise ConfigError(
            f"memory_select: `leverage` needs the posterior of '{ref}': {obstacle}. Make one with "
            f"`bmerge precision {ref} --data TEXTS --prior X`, or choose `random`."
        )


def _pooled(precision: Array, pool: Literal["tensor", "row"] | None) -> Array:
    """The precision, or its mean over each row (a slice of the first axis) or over the tensor."""
    if pool is None:
        return precision
    axes = tuple(range(pool == "row", precision.ndim))
    pooled: Array = precision.mean(axis=axes, keepdims=True, dtype=np.float64).astype(np.float32)
    return pooled
