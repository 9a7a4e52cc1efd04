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

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.adapt.losses import log_likelihood
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.teacher import run, scored
from mergekit_bayes.adapt.weights import places_of, pooled, read_start
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.models.modes import differentiable, evaluating
from mergekit_bayes.models.places import Place
from mergekit_bayes.models.sampling import prior_obstacle
from mergekit_bayes.posterior import open_posterior
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
    with evaluating(model), differentiable(model, {id(parameter) for parameter in parameters}):
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


def refuse_unknown_variance(config: AdaptConfig) -> None:
    """Refuse a model whose stored posterior gives its weights no variance. Reads headers only.

    Raises:
        CheckpointError: There is no such model, or a file cannot be read.
        ConfigError: There is no precision, or it has no proper prior.
        PrecisionError: The record of the precision cannot be read.
    """
    with open_posterior(config.model, precision=config.precision) as posterior:
        obstacle = (
            prior_obstacle(posterior.info) if posterior.has_precision else "none is stored with it"
        )
    if obstacle is not None:
        raise ConfigError(
            f"memory_select: leverage needs the posterior of '{config.model}', but {obstacle}. "
            f"Make one with `bmerge precision {config.model} --data TEXTS --prior X`, or choose "
            "random."
        )


def read_variances(config: AdaptConfig, loaded: Loaded) -> list[Variance]:
    """Read the variance of each weight from the stored posterior, sigma^2 = 1/S_0.

    S_0 is that of the K-prior, as `weights.read_start` scales it and `config.pool` pools it. Its
    prior, without which `refuse_unknown_variance` refuses it, bounds every variance.

    Args:
        config: The settings.
        loaded: The model, without an adapter put on it; the variances go to its device.

    Raises:
        MismatchError: The names or shapes of the precision are not the model's.
        PrecisionError: It was taken at other weights, or has entries that are no precision.
    """
    with open_posterior(config.model, precision=config.precision) as posterior:
        places = places_of(loaded, posterior)
    start = read_start(config, places, UNIT[loaded.task])
    variances = []
    for place in places:
        precision = pooled(start.precision[place.name], place.shape, config.pool)
        variances.append(Variance(place, precision.reciprocal()))
    return variances
