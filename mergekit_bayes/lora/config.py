"""`adapter_config.json` as PEFT writes it: what is read of it, and which adapters are refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from mergekit_bayes.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor name in WEIGHTS

# Settings under which an adapter is more than `s B A` on some weights, so that no dense change
# describes it.
_BEYOND = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
)
# Initialisations that take the first factors out of the base's weights: training then started from
# another base than the stored one.
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraConfig(TypedDict, total=False):
    """The keys of `adapter_config.json` that are read here; PEFT writes more."""

    peft_type: str
    base_model_name_or_path: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    fan_in_fan_out: bool
    bias: str
    init_lora_weights: bool | str
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None


def read_config(folder: Path, ref: str) -> LoraConfig:
    """Read and check the config of an adapter.

    Args:
        folder: The adapter's folder.
        ref: What messages call the adapter.

    Raises:
        CheckpointError: There is no config, or it is not one of LoRA.
        ConfigError: The adapter is more than `s B A` on its base's weights.
    """
    file = folder / CONFIG
    if not file.exists():
        raise CheckpointError(
            f"'{ref}' is not an adapter: it has no {CONFIG}. Name the folder that PEFT wrote."
        )
    try:
        config: LoraConfig = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        _refuse_other_kinds(config, ref)
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(r, int) and r > 0 for r in ranks) or not all(
            math.isfinite(a) for a in alphas
        ):
            raise ValueError("r is not a positive and lora_alpha not a finite number")
        return config
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a LoRA config ({error!r}). Save the adapter again."
        ) from None


def _refuse_other_kinds(config: Mapping[str, object], ref: str) -> None:
    beyond = [f"{key}={config[key]}" for key in _BEYOND if config.get(key)]
    if str(config.get("peft_type", "LORA")) != "LORA":
        beyond.insert(0, f"peft_type={config['peft_type']}")
    if config.get("bias", "none") != "none":
        beyond.append(f"bias={config['bias']}")
    if str(config.get("init_lora_weights")).lower().startswith(_MOVES_THE_BASE):
        beyond.append(f"init_lora_weights={config['init_lora_weights']}")
    if beyond:
        raise ConfigError(
            f"'{ref}' is more than s B A on its base's weights ({', '.join(beyond)}), and only "
            "that is read here. Fold it into its base with `PeftModel.merge_and_unload()` and "
            "merge the result."
        )
