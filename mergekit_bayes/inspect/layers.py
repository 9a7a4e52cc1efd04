"""Group tensors into layers by name."""

import re
from typing import Any

_NUMBERED = re.compile(r"^(.*?(?:^|\.)\d+)(?=\.)")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed\w*|tok_embeddings|shared|\w*embeddings?)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|cls|qa_outputs|pooler)(\.|$)")


def group_layers(names: list[str]) -> dict[str, list[str]]:
    """Names by layer: embeddings first, numbered layers in order, the rest, the head."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        groups.setdefault(_layer_key(name), []).append(name)
    return {str(key[-1]): groups[key] for key in sorted(groups)}


def _layer_key(name: str) -> tuple[Any, ...]:
    if _HEAD.search(name):
        return (3, "", 0, "head")
    if numbered := _NUMBERED.match(name):
        stack, _, index = numbered[1].rpartition(".")
        return (1, stack, int(index), numbered[1])
    return (0, "", 0, "embeddings") if _EMBEDDING.search(name) else (2, "", 0, "rest")
