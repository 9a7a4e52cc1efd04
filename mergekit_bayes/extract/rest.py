"""What changed beside the matrices of layers, and how an adapter of PEFT can hold it.

A module without factors is stored whole (`modules_to_save`); its forward pass is then the stored
module's. The bias of an adapted layer changes by a bias of the factor B (`lora_bias`), which PEFT
has for all adapted layers or for none.
"""

from collections.abc import Mapping
from typing import NamedTuple

from mergekit_bayes.extract.modules import Kind, Modules
from mergekit_bayes.extract.report import ExtractedLayer, OtherChange

_NO_BIAS = "a bias of an adapted layer, and not every adapted layer has one for lora_bias"
_EMBEDDED = (
    "a bias of an adapted layer, and PEFT has no lora_bias beside adapted embeddings: --rest "
    "stores it without --embeddings"
)
_INSIDE = "a parameter of a module with others inside, which PEFT does not replace alone"
_OF_TABLE = "of a table or head of the vocabulary, which is not stored whole"


class Rest(NamedTuple):
    """How the rest is stored.

    Attributes:
        whole: The modules that are stored whole, by PEFT's names.
        biases: The biases whose change is stored, by the base's names.
        others: What to report of each changed tensor without factors.
    """

    whole: tuple[str, ...]
    biases: tuple[str, ...]
    others: dict[str, OtherChange]


def store_rest(
    modules: Modules, layers: Mapping[str, ExtractedLayer], others: Mapping[str, OtherChange]
) -> Rest:
    """Decide how each changed tensor without factors is stored.

    Args:
        modules: The modules of the model.
        layers: The adapted weights by module.
        others: The changed tensors without factors, by the base's names.
    """
    members: dict[str, list[str]] = {}
    kinds: dict[str, set[Kind]] = {}
    for place in modules.places.values():
        members.setdefault(place.module, []).append(place.tensor)
        kinds.setdefault(place.module, set()).add(place.kind)
    parents = {path for module in members for path in _parents(module)}
    why_no_bias = _why_no_bias(layers, members)
    whole: set[str] = set()
    biases: list[str] = []
    decided = {}
    for name, other in others.items():
        place = modules.places[name]
        decided[name] = other
        if place.kind is not Kind.REST:
            continue
        if place.module in layers:
            why = why_no_bias if place.tensor == "bias" else _INSIDE
            if why is None:
                biases.append(name)
        elif kinds[place.module] - {Kind.REST, Kind.LINEAR}:
            why = _OF_TABLE
        elif not place.module or place.module in parents:
            why = _INSIDE
        else:
            why = None
            whole.add(place.module)
        stored = "as lora_bias" if place.module in layers else "whole (modules_to_save)"
        decided[name] = other.model_copy(
            update={"why": why or f"stored {stored}", "stored": why is None}
        )
    return Rest(tuple(sorted(whole)), tuple(biases), decided)


def _why_no_bias(
    layers: Mapping[str, ExtractedLayer], members: Mapping[str, list[str]]
) -> str | None:
    if any(layer.kind == Kind.EMBEDDING.value for layer in layers.values()):
        return _EMBEDDED
    has_all = all("bias" in members.get(module, ()) for module in layers)
    return None if has_all else _NO_BIAS


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
