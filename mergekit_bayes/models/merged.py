"""A model whose weights can be changed: plain numbers, and with an adapter merged into its base."""

from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.libraries import call
from mergekit_bayes.models.limits import ADAPTER_CONFIG, CONFIG
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.pretrained import base_of, load_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_fixed(ref: str) -> None:
    """Refuse a model whose files say that its weights cannot be changed, without loading it.

    Raises:
        ConfigError: It, or its base, is quantised; or it is an adapter that changes no weights.
        CheckpointError: There is no such model or base, or its config cannot be read.
    """
    path = resolve(ref, CHECKPOINT)
    if (path / ADAPTER_CONFIG).exists():
        adapter = load_adapter_config(path)
        if adapter.is_prompt_learning:
            raise _no_weights(ref)
        path = resolve(base_of(path, adapter), CHECKPOINT)
    if (path / CONFIG).exists() and "quantization_config" in read_mapping(path / CONFIG):
        raise _quantised(ref)


def refuse_fixed_weights(loaded: Loaded) -> None:
    """Refuse a loaded model whose weights cannot be changed.

    Raises:
        ConfigError: It, or its adapter's base, is quantised; or its adapter cannot be merged.
    """
    if getattr(loaded.model, "is_quantized", False):
        raise _quantised(str(loaded.path))
    for name, parameter in loaded.model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise _quantised(
                str(loaded.path), f" ('{name}' is {str(parameter.dtype).removeprefix('torch.')})"
            )
    if hasattr(loaded.model, "peft_config") and not _can_be_merged(loaded):
        raise _no_weights(str(loaded.path))


def merge_adapter(loaded: Loaded) -> "PreTrainedModel":
    """Merge the adapter of a loaded model into its base, in place.

    Returns:
        The base, with the merged weights; of a model without an adapter, the model. What `loaded`
        holds runs with the same weights.

    Raises:
        ConfigError: The adapter is of a kind that changes no weights, such as virtual tokens.
        CheckpointError: PEFT cannot merge it.
    """
    if not hasattr(loaded.model, "peft_config"):
        return loaded.model
    if not _can_be_merged(loaded):
        raise _no_weights(str(loaded.path))
    merged: PreTrainedModel = call(
        f"'{loaded.path}': the adapter cannot be merged into its base",
        loaded.model.base_model.merge_and_unload,
    )
    return merged


def _can_be_merged(loaded: Loaded) -> bool:
    return hasattr(loaded.model.base_model, "merge_and_unload")


def _no_weights(ref: str) -> ConfigError:
    return ConfigError(
        f"'{ref}': this adapter changes no weights, so it cannot be merged into its base, which "
        "--four-bits and --relearn do first. Leave them out."
    )


def _quantised(ref: str, what: str = "") -> ConfigError:
    return ConfigError(
        f"'{ref}' is quantised already{what}, so that its weights are neither rounded nor trained. "
        "Leave --four-bits and --relearn out, or name its unquantised checkpoint."
    )
