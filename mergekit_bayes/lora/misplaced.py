"""What of an adapter does not fit its base: biases, trained rows, and the name of another one."""

import os
from collections.abc import Collection, Mapping

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.tokens import TrainedRows
from mergekit_bayes.lora.views import View

Specs = Mapping[str, TensorSpec]


def named_base(adapter: Adapter) -> str:
    """The base that an adapter's config names, as part of a message."""
    return f"{CONFIG} names '{adapter.config.get('base_model_name_or_path')}'"


def note_on_name(adapter: Adapter, base: str) -> str | None:
    """That an adapter's config names another base than this one; None where that is not known.

    Names can be compared where both are Hub ids, or both paths that exist. Where the hash of the
    base is on record, that counts and not its name.

    Args:
        adapter: The adapter.
        base: The base as the user gave it.
    """
    named = adapter.config.get("base_model_name_or_path")
    if not named or adapter.base is not None:
        return None
    if is_hub_id(named) and is_hub_id(base):
        is_other = named.partition("@")[0].lower() != base.partition("@")[0].lower()
    else:
        paths = [os.path.expanduser(path) for path in (named, base)]
        is_other = all(map(os.path.exists, paths)) and not os.path.samefile(*paths)
    if not is_other:
        return None
    return (
        f"'{adapter.ref}' names the base '{named}' in {CONFIG}, and is applied to '{base}': taken "
        "to be the same"
    )


def without_zeros(specs: Specs, adapter: Adapter, biases: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers with a bias, but for those that add zeros to a module without one.

    PEFT's `lora_bias` is for all layers of an adapter, so that a merge of adapters of which some
    have biases stores zeros for the layers of the others.

    Args:
        specs: What the base or the adapter stores, by name.
        adapter: The adapter.
        biases: The layers by the bias that theirs is added to.

    Raises:
        CheckpointError: An entry of such a bias is not finite.
    """

    def adds(name: str, layer: Layer) -> bool:
        assert layer.bias is not None
        return name in specs or bool(adapter.values(layer.bias).any())

    return {name: layer for name, layer in biases.items() if adds(name, layer)}


def refuse_misplaced_biases(
    base: View, specs: Specs, adapter: Adapter, biases: Mapping[str, Layer]
) -> None:
    """Refuse layers with a bias (`lora_bias`) whose module has none, or one of another length.

    Args:
        base: The base's tensors.
        specs: What the base or the adapter stores, by name.
        adapter: The adapter.
        biases: The layers by the bias that theirs is added to.

    Raises:
        MismatchError: A bias is missing, of another length, or not of numbers.
    """
    for name, layer in biases.items():
        if name not in specs:
            raise MismatchError(
                f"'{layer.bias}' of '{adapter.ref}' is added to '{name}' (lora_bias), which "
                f"{base.files[0]} does not hold: PEFT does not fold such a layer either. Give the "
                "base's module a bias of zeros, or use the adapter unfolded."
            )
        spec = specs[name]
        if spec.shape != (layer.rows,) or spec.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{layer.bias}' of '{adapter.ref}' is added to '{name}', which is {spec.dtype} of "
                f"{list(spec.shape)} and not numbers of [{layer.rows}]. Was it trained on another "
                f"model ({named_base(adapter)})?"
            )


def refuse_misplaced_rows(
    base: View,
    specs: Specs,
    adapter: Adapter,
    rows: Mapping[str, TrainedRows],
    adapted: Collection[str],
) -> None:
    """Refuse trained rows of tables that the base has not, or that are otherwise changed.

    Args:
        base: The base's tensors.
        specs: What the base or the adapter stores, by name.
        adapter: The adapter.
        rows: The rows by the table whose rows they replace.
        adapted: The tensors that layers change.

    Raises:
        ConfigError: The table is adapted by factors, too.
        MismatchError: There is no such table, or it has other columns or fewer rows.
    """
    for name, trained in rows.items():
        shape = adapter.posterior.mean.specs[trained.disk].shape
        if name not in specs:
            raise MismatchError(
                f"'{trained.disk}' of '{adapter.ref}' replaces rows of '{name}', which "
                f"{base.files[0]} does not hold. Was it trained on another model "
                f"({named_base(adapter)})?"
            )
        spec = specs[name]
        if len(spec.shape) != 2 or spec.shape[1] != shape[1] or spec.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{trained.disk}' of '{adapter.ref}' holds rows of {shape[1]} columns, but "
                f"'{name}' is {spec.dtype} of {list(spec.shape)}. Was it trained on another model "
                f"({named_base(adapter)})?"
            )
        largest = max(trained.indices, default=-1)
        if largest >= spec.shape[0]:
            raise MismatchError(
                f"'{trained.disk}' of '{adapter.ref}' replaces row {largest} of '{name}', which "
                f"has {spec.shape[0]}: the vocabulary was resized before training, and the adapter "
                "does not hold the rows that were added. Name the base that it was trained on."
            )
        if name in adapted:
            raise ConfigError(
                f"'{adapter.ref}' has factors of '{name}', and trained rows of it or of the "
                "embedding that it is tied to (trainable_token_indices). Such a sum is not read "
                "here: use the adapter unfolded, or train one of them."
            )
