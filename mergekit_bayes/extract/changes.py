"""The changes of a model, tensor by tensor: which become factors, and what the others cost."""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.names import is_token_embedding
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.extract.approximate import Approximation, Limits, approximate
from mergekit_bayes.extract.matching import Pairing
from mergekit_bayes.extract.modules import Kind, Modules, Place
from mergekit_bayes.extract.precisions import Precisions, flat_shape
from mergekit_bayes.extract.report import ExtractedLayer, OtherChange
from mergekit_bayes.extract.weighting import half_square, uniform
from mergekit_bayes.posterior import Posterior

NEEDS_EMBEDDINGS = "an embedding or a head of the vocabulary: --embeddings adapts them"
SHARED = "shared by several modules, of which PEFT adapts one"
BEYOND = "no matrix of a linear layer: --rest stores what PEFT can replace"
EXPERTS = (
    "a part of the experts, which transformers 5 keeps as parameters of one module: train an "
    "adapter of them by PEFT (target_parameters), or keep the whole model"
)
FOREIGN = "a table or a head whose module PEFT does not adapt, or knows by another name"
ROUNDING = "no more than rounding, or all within the tolerance"


class Models(NamedTuple):
    """What an extraction reads.

    Attributes:
        tuned: The tuned model.
        base: Its base.
        pairing: Which tensors are one.
        modules: To which modules they belong.
        precisions: What weighs them.
    """

    tuned: Posterior
    base: Posterior
    pairing: Pairing
    modules: Modules
    precisions: Precisions

    def values(self, name: str) -> tuple[Array, Array]:
        """The tuned and the base's values of a tensor, by the base's name.

        Raises:
            CheckpointError: One of them has entries that are not finite.
        """
        other = self.pairing.tuned[name]
        found = []
        for model, stored in ((self.tuned, other), (self.base, name)):
            values = read_tensor(model.mean, stored)
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{model.mean.where(stored)}: '{stored}' has entries that are not finite, of "
                    "which no change can be taken. Did training diverge?"
                )
            found.append(values)
        return found[0], found[1]


class Change(NamedTuple):
    """What became of one tensor.

    Attributes:
        place: Where it belongs.
        factors: Its factors; None where it has none.
        layer: What to report of them.
        other: What to report where it has none; None for a tensor that did not change.
    """

    place: Place
    factors: Approximation | None = None
    layer: ExtractedLayer | None = None
    other: OtherChange | None = None


def heads_tied_to(models: Models, name: str) -> tuple[str, ...] | None:
    """The modules of the heads that are one tensor with an embedding.

    Returns:
        Empty for an embedding that is tied to nothing; None where it is tied to what PEFT does not
        adapt with it.
    """
    tied = models.pairing.tied.get(name)
    if tied is None:
        return ()
    is_head = models.modules.task == "CAUSAL_LM" and is_token_embedding(name) and len(tied) == 1
    return (tied[0].rpartition(".")[0],) if is_head else None


def read_change(
    models: Models, name: str, limits: Limits, *, embeddings: bool, seed: int = 0
) -> Change:
    """Read a tensor of both models, and approximate its change if it is adapted.

    Args:
        models: The models.
        name: The base's name.
        limits: What a layer may have and lose.
        embeddings: Whether embeddings and heads are adapted.
        seed: Seed of the decomposition of large matrices.

    Raises:
        CheckpointError: An entry is not finite, or the change is beyond the factors' format.
        PrecisionError: The precision of the tensor cannot be used.
    """
    place = models.modules.places[name]
    change, norm = _difference(*models.values(name))
    if not np.isfinite(change).all():
        raise CheckpointError(
            f"'{name}' differs by more than float32 holds between '{models.tuned.ref}' and "
            f"'{models.base.ref}'. Are they of one model, and did training diverge?"
        )
    if not change.any():
        return Change(place)
    why = _without_factors(models, name, place.kind, embeddings=embeddings)
    weighting = models.precisions.weighting(models.pairing.tuned[name])
    unit = models.precisions.unit_of(models.pairing.tuned[name])
    is_known = weighting is not None or not models.precisions.weighs
    by = weighting or uniform((change.shape[0], change.shape[1]))
    if why is None:
        try:
            found = approximate(change, by, limits, weight_norm=norm, seed=seed)
        except CheckpointError as error:
            raise CheckpointError(f"'{name}' of '{models.tuned.ref}': {error}") from None
        if found.rank:
            layer = ExtractedLayer(
                kind=place.kind.value,
                rank=found.rank,
                unit=unit,
                change=found.change if is_known else None,
                lost=found.lost if is_known else None,
                norm=found.norm,
                lost_norm=found.lost_norm,
                sweeps=found.sweeps,
            )
            return Change(place, found, layer)
        why = ROUNDING
    loss = by.loss(change) if is_known else None
    norm = float(np.sqrt(2 * half_square(change)))
    is_whole = place.kind is Kind.WHOLE
    other = OtherChange(why=why, stored=is_whole, unit=unit, change=loss, norm=norm)
    return Change(place, other=other)


def _difference(tuned: Array, base: Array) -> tuple[Array, float]:
    """The change of a tensor as a float32 matrix, and the Frobenius norm of the tuned one.

    Both are done with afterwards: memory holds no third tensor.
    """
    norm = float(np.sqrt(2 * half_square(tuned)))
    dtype = np.promote_types(tuned.dtype, base.dtype)
    change = tuned.astype(dtype, copy=False)
    change -= base
    with np.errstate(over="ignore"):
        return change.astype(np.float32, copy=False).reshape(flat_shape(tuned.shape)), norm


def _without_factors(models: Models, name: str, kind: Kind, *, embeddings: bool) -> str | None:
    """Why a changed tensor gets no factors; None if it does."""
    if kind is Kind.WHOLE:
        return f"stored whole, as PEFT does for {models.modules.task}"
    by_kind = {Kind.REST: BEYOND, Kind.EXPERT: EXPERTS, Kind.FOREIGN: FOREIGN}
    if kind in by_kind:
        return by_kind[kind]
    if kind is Kind.LINEAR:
        return None
    if not embeddings:
        return NEEDS_EMBEDDINGS
    return SHARED if heads_tied_to(models, name) is None else None
