"""What a merge of adapters works on: the adapters, their scales, and who holds which layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.experts import by_expert
from mergekit_bayes.lora.layers import Factors, Layer
from mergekit_bayes.lora.parameters import WEIGHT
from mergekit_bayes.lora.rules import Rule
from mergekit_bayes.lora.writers import FOLD_ALL
from mergekit_bayes.methods.base import Facts

_SINGLE = re.compile(r"(?P<owner>.+)\.\d+\.\w+")  # a module of one expert
_OTHER_MODEL = "Were they trained on different models?"
_OTHER_ORDER = (
    f"The factors of experts have another order in PEFT before 0.19.1. Fold instead: {FOLD_ALL}."
)
Space = Literal["product", "concat", "factor", "core"]
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
        rule: In core space, the method by which cores are merged.
        facts: In core space, what the method found in all layers before it merges one.
    """

    adapters: Sequence[Adapter]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    weights: Weights
    seed: int
    averaged: bool = False
    rule: Rule | None = None
    facts: Facts = None

    def scaled(self, copy: LayerCopy) -> Factors:
        """A and `s B` of a layer, in float64."""
        a, b = self.adapters[copy.owner].factors(copy.layer)
        return Factors(a.astype(np.float64), copy.layer.scaling * b.astype(np.float64))

    def stacked(
        self, copies: Sequence[LayerCopy], *, with_scales: bool = True
    ) -> tuple[Array, Array]:
        """`[c_1 s_1 B_1, ...]` and `[A_1; ...]`, whose product is `sum_t c_t s_t B_t A_t`.

        Args:
            copies: The layer as each adapter holds it, at least one.
            with_scales: Whether the c_t are multiplied in.
        """
        ends = np.cumsum([0, *(copy.layer.rank for copy in copies)])
        layer = copies[0].layer
        left, right = np.empty((layer.rows, ends[-1])), np.empty((ends[-1], layer.columns))
        for copy, start, stop in zip(copies, ends, ends[1:], strict=False):
            right[start:stop], b = self.adapters[copy.owner].factors(copy.layer)
            np.multiply(b, copy.layer.scaling, out=left[:, start:stop], dtype=np.float64)
            if with_scales:
                left[:, start:stop] *= self.scales[copy.owner]
        return left, right


def match_adapters(adapters: Sequence[Adapter]) -> tuple[Layers, Replacements]:
    """Find the layers and the tensors of `modules_to_save` that adapters have in common.

    Returns:
        Both under the first adapter's names, with the copies in order of the adapters; stacked
        experts one by one.

    Raises:
        MismatchError: A layer has different shapes or kinds, or experts are stacked in some
            adapters only.
    """
    stacks: dict[str, list[LayerCopy]] = {}
    replacements: dict[str, list[TensorCopy]] = {}
    for index, adapter in enumerate(adapters):
        renaming = _find_renaming(adapters[0], adapter) if index else Renaming()
        for layer in adapter.layers.values():
            name = renaming(layer.tensor).removesuffix(f".{WEIGHT}")
            copies = stacks.setdefault(name, [])
            first = copies[0].layer if copies else layer
            if first.shape != layer.shape:
                is_other_order = layer.experts > 1 and first.shape[::2] == layer.shape[:2]
                raise MismatchError(
                    f"'{layer.tensor}' changes a weight of {list(layer.shape)} in "
                    f"'{adapter.ref}' but of {list(first.shape)} in "
                    f"'{adapters[copies[0].owner].ref}'. "
                    + (_OTHER_ORDER if is_other_order else _OTHER_MODEL)
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
    _refuse_mixed_experts(adapters, stacks)
    layers: dict[str, list[LayerCopy]] = {}
    for name, copies in stacks.items():
        for copy in copies:
            for key, layer in by_expert(name, copy.layer).items():
                layers.setdefault(key, []).append(LayerCopy(copy.owner, layer))
    return layers, replacements


def _refuse_mixed_experts(adapters: Sequence[Adapter], stacks: Layers) -> None:
    """Refuse adapters of which some adapt stacked experts and some single ones of the same stack.

    Raises:
        MismatchError: There are some.
    """
    owners = {
        name.rpartition(".")[0]: copies[0]
        for name, copies in stacks.items()
        if copies[0].layer.experts > 1
    }
    for name, copies in stacks.items():
        match = _SINGLE.fullmatch(name)
        if match and match["owner"].replace(".block_sparse_moe.", ".mlp.") in owners:
            other = owners[match["owner"].replace(".block_sparse_moe.", ".mlp.")]
            raise MismatchError(
                f"'{adapters[copies[0].owner].ref}' adapts single experts ('{name}'), and "
                f"'{adapters[other.owner].ref}' stacked ones ('{other.layer.tensor}'): they come "
                "from different versions of transformers. Fold "
                f"instead: {FOLD_ALL}."
            )


def _find_renaming(first: Adapter, other: Adapter) -> Renaming:
    """Adapters change a part of a model each, so that only their prefixes are matched."""

    def shapes(adapter: Adapter) -> dict[str, TensorSpec]:
        specs = adapter.posterior.mean.specs
        return {
            layer.tensor: TensorSpec("F32", (layer.rows, layer.columns))
            for layer in adapter.layers.values()
        } | {name: specs[disk] for name, disk in adapter.replacements.items()}

    return find_renaming(shapes(first), shapes(other), scope=Scope.MOVED)
