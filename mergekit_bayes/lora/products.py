"""Merge a layer in the space of its products `s B A`: add them and truncate, or stack the factors.

product, uniform     dW = sum_t c_t s_t B_t A_t, truncated
product, precision   dW = sum_t c_t S_t dW_t / sum_t c_t S_t, S_t = 1 / (V_W + floor), truncated
concat               B = [c_1 s_1 B_1, ...], A = [A_1; ...], exact
"""

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.lora.dense import VARIANCE_FLOOR, Product, change, variance
from mergekit_bayes.lora.inputs import AdapterMerge, LayerCopy
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.lora.truncate import Truncated, as_stored, truncate_dense, truncate_product

_BLOCK = 1 << 22  # entries of a dense layer that are weighed at a time


def merge_products(
    merge: AdapterMerge,
    space: Literal["product", "concat"],
    rank: int,
    module: str,
    copies: Sequence[LayerCopy],
) -> Truncated:
    """Merge one layer.

    Args:
        merge: The adapters.
        space: Truncate the merged change, or stack the factors.
        rank: Rank of the result.
        module: The layer's name, from which the seed of its SVD is derived.
        copies: The layer as each adapter holds it.

    Raises:
        PrecisionError: Entries are weighed, and a precision is missing.
    """
    if merge.weights == "precision":
        seed = merge.seed + zlib.crc32(module.encode())
        return truncate_dense(weighted_change(merge, copies), rank, seed)
    left, right = merge.stacked(copies)
    if space == "concat":
        return as_stored(Factors(right, left), rank, left, right)
    return truncate_product(left, right, rank)


def weighted_change(merge: AdapterMerge, copies: Sequence[LayerCopy]) -> Array:
    """`sum_t c_t S_t dW_t / sum_t c_t S_t` over the adapters that hold the layer.

    Args:
        merge: The adapters, all with a precision.
        copies: The layer as each adapter holds it.

    Raises:
        PrecisionError: A precision is missing.

    Returns:
        float32, shape (d_out, d_in); computed some rows at a time.
    """
    layer = copies[0].layer
    nonzero = [copy for copy in copies if merge.scales[copy.owner]]
    products = [(merge.scales[copy.owner], *_products(merge, copy)) for copy in nonzero]
    merged: Array = np.zeros((layer.rows, layer.columns), np.float32)
    height = max(1, _BLOCK // max(1, layer.columns))
    for start in range(0, layer.rows if products else 0, height):
        rows = slice(start, start + height)
        total: Array = np.zeros((1, layer.columns), np.float32)
        for scale, delta, variances in products:
            weight = np.float32(scale) / (
                variances.left[:, rows].T @ variances.right + np.float32(VARIANCE_FLOOR)
            )
            merged[rows] += weight * (delta.left[:, rows].T @ delta.right)
            total = total + weight
        merged[rows] /= total
    return merged


def _products(merge: AdapterMerge, copy: LayerCopy) -> tuple[Product, Product]:
    """A layer's change and its variance."""
    adapter, layer = merge.adapters[copy.owner], copy.layer
    factors, variances = adapter.factors(layer), adapter.variances(layer, merge.counts[copy.owner])
    if variances is None:
        raise PrecisionError(
            f"no precision for '{layer.a}' of '{adapter.ref}'. Make a full one with `bmerge "
            "precision`, or merge with --weights uniform."
        )
    return change(factors, layer.scaling), variance(factors, variances, layer.scaling)
