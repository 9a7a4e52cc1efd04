"""LoRA adapters: an adapter on its base as a dense posterior, and merges of adapters into one.

A layer of an adapter changes a weight by `dW = s B A` (Hu et al., *LoRA*, ICLR 2022).
`BASE+ADAPTER` is the posterior with mean `W + dW`, whose entries are computed as they are read, and
with the precision that follows from the factors' precisions.
"""

from mergekit_bayes.lora.adapted import AdaptedSource, ProductPrecision
from mergekit_bayes.lora.adapter import (
    INITIAL_A,
    Adapter,
    initial_identity,
    is_adapter,
    open_adapter,
)
from mergekit_bayes.lora.dense import VARIANCE_FLOOR
from mergekit_bayes.lora.merging import merge_adapters
from mergekit_bayes.lora.opening import (
    open_adapted,
    open_model,
    refuse_other_base,
    split_ref,
)
from mergekit_bayes.lora.report import AdapterReport, MergedLayer

__all__ = [
    "INITIAL_A",
    "VARIANCE_FLOOR",
    "AdaptedSource",
    "Adapter",
    "AdapterReport",
    "MergedLayer",
    "ProductPrecision",
    "initial_identity",
    "is_adapter",
    "merge_adapters",
    "open_adapted",
    "open_adapter",
    "open_model",
    "refuse_other_base",
    "split_ref",
]
