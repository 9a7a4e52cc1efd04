"""An adapter on its base as the one model that it makes."""

from typing import TYPE_CHECKING

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.libraries import call
from mergekit_bayes.models.load import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    inner = loaded.model.base_model
    if hasattr(inner, "merge_and_unload"):
        merged: PreTrainedModel = call(
            f"'{loaded.path}': the adapter cannot be merged into its base", inner.merge_and_unload
        )
        return merged
    raise ConfigError(
        f"'{loaded.path}': this adapter changes no weights, so it cannot be merged into its base, "
        "which --four-bits and --relearn do first. Leave them out."
    )
