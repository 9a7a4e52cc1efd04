"""Merge one layer in the space that the settings choose."""

from collections.abc import Sequence

from mergekit_bayes.lora.core import merge_cores
from mergekit_bayes.lora.factors import merge_factors
from mergekit_bayes.lora.inputs import AdapterMerge, LayerCopy, Space
from mergekit_bayes.lora.products import merge_products
from mergekit_bayes.lora.truncate import Truncated


def merge_layer(
    merge: AdapterMerge, space: Space, rank: int, module: str, copies: Sequence[LayerCopy]
) -> Truncated:
    """Merge one layer.

    Args:
        merge: The adapters.
        space: The space in which their changes are merged.
        rank: Rank of the result.
        module: The layer's name.
        copies: The layer as each adapter holds it.

    Raises:
        CheckpointError: The change is beyond float32.
        MismatchError: What a method cannot merge.
        PrecisionError: Something is weighed, and a precision is missing.
    """
    if space == "factor":
        return merge_factors(merge, rank, copies)
    if space == "core":
        return merge_cores(merge, rank, module, copies)
    return merge_products(merge, space, rank, module, copies)
