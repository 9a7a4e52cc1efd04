"""What a layer has beside its factors, one number for each output: a bias, or DoRA's magnitudes."""

from collections.abc import Mapping
from typing import Literal

from mergekit_bayes.checkpoint.specs import MERGEABLE
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora.config import CONFIG, LoraConfig
from mergekit_bayes.posterior import Posterior

# Parts of a layer that are vectors, and the settings that ask for them.
_VECTORS: dict[str, Literal["lora_bias", "use_dora"]] = {
    "bias": "lora_bias",
    "magnitude": "use_dora",
}


def read_vector(
    posterior: Posterior, config: LoraConfig, names: Mapping[str, str], part: str, rows: int
) -> str | None:
    """The name on disk of what a layer has beside its factors; None if it has nothing.

    Args:
        posterior: The adapter's tensors.
        config: Its config.
        names: The layer's tensors on disk, by part.
        part: `bias` or `magnitude`.
        rows: Number of the layer's outputs.

    Raises:
        CheckpointError: It is missing, or not numbers.
        ConfigError: It is there although the config has it off.
        MismatchError: It has another length than the layer has outputs.
    """
    setting, disk = _VECTORS[part], names.get(part)
    is_on = config.get(setting)
    where = posterior.mean.where(disk or next(iter(names.values())))
    if disk is None:
        if is_on:
            raise CheckpointError(
                f"{where}: '{next(iter(names.values()))}' has no {part} beside it, which "
                f"{setting} in {CONFIG} asks for. Save the adapter again."
            )
        return None
    spec = posterior.mean.specs[disk]
    if not is_on:
        raise ConfigError(
            f"{where}: '{disk}' is there, and {CONFIG} does not have {setting}. The two files do "
            "not belong together."
        )
    if spec.dtype not in MERGEABLE:
        raise CheckpointError(
            f"{where}: '{disk}' is {spec.dtype}; it is read from {', '.join(MERGEABLE)}."
        )
    if spec.size != rows or max(spec.shape, default=0) != rows:
        raise MismatchError(
            f"{where}: '{disk}' is {list(spec.shape)}, and its layer has {rows} outputs. The two "
            "do not belong together."
        )
    return disk
