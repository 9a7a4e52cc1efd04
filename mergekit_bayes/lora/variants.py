"""The variants of LoRA that an `adapter_config.json` may ask for: which are read or refused.

Every key of PEFT's `LoraConfig` is here, so that none that changes what an adapter computes is
passed over. A key that is not here belongs to another version of PEFT or to another program: it is
refused where its value switches something on, and named in the report else.
"""

from collections.abc import Iterator, Mapping

from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.lora.writers import FOLD, NO_CHANGE, PROMPTS

MOVES = ("pissa", "olora")  # initialisations that move the base and are read; see `moved`
# Read, by `config`, `layers`, `placing` and `output`.
_READ = (
    *("peft_type", "task_type", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *(
        "target_parameters",
        "lora_B_layout",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
    ),
    *("bias", "lora_bias", "use_dora", "trainable_token_indices", "init_lora_weights"),
)
# Of training, of an initialisation, or of how PEFT runs: what is stored means the same without.
_WITHOUT_EFFECT = (
    *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout"),
    *("runtime_config", "velora_config", "eva_config", "corda_config", "lora_ga_config"),
    *("loftq_config", "megatron_config", "megatron_core"),
    "merge_weights",  # of PEFT until 0.3
)
_DEPENDS = "What it adds depends on the input, so that it cannot be folded into weights or merged."
_QUANTISED = "It belongs to a quantised base, and PEFT does not fold it either."
_REPEATED = (
    "It belongs to a base with repeated layers, and PEFT's own fold adds the changes of all copies "
    "of a layer to each. Write that base out first (a recipe of mergekit with `slices` and "
    "`merge_method: passthrough`), take layer_replication out of adapter_config.json, and put the "
    "written base before the adapter."
)
# Refused where they are on, with what to do.
_REFUSED = {
    "layer_replication": _REPEATED,
    "alora_invocation_tokens": _DEPENDS,
    "arrow_config": _DEPENDS,
    "use_qalora": _QUANTISED,
    "kasa_config": FOLD,
    "monteclora_config": FOLD,
    "use_bdlora": FOLD,
    "enable_lora": FOLD,  # of PEFT until 0.3: factors of a part of a fused layer
}
_DETAILS = {"qalora_group_size": "use_qalora"}  # keys without effect where another one is off
_PLAIN = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_FOLD_THERE = "fold it with `merge_and_unload()` in the run that trained it, and merge the result."
_CONVERT = (
    "Training started from other weights than the base's, so that only the trained model or a "
    "converted adapter can be merged: save it with `model.save_pretrained(OUT, "
    "path_initial_model_for_weight_conversion=INITIAL)`, INITIAL being the adapter that was saved "
    f"before training, or {_FOLD_THERE}"
)
# Other initialisations, and why each is refused.
_MOVING = {
    "pissa": f"It is drawn at random, so that it cannot be repeated. {_CONVERT}",
    "corda": f"It depends on data. {_CONVERT}",
    "lora_ga": f"It depends on data, and PEFT itself loads it onto the wrong base. {_CONVERT}",
    "loftq": f"Its base is the one that LoftQ quantised: {_FOLD_THERE}",
}


def refuse_variant(config: Mapping[str, object], ref: str) -> None:
    """Refuse an adapter that is more, or other, than what is read here.

    Args:
        config: The content of `adapter_config.json`.
        ref: What messages call the adapter.

    Raises:
        ConfigError: It is of another method than LoRA, or of a variant that is not read.
    """
    peft_type = str(config.get("peft_type") or "LORA")
    if peft_type != "LORA":
        advice = NO_CHANGE if peft_type in PROMPTS else FOLD
        raise ConfigError(f"'{ref}' is no LoRA adapter (peft_type={peft_type}). {advice}")
    for key, advice in _REFUSED.items():
        if config.get(key):
            raise ConfigError(
                f"'{ref}' is a variant of LoRA that is not read here ({key}="
                f"{shown(config[key])}). {advice}"
            )
    _refuse_initialisation(config, ref)
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise ConfigError(
            f"'{ref}': bias={shown(config['bias'])}, where none, all or lora_only is expected."
        )
    for key in _unknown(config):
        if config[key] is True or isinstance(config[key], dict | list):
            raise ConfigError(
                f"'{ref}' has the setting {shown(key)}, which is not known here "
                f"({key}={shown(config[key])}) and may be a variant of LoRA of a later PEFT. "
                f"{FOLD} If it does not change what the adapter computes, take it out of the file."
            )


def initial_move(config: Mapping[str, object]) -> str | None:
    """The initialisation that moved the base, one of `MOVES`; None if it did not move."""
    method = str(config.get("init_lora_weights")).lower()
    return method if method in MOVES else None


def variant_notes(config: Mapping[str, object], ref: str) -> tuple[str, ...]:
    """What a report says of settings that are not known here."""
    unknown = [f"{key}={shown(config[key])}" for key in _unknown(config)]
    if not unknown:
        return ()
    return (f"'{ref}' has settings that are not known here ({', '.join(unknown)}): passed over",)


def _unknown(config: Mapping[str, object]) -> Iterator[str]:
    """The keys that are set and not known."""
    known = {*_READ, *_WITHOUT_EFFECT, *_REFUSED}
    for key, value in config.items():
        if value and key not in known and not (key in _DETAILS and not config.get(_DETAILS[key])):
            yield key


def _refuse_initialisation(config: Mapping[str, object], ref: str) -> None:
    value = config.get("init_lora_weights")
    method = str(value).lower()
    if method in _PLAIN or method in MOVES or not isinstance(value, str):
        return
    reason = next((r for start, r in _MOVING.items() if method.startswith(start)), None)
    raise ConfigError(
        f"'{ref}' has init_lora_weights={shown(value)}, "
        + (
            f"which is not read here. {reason}"
            if reason is not None
            else f"which is not known here and may move the base. {FOLD}"
        )
    )
