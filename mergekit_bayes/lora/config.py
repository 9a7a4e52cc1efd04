"""`adapter_config.json` as PEFT writes it: what is read of it, and which adapters are refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, cast

from mergekit_bayes.checkpoint.adapter_patterns import check_adapter_patterns
from mergekit_bayes.checkpoint.foreign import HEAD, explain_stand_in
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.documents import CONFIG as MOST_BYTES
from mergekit_bayes.documents import parse_json, read_bytes
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.lora.variants import refuse_variant
from mergekit_bayes.lora.writers import explain_config, explain_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor name in WEIGHTS
BASE = "base_identity"  # of the metadata of WEIGHTS: the content hash of the base


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
    init_lora_weights: bool | str
    target_modules: list[str] | str | None
    target_parameters: list[str] | None
    lora_B_layout: str | None
    auto_mapping: dict[str, object] | None
    exclude_modules: list[str] | str | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None
    bias: str | None
    lora_bias: bool | None
    use_dora: bool | None
    ensure_weight_tying: bool | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None


def is_adapter(path: Path) -> bool:
    """Whether the tensors of a folder or file are an adapter's."""
    return checkpoint_files(path)[0].name == WEIGHTS


def read_config(path: Path, ref: str) -> LoraConfig:
    """Read and check the config of an adapter.

    Args:
        path: The adapter's folder, or a file in it.
        ref: What messages call the adapter.

    Raises:
        CheckpointError: There is no config, or it is not one of LoRA.
        ConfigError: The adapter is of a variant that is not read, or a key that is read has a value
            of another form than PEFT gives it.
    """
    file = (path.parent if path.is_file() else path) / CONFIG
    if not file.exists():
        writer = explain_files(path) or "Name the folder that PEFT wrote."
        raise CheckpointError(f"'{ref}' is not an adapter: it has no {CONFIG}. {writer}")
    try:
        text = read_bytes(file, MOST_BYTES)
        if reason := explain_stand_in(text[:HEAD]):
            raise CheckpointError(f"{file}: {reason}")
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a mapping")
        config = cast(LoraConfig, content)
        if reason := explain_config(config):
            raise ConfigError(f"'{ref}' is not an adapter of PEFT: {reason}")
        refuse_variant(config, ref)
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(_is_number(r) and isinstance(r, int) and r > 0 for r in ranks) or not all(
            _is_number(a) and abs(a) <= _LARGEST_ALPHA for a in alphas
        ):
            raise ValueError(
                f"r is not a positive number, or lora_alpha not one up to {_LARGEST_ALPHA:g}"
            )
        _check_forms(config, file)
        return config
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *_TOO_LARGE) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a LoRA config ({shown(error)}). Save the adapter again."
        ) from None


def is_targeted(config: LoraConfig, module: str) -> bool:
    """Whether an adapter's config may mean a module; False only where its list leaves it out.

    PEFT makes factors for the modules that the config targets, and ignores others in the file.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return True
    if config.get("ensure_weight_tying") and is_vocabulary(f"{module}.weight"):
        return True  # PEFT adapts what is tied to a target, too
    return any(module == t or module.endswith(f".{t}") for t in targets)


def _is_number(value: object) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_names_or_pattern(value: object) -> bool:
    return isinstance(value, str) or _is_list_of_names(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_flag_or_text(value: object) -> bool:
    return isinstance(value, bool | str)


def _are_indices(value: object) -> bool:
    if isinstance(value, dict):
        return all(
            isinstance(indices, list) and _are_indices(indices) for indices in value.values()
        )
    return isinstance(value, list) and all(_is_number(i) and isinstance(i, int) for i in value)


_LARGEST_ALPHA = 1e9  # with which a change does not leave float32; 16 to 512 are common
_TOO_LARGE = (ArithmeticError, RecursionError)  # numbers and nestings beyond what Python handles
# The keys whose values are relied on beside the ranks and alphas: a test, and what is expected.
_FORMS: dict[str, tuple[Callable[[object], bool], str]] = {
    "modules_to_save": (_is_list_of_names, "a list of module names"),
    "target_modules": (_is_names_or_pattern, "a list of module names, or a regular expression"),
    "target_parameters": (_is_list_of_names, "a list of parameter names"),
    "use_rslora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "trainable_token_indices": (_are_indices, "a list of token ids, or one by module"),
    "init_lora_weights": (_is_flag_or_text, "true, false or the name of a method"),
    "task_type": (_is_text, "text"),
    "base_model_name_or_path": (_is_text, "text"),
}


def _check_forms(config: Mapping[str, object], file: Path) -> None:
    """Refuse keys whose values have another form than PEFT gives them; null is always allowed.

    Raises:
        ConfigError: A value has another form, or a pattern is no regular expression.
    """
    for key, (is_expected, expected) in _FORMS.items():
        value = config.get(key)
        if value is not None and not is_expected(value):
            raise ConfigError(
                f"{file}: {key} is {shown(value)}, where {expected} is expected. Correct it "
                "there, or save the adapter again."
            )
    check_adapter_patterns(config, file)
