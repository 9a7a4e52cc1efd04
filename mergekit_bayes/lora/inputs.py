"""What a merge of adapters works on: the adapters, their scales, and who holds which layer."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.layers import Factors, Layer

Space = Literal["product", "concat", "factor"]
Weights = Literal["uniform", "precision"]


class LayerCopy(NamedTuple):
    """A layer as one adapter holds it."""

    owner: int  # index of the adapter
    layer: Layer


class TensorCopy(NamedTuple):
    """A tensor of `modules_to_save` as one adapter holds it."""

    owner: int  # index of the adapter
    disk: str  # its name on disk


# By the first adapter's name, the copies of those adapters that hold the layer or the tensor.
Layers = Mapping[str, Sequence[LayerCopy]]
Replacements = Mapping[str, Sequence[TensorCopy]]


class AdapterMerge(NamedTuple):
    """Adapters and how each one counts.

    Attributes:
        adapters: The adapters.
        scales: c_t, one per adapter.
        counts: Number of observations for which each precision is counted; None as recorded.
        weights: Whether entries are weighed by precision.
        seed: Seed of the SVD of large layers.
        averaged: In factor space, factors are averaged because they started from one A.
    """

    adapters: Sequence[Adapter]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    weights: Weights
    seed: int
    averaged: bool = False

    def scaled(self, copy: LayerCopy) -> Factors:
        """A and `s B` of a layer, in float64."""
        a, b = self.adapters[copy.owner].factors(copy.layer)
        return Factors(a.astype(np.float64), copy.layer.scaling * b.astype(np.float64))

    def stacked(self, copies: Sequence[LayerCopy]) -> tuple[Array, Array]:
        """`[c_1 s_1 B_1, ...]` and `[A_1; ...]`, whose product is `sum_t c_t s_t B_t A_t`."""
        factors = [self.scaled(copy) for copy in copies]
        left = [self.scales[copy.owner] * f.b for copy, f in zip(copies, factors, strict=True)]
        return np.concatenate(left, 1), np.concatenate([f.a for f in factors])


def match_adapters(adapters: Sequence[Adapter]) -> tuple[Layers, Replacements]:
    """Find the layers and the tensors of `modules_to_save` that adapters have in common.

    Returns:
        Both under the first adapter's names, with the copies in order of the adapters.

    Raises:
        MismatchError: A layer has different shapes, or is of different kinds.
    """
    layers: dict[str, list[LayerCopy]] = {}
    replacements: dict[str, list[TensorCopy]] = {}
    for index, adapter in enumerate(adapters):
        renaming = _find_renaming(adapters[0], adapter) if index else Renaming()
        for module, layer in adapter.layers.items():
            copies = layers.setdefault(renaming(f"{module}.weight").removesuffix(".weight"), [])
            first = copies[0].layer if copies else layer
            if first.shape != layer.shape:
                raise MismatchError(
                    f"'{module}' changes a weight of {list(layer.shape)} in "
                    f"'{adapter.ref}' but of {list(first.shape)} in "
                    f"'{adapters[copies[0].owner].ref}'. Were they trained on different models?"
                )
            if first.is_embedding != layer.is_embedding:
                raise MismatchError(
                    f"'{layer.module}' is a table of embeddings in one of '{adapter.ref}' and "
                    f"'{adapters[copies[0].owner].ref}', and a linear layer in the other. Were "
                    "they trained on different models?"
                )
            copies.append(LayerCopy(index, layer))
        for name, disk in adapter.replacements.items():
            replacements.setdefault(renaming(name), []).append(TensorCopy(index, disk))
    return layers, replacements


def _find_renaming(first: Adapter, other: Adapter) -> Renaming:
    """Adapters change a part of a model each, so that only their prefixes are matched."""

    def shapes(adapter: Adapter) -> dict[str, TensorSpec]:
        specs = adapter.posterior.mean.specs
        return {
            f"{module}.weight": TensorSpec("F32", (layer.rows, layer.columns))
            for module, layer in adapter.layers.items()
        } | {name: specs[disk] for name, disk in adapter.replacements.items()}

    return find_renaming(shapes(first), shapes(other), scope=Scope.MOVED)
