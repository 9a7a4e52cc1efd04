"""To which layer of a model each tensor belongs, and which are the weights of linear layers."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_buffer, is_vocabulary, output_layer
from mergekit_bayes.checkpoint.specs import TensorSpec

EMBEDDINGS = "embeddings"  # the layer of all embeddings

_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed\w*|tok_embeddings|shared|\w*embeddings?)(\.|$)")

# Other tables that are looked up, and are no matrices of a product.
_TABLE = re.compile(r"(^|\.)\w*(position|token_type|segment|relative_attention)\w*\.weight$")
# Modules of GPT-2 and its kin, which store (inputs, outputs) where others store the transpose.
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")


def linear_axes(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The weights of linear layers, judged by names and shapes: the axis of the inputs of each.

    Matrices but for tables with one row a token, a position or the like, and the heads that are
    such a table's transpose. The axis is the last one, and -2 in the modules of GPT-2: in a model
    in which a bias has the length of the last axis of its weight.
    """
    matrices = [
        name
        for name, spec in specs.items()
        if len(spec.shape) == 2
        and name.endswith(".weight")
        and not (is_vocabulary(name) or is_buffer(name))
        and not (_EMBEDDING.search(name) or _TABLE.search(name))
    ]
    is_turned = any(_bias_length(specs, name) == specs[name].shape[1] for name in _uneven(specs))
    return {n: -2 if is_turned and _CONV1D.search(n) else -1 for n in matrices}


def _uneven(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The modules of GPT-2 whose shapes tell the axes apart."""
    return [
        name
        for name, spec in specs.items()
        if _CONV1D.search(name) and len(spec.shape) == 2 and spec.shape[0] != spec.shape[1]
    ]


def _bias_length(specs: Mapping[str, TensorSpec], name: str) -> int | None:
    bias = specs.get(f"{name.removesuffix('weight')}bias")
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def group_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by layer: embeddings, numbered layers in the order of their numbers, rest, head."""
    groups: dict[_Place, list[str]] = {}
    for name in names:
        groups.setdefault(_place(name), []).append(name)
    return {place.layer: groups[place] for place in sorted(groups)}


class _Place(NamedTuple):
    """The place of a layer in the report; tuples sort by their fields in this order."""

    block: int  # 0 embeddings, 1 numbered layers, 2 rest, 3 head
    stack: str  # what stands before the number
    number: int
    layer: str


def _place(name: str) -> _Place:
    if output_layer(name):
        return _Place(3, "", 0, "head")
    if numbered := _NUMBERED.match(name):
        stack, _, index = numbered[1].rpartition(".")
        return _Place(1, stack, int(index), numbered[1])
    if _EMBEDDING.search(name):
        return _Place(0, "", 0, EMBEDDINGS)
    return _Place(2, "", 0, "rest")
