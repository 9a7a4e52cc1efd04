"""LoRA adapters: an adapter on its base as a dense posterior, and merges of adapters into one.

A layer of an adapter changes a weight by `dW = s B A` (Hu et al., *LoRA*, ICLR 2022).
`BASE+ADAPTER` is the posterior with mean `W + dW`, whose entries are computed as they are read, and
with the precision that follows from the factors' precisions.

All but what tells adapters from models is imported on first use: most merges have no adapter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mergekit_bayes.lora.config import is_adapter
from mergekit_bayes.lora.opening import (
    adapted_mean,
    open_adapted,
    open_model,
    refuse_other_base,
    split_ref,
)

if TYPE_CHECKING:
    from mergekit_bayes.lora.adapted import AdaptedSource, ProductPrecision
    from mergekit_bayes.lora.adapter import INITIAL_A, Adapter, initial_identity, open_adapter
    from mergekit_bayes.lora.dense import VARIANCE_FLOOR
    from mergekit_bayes.lora.merging import merge_adapters
    from mergekit_bayes.lora.report import AdapterReport, MergedLayer

__all__ = [
    "INITIAL_A",
    "VARIANCE_FLOOR",
    "AdaptedSource",
    "Adapter",
    "AdapterReport",
    "MergedLayer",
    "ProductPrecision",
    "adapted_mean",
    "initial_identity",
    "is_adapter",
    "merge_adapters",
    "open_adapted",
    "open_adapter",
    "open_model",
    "refuse_other_base",
    "split_ref",
]

_MODULES = {
    "INITIAL_A": "adapter",
    "VARIANCE_FLOOR": "dense",
    "AdaptedSource": "adapted",
    "Adapter": "adapter",
    "AdapterReport": "report",
    "MergedLayer": "report",
    "ProductPrecision": "adapted",
    "initial_identity": "adapter",
    "merge_adapters": "merging",
    "open_adapter": "adapter",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
