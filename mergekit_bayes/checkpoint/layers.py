"""To which layer of a model each tensor belongs, by its name."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import output_layer

EMBEDDINGS = "embeddings"  # the layer of all embeddings

_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed\w*|tok_embeddings|shared|\w*embeddings?)(\.|$)")


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
