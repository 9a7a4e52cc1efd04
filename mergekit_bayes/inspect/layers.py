"""Which tensors of a checkpoint are parameters, and to which layer each belongs, by their names."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_buffer, output_layer
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.posterior.forms import is_form_of

_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed\w*|tok_embeddings|shared|\w*embeddings?)(\.|$)")


def is_parameter(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is a parameter: a floating-point one that is no known buffer."""
    return not is_buffer(name) and spec.dtype in MERGEABLE


def count_dtypes(specs: Mapping[str, TensorSpec], names: Iterable[str]) -> dict[str, int]:
    """Entries of these tensors by the dtype that holds them."""
    counts = Counter[str]()
    for name in names:
        counts[specs[name].dtype] += specs[name].size
    return dict(counts)


def unknown_tensors(
    precision: Mapping[str, TensorSpec], mean: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    """Tensors of a precision that the model lacks, or that have no form of the model's tensor."""
    return tuple(
        name
        for name, spec in precision.items()
        if name not in mean or not is_form_of(spec, mean[name])
    )


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
        return _Place(0, "", 0, "embeddings")
    return _Place(2, "", 0, "rest")
