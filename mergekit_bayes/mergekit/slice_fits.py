"""Refuse slices whose layers do not follow each other in one model.

The output has the config of the model whose layers come first, so that all of its layers must be of
kinds that this model has: with the same tensors, of the same shapes. Layers of one model may differ
(dense ones and ones of experts, heads in other numbers), so that a layer need not be like all of
them: each of its tensors must be in one of them, and it must have those that are in all of them.
Constants that some checkpoints store and others compute do not count.
"""

from collections.abc import Mapping, Sequence

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.mergekit.layers import ModelNames, find_stack, range_of
from mergekit_bayes.mergekit.objects import Slice
from mergekit_bayes.posterior import Posterior

_Shapes = dict[str, tuple[int, ...]]  # of the tensors of a layer, by what stands behind its number


def refuse_misfits(
    slices: Sequence[Slice],
    rows: Sequence[Sequence[ModelNames]],
    models: Mapping[str, Posterior],
    label: str,
) -> None:
    """Refuse a slice whose first model has layers of another kind than the first slice's.

    The other models of a slice are matched with its first one, as whole models are.

    Args:
        slices: The slices, from below.
        rows: The names of the models of their sources.
        models: The models, by how recipes write them.
        label: The recipe's label, for messages.

    Raises:
        MismatchError: Such a slice; the message names its key.
    """
    first = models[str(slices[0].sources[0].model)]
    known = _layers(rows[0][0], first)
    for piece, (names, *_) in zip(slices, rows, strict=True):
        source = piece.sources[0]
        model = models[str(source.model)]
        if model is first:
            continue
        layers = _layers(names, model)
        for number in range(*range_of(source)):
            misfit = _misfit(layers[number], list(known.values()))
            if misfit is not None:
                raise MismatchError(
                    f"{label}: {source.place}.model: layer {number} of '{model.ref}' {misfit} of "
                    f"'{first.ref}', whose config.json the output has. Take slices of models of "
                    "one architecture and one width."
                )


def _layers(names: ModelNames, model: Posterior) -> dict[int, _Shapes]:
    layers: dict[int, _Shapes] = {}
    for (number, tail), name in find_stack(names).inside.items():
        if not is_buffer(name):
            layers.setdefault(number, {})[tail.lstrip(".")] = model.mean.specs[name].shape
    return layers


def _misfit(layer: _Shapes, known: Sequence[_Shapes]) -> str | None:
    """What a layer has that none of the known ones has, or lacks that all have; None if nothing."""
    for tail, shape in layer.items():
        shapes = [other[tail] for other in known if tail in other]
        if not shapes:
            return f"has '{tail}', which is in no layer"
        if shape not in shapes and len(set(shapes)) == 1:
            return f"has '{tail}' of {list(shape)}, expected {list(shapes[0])} as in the layers"
    for tail in known[0]:
        if tail not in layer and all(tail in other for other in known):
            return f"lacks '{tail}', which is in all layers"
    return None
