"""The one room that calls `from_pretrained`: config, weights, tokenizer and adapter of a folder.

A folder may come from anybody. `limits` looks at its files first. Its code is not run unless the
caller says so, pickles are not read, and nothing is fetched for a folder that is on disk. What the
libraries raise becomes a `CheckpointError`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_bayes.checkpoint.adapter_patterns import check_adapter_patterns
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.libraries import call, call_tokenizers
from mergekit_bayes.models.limits import (
    ADAPTER_CONFIG,
    CONFIG,
    bounded_build,
    check_adapter,
    check_config,
    check_documents,
    check_normaliser,
    settings_in,
    stored_in,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
_SPECIAL = ("bos", "eos", "pad", "unk")


def _options(*, trust_remote_code: bool) -> dict[str, bool]:
    """What every call gets: only trusted code may be of another repository, and be fetched."""
    return {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}


def load_config(path: Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Load a folder's `config.json`.

    Raises:
        CheckpointError: It cannot be read, asks for more than the tensors of the folder, or needs
            code that may not be run.
    """
    import transformers

    check_documents(path)
    if (path / CONFIG).exists():
        check_config(path, trust_remote_code=trust_remote_code)
    return _call(
        path,
        "its config cannot be read",
        lambda: transformers.AutoConfig.from_pretrained(
            path, **_options(trust_remote_code=trust_remote_code)
        ),
    )


def load_weights(
    auto: Any,
    path: Path,
    *,
    dtype: str,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
    is_spread: bool = False,
) -> "tuple[PreTrainedModel, list[str]]":
    """Load a model of a folder, after `load_config` has accepted its config.

    Args:
        auto: The `AutoModel...` class of the task.
        path: The folder.
        dtype: Type of the parameters; `auto` keeps that of the file.
        num_labels: Number of labels of a new head.
        trust_remote_code: Run the folder's code where the model needs it.
        is_spread: Let accelerate place the layers, by `device_map="auto"`.

    Returns:
        The model, and the names of parameters that the files do not hold.

    Raises:
        CheckpointError: The files cannot be read, or the config describes another model.
    """
    stored = stored_in(path)
    options: dict[str, object] = {"dtype": dtype}
    if num_labels is not None:
        options["num_labels"] = num_labels
    if is_spread:
        options["device_map"] = "auto"
    is_packed = "quantization_config" in read_mapping(path / CONFIG)
    with bounded_build(path, stored, is_packed=is_packed):
        model, report = _call(
            path,
            "transformers cannot load it",
            lambda: auto.from_pretrained(
                path,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
                **_options(trust_remote_code=trust_remote_code),
                **options,
            ),
        )
    for name, stored_shape, shape in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"'{path}': {shown(name)} is {tuple(stored_shape)} in the file, and {tuple(shape)} by "
            f"{CONFIG}. Take the config of the model that the tensors are of."
        )
    return model, sorted(report["missing_keys"])


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder, after `load_config` has accepted its files.

    Raises:
        CheckpointError: It cannot be read, or needs code that may not be run.
    """
    import transformers

    def load() -> "PreTrainedTokenizerBase":
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            path, **_options(trust_remote_code=trust_remote_code)
        )
        for name in _SPECIAL:  # looked up only when it is asked for
            getattr(tokenizer, f"{name}_token_id")
        return tokenizer

    tokenizer = _call(path, "its tokenizer cannot be read", load, call_tokenizers)
    check_normaliser(path, tokenizer)
    return tokenizer


def load_adapter_config(path: Path) -> "PeftConfig":
    """Load the `adapter_config.json` of a folder.

    Raises:
        CheckpointError: It cannot be read, or asks for more than the adapter's tensors.
    """
    from peft import PeftConfig

    check_documents(path)
    check_adapter(path)
    check_adapter_patterns(read_mapping(path / ADAPTER_CONFIG), path / ADAPTER_CONFIG)
    return _call(
        path,
        f"its {ADAPTER_CONFIG} cannot be read",
        lambda: PeftConfig.from_pretrained(str(path), local_files_only=True),
    )


def base_of(path: Path, config: "PeftConfig") -> str:
    """The path or Hub id of the base of an adapter.

    Args:
        path: The adapter's folder, for messages.
        config: Its config.

    Raises:
        ConfigError: The config names none.
    """
    name = config.base_model_name_or_path
    if not name:
        raise ConfigError(
            f"{path / ADAPTER_CONFIG}: base_model_name_or_path is {shown(name)}, and what the "
            "adapter is to be put on must be known. Write the path or Hub id of its base there."
        )
    return f"{name}@{config.revision}" if config.revision and is_hub_id(name) else str(name)


def load_adapter(base: "PreTrainedModel", path: Path, config: "PeftConfig") -> "PeftModel":
    """Put an adapter on its base, trainable, so that a precision of it can be estimated.

    Raises:
        CheckpointError: The adapter cannot be read, or does not fit its base.
    """
    from peft import PeftModel

    model: PeftModel = _call(
        path,
        "peft cannot load it",
        lambda: PeftModel.from_pretrained(
            base,
            str(path),
            config=config,
            is_trainable=True,
            use_safetensors=True,
            local_files_only=True,
        ),
    )
    return model


def _call(
    path: Path,
    what: str,
    function: Callable[[], T],
    caller: Callable[[str, Callable[[], T]], T] = call,
) -> T:
    """Call a library on a folder; a refusal to run the folder's code is told as that.

    Raises:
        CheckpointError: The call failed.
    """
    try:
        with _never_asked():
            return caller(f"'{path}': {what}", function)
    except CheckpointError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise _needs_code(path) from None


@contextmanager
def _never_asked() -> Iterator[None]:
    """Let transformers refuse code where it would ask on standard input.

    It asks where `trust_remote_code` is not passed, as where peft loads a model.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _needs_code(path: Path) -> CheckpointError:
    """The error that a folder's code is not run, with what its `auto_map` names."""
    named: list[str] = []
    for name in (CONFIG, "tokenizer_config.json"):
        auto_map = read_mapping(path / name).get("auto_map") if (path / name).exists() else None
        named += [str(value) for _, value in settings_in({"auto_map": auto_map}) if value]
    names = ", ".join(sorted(set(named)))
    return CheckpointError(
        f"'{path}' needs Python code of its own (auto_map names {shown(names)}), "
        "which is not run. Read that code; if you trust it, pass --trust-remote-code."
    )
