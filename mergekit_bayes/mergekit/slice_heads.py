"""The output head of a merge of slices, where some of the models tie theirs to the embedding.

The embedding of the output is made of the models of the first slice, its head of those of the last
one. A model that stores no head, because it is tied to the embedding, contributes its own embedding
to the head. Where the models of the first slice have no heads of their own, and those of the last
one store none, the output has none either, and its head is its embedding; mergekit 0.1.5 does the
same.

Where all models of the last slice are tied and those of the first are not, mergekit 0.1.5 writes no
head, and a loader makes one up at random. Here it is made of their embeddings.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.ties import find_ties, resolve, ties_embeddings
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.mergekit.layers import OutputTensor, is_behind
from mergekit_bayes.mergekit.objects import Slice
from mergekit_bayes.posterior import Posterior

Shape = tuple[int, ...]


def config_of(model: Posterior) -> dict[str, Any]:
    """The config.json of a model, of BASE+ADAPTER that of the base; empty without one."""
    return read_config(model.parts[0].path if model.parts else model.path)


def with_heads(
    tensors: Sequence[OutputTensor],
    slices: Sequence[Slice],
    models: Mapping[str, Posterior],
    *,
    unties: bool,
    may_lack: bool,
    label: str,
) -> list[OutputTensor]:
    """The tensors of a merge of slices, with heads that are made of the heads of the last slice.

    Args:
        tensors: The tensors as their names say.
        slices: The slices, from below.
        models: The models, by how recipes write them.
        unties: Whether the config of the output says that a head is a tensor of its own.
        may_lack: Whether a rule decides what becomes of a tensor that some models lack.
        label: The recipe's label, for messages.

    Raises:
        MismatchError: A model of the last slice has lost its head.
    """
    first, last = (
        [models[str(s.model)] for s in piece.sources] for piece in (slices[0], slices[-1])
    )
    laid = {tensor.name: tensor for tensor in tensors}
    for head, shape in _heads(models.values()).items():
        own = {id(model): _own_head(head, shape, model) for model in (*first, *last)}
        is_apart = unties or head in own.values()
        is_apart |= head in laid and [*map(id, first)] != [*map(id, last)]
        if not is_apart:
            continue  # tied in all models: one tensor
        names = tuple(own[id(model)] for model in last)
        for source, model, name in zip(slices[-1].sources, last, names, strict=True):
            if name is None and not (may_lack and any(names)):
                raise MismatchError(
                    f"{label}: {source.place}.model: '{model.ref}' has no '{head}', of which the "
                    f"head of the output is made. {_why(model)}"
                )
        laid[head] = OutputTensor(head, len(slices) - 1, 0.0, names)
    return list(laid.values())


def _heads(models: Iterable[Posterior]) -> dict[str, Shape]:
    """The heads behind the layers that models store and that others may tie, with their shapes."""
    heads: dict[str, Shape] = {}
    for model in models:
        shapes = _shapes(model)
        for tie in find_ties(shapes):
            heads |= {n: shapes[n] for n in tie.heads if n in shapes and is_behind(n)}
    return heads


def _shapes(model: Posterior) -> dict[str, Shape]:
    return {name: spec.shape for name, spec in model.mean.specs.items()}


def _own_head(head: str, shape: Shape, model: Posterior) -> str | None:
    """The tensor of a model that is its head: an embedding if it is tied; None if it lacks it."""
    stored = {name: name for name in model.mean.specs}
    for tie in find_ties({head: shape} | _shapes(model)):
        if head in tie.heads:
            ties_heads = ties_embeddings(config_of(model))
            return resolve(tie, model.mean, stored, ties_heads=ties_heads).get(head)
    return stored.get(head)


def _why(model: Posterior) -> str:
    if ties_embeddings(config_of(model)) is False:
        return (
            "Its config.json has tie_word_embeddings false, or leaves it out where that means the "
            "same, so that its embedding is not taken for it. Save it with its head, or set "
            "tie_word_embeddings to true if the head is the embedding."
        )
    return "It has no embedding of the same width that could be tied to it either."
