"""`adapter_config.json` as PEFT writes it: what is read of it, and which adapters are refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from mergekit_bayes.checkpoint.foreign import HEAD, explain_stand_in
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.lora.writers import explain_config, explain_files, way_out

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


def read_config(path: Path, ref: str) -> LoraConfig:
    """Read and check the config of an adapter.

    Args:
        path: The adapter's folder, or a file in it.
        ref: What messages call the adapter.

    Raises:
        CheckpointError: There is no config, or it is not one of LoRA.
        ConfigError: The adapter is more than `s B A` on its base's weights.
    """
    file = (path.parent if path.is_file() else path) / CONFIG
    if not file.exists():
        writer = explain_files(path) or "Name the folder that PEFT wrote."
        raise CheckpointError(f"'{ref}' is not an adapter: it has no {CONFIG}. {writer}")
    try:
        text = file.read_bytes()
        if reason := explain_stand_in(text[:HEAD]):
            raise CheckpointError(f"{file}: {reason}")
        config: LoraConfig = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
        if reason := explain_config(config):
            raise ConfigError(f"'{ref}' is not an adapter of PEFT: {reason}")
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


def is_targeted(config: LoraConfig, module: str) -> bool:
    """Whether an adapter's config may mean a module; False only where its list leaves it out.

    PEFT makes factors for the modules that the config targets, and ignores others in the file.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return True
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _refuse_other_kinds(config: Mapping[str, object], ref: str) -> None:
    beyond = [f"{key}={config[key]}" for key in _BEYOND if config.get(key)]
    peft_type = str(config.get("peft_type") or "LORA")
    if peft_type != "LORA":
        beyond.insert(0, f"peft_type={peft_type}")
    if config.get("bias", "none") != "none":
        beyond.append(f"bias={config['bias']}")
    if str(config.get("init_lora_weights")).lower().startswith(_MOVES_THE_BASE):
        beyond.append(f"init_lora_weights={config['init_lora_weights']}")
    if beyond:
        settings = [key for key in _BEYOND if config.get(key)]
        raise ConfigError(
            f"'{ref}' is not s B A on its base's weights ({', '.join(beyond)}), and only that is "
            f"read here. {way_out(peft_type, settings)}"
        )
