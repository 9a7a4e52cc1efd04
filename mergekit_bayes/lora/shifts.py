"""Merge what adapters add to the biases of their modules (`lora_bias`).

    uniform     b = sum_t c_t s_t b_t
    precision   b = sum_t c_t S_t s_t b_t / sum_t c_t S_t,  S_t the precision of s_t b_t

An adapter that holds the layer without a bias adds zero, and counts only where nothing is weighed.
"""

from collections.abc import Sequence

import numpy as np

from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora.dense import VARIANCE_FLOOR
from mergekit_bayes.lora.inputs import AdapterMerge, LayerCopy, Layers
from mergekit_bayes.lora.rules import Rule
from mergekit_bayes.lora.writers import FOLD_ALL


def have_shifts(layers: Layers) -> bool:
    """Whether an adapter adds something to a bias.

    Raises:
        ConfigError: One does, and the merged adapter would have factors of an embedding, or of
            a parameter itself, too, which PEFT does not load with `lora_bias`.
    """
    every = [copy.layer for copies in layers.values() for copy in copies]
    if not any(layer.bias for layer in every):
        return False
    other = next((layer for layer in every if layer.is_embedding or layer.is_parameter), None)
    if other is not None:
        kind = "embedding" if other.is_embedding else "parameter"
        raise ConfigError(
            f"some of these adapters have biases (lora_bias), and others factors of the {kind} "
            f"'{other.tensor}': PEFT loads no adapter of both. Fold "
            f"instead: {FOLD_ALL}."
        )
    return True


def note_on_zeros(layers: Layers) -> str | None:
    """What a report says of biases that no adapter has; None if there are none.

    PEFT's `lora_bias` is for all layers of an adapter, whose modules may have no bias in the base.
    """
    if not have_shifts(layers):
        return None
    without = [
        name for name, copies in layers.items() if not any(copy.layer.bias for copy in copies)
    ]
    if not without:
        return None
    return (
        f"PEFT's lora_bias is for all layers: zeros are stored for {len(without)} that no adapter "
        f"has a bias for ('{without[0]}'). Where such a module has no bias in the base, PEFT's "
        "merge_and_unload() refuses the result; to fold it: `bmerge merge BASE+OUT -o WHOLE`"
    )


def check_shifts(layers: Layers, rule: Rule) -> None:
    """Refuse a method other than a sum where adapters add something to biases.

    Raises:
        ConfigError: It merges matrices, and says nothing of biases.
    """
    if have_shifts(layers) and not rule.is_a_sum:
        raise ConfigError(
            f"--method {rule.method.name} merges matrices, and some of these adapters have biases "
            f"(lora_bias). Leave --method out, or fold: {FOLD_ALL}."
        )


def merge_shifts(merge: AdapterMerge, copies: Sequence[LayerCopy]) -> Array:
    """The merged bias of a layer, float32, shape (d_out,).

    Args:
        merge: The adapters.
        copies: The layer as each adapter holds it.

    Raises:
        CheckpointError: The sum is beyond float32.
        PrecisionError: Entries are weighed, and a precision is missing.
    """
    layer = copies[0].layer
    total, amounts = np.zeros(layer.rows), np.zeros(layer.rows)
    for copy in copies:
        if copy.layer.bias is None:
            continue
        adapter, scaling = merge.adapters[copy.owner], copy.layer.scaling
        values = scaling * adapter.values(copy.layer.bias).astype(np.float64)
        amount = merge.scales[copy.owner] * _precision(merge, copy)
        total += amount * values
        amounts += amount
    if merge.weights == "precision":
        total = np.divide(total, amounts, out=np.zeros_like(total), where=amounts > 0)
    elif merge.averaged:
        total /= sum(merge.scales[copy.owner] for copy in copies)
    if np.abs(total).max(initial=0) > np.finfo(np.float32).max:
        raise CheckpointError(
            f"the merged bias of '{layer.module}' is beyond float32. Look at lora_alpha in "
            "adapter_config.json and at --scale."
        )
    return total.astype(np.float32)


def _precision(merge: AdapterMerge, copy: LayerCopy) -> Array:
    """The precision of `s b`, or ones where nothing is weighed; float64."""
    layer = copy.layer
    if merge.weights == "uniform":
        return np.ones(layer.rows)
    adapter = merge.adapters[copy.owner]
    assert layer.bias is not None
    stored = adapter.counted(layer.bias, merge.counts[copy.owner])
    if stored is None:
        raise PrecisionError(
            f"no precision for '{layer.bias}' of '{adapter.ref}'. Make a full one with `bmerge "
            "precision`, or merge with --weights uniform."
        )
    # DELTA_0 makes an average of entries that have no precision in any adapter.
    precision = stored.astype(np.float64) + DELTA_0
    precision /= max(layer.scaling**2, VARIANCE_FLOOR)
    return precision
