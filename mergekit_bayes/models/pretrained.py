"""The one room that calls `from_pretrained`: config, weights, tokenizer and adapter of a folder.

A folder may come from anybody. Its small files are read within the limits of `documents` first.
Its code is not run unless the caller says so, pickles are not read, and a local folder fetches
nothing. The config is compared with the headers of the tensors, so that it cannot ask for a model
that the files do not hold. What the libraries raise becomes a `CheckpointError`; only their calls
are wrapped, so that a bug of this package is not hidden.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.documents import parse_json, read_mapping
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.libraries import call, call_tokenizers

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
ADAPTER_CONFIG = "adapter_config.json"
_CONFIG = "config.json"
# Files that transformers and peft parse if they are there. Others of a tokenizer are text.
_OBJECTS = (
    _CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_LOCAL = {"local_files_only": True}  # for a folder that is on disk
# Settings that are repeated in a loop, and settings that are lengths of a text.
_COUNT = re.compile(r"^(num|n)_|layer|depth|block|expert|label|stage|group|class")
_LENGTH = re.compile(r"position|ctx|context|seq|length|block_size|window")
_MOST = 65_536  # repetitions, whatever the files hold
_LONGEST = 1 << 25  # tokens; the longest published contexts have 10 million
_LARGEST = 1 << 53
_SPARE_ELEMENTS = 1 << 26  # that no file holds: buffers, and heads that are made up
_SPARE_MODULES = 20_000
_MODULES = 64  # modules for each tensor of the files; usual are 1 to 3
_LONGER = 1000  # times that a tokenizer may lengthen a text; usual is 1 to 3
_PACKED = 8  # values in one element of a quantised file


class Stored(NamedTuple):
    """What the files of a checkpoint hold, by their headers.

    Attributes:
        tensors: Number of tensors.
        elements: Number of their elements.
        largest: Largest dimension of any of them.
    """

    tensors: int
    elements: int
    largest: int


def stored_in(path: Path) -> Stored:
    """Read the headers of a folder's tensors.

    Raises:
        CheckpointError: There are no safetensors files, or they cannot be read.
    """
    with SafetensorsSource(checkpoint_files(path)) as source:
        specs = source.specs.values()
        return Stored(
            tensors=len(specs),
            elements=sum(spec.size for spec in specs),
            largest=max((dim for spec in specs for dim in spec.shape), default=0),
        )


def load_config(path: Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Load a folder's `config.json`.

    Raises:
        CheckpointError: It cannot be read, asks for more than the tensors of the folder, or needs
            code that may not be run.
    """
    import transformers

    check_documents(path)
    if (path / _CONFIG).exists():
        _check_config(path, trust_remote_code=trust_remote_code)
    return _call(
        path,
        "its config cannot be read",
        lambda: transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, **_LOCAL
        ),
    )


def load_weights(
    auto: Any,
    path: Path,
    *,
    dtype: str,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, list[str]]":
    """Load a model of a folder, after `load_config` has accepted its config.

    Args:
        auto: The `AutoModel...` class of the task.
        path: The folder.
        dtype: Type of the parameters; `auto` keeps that of the file.
        num_labels: Number of labels of a new head.
        trust_remote_code: Run the folder's code where the model needs it.

    Returns:
        The model, and the names of parameters that the files do not hold.

    Raises:
        CheckpointError: The files cannot be read, or the config describes another model.
    """
    stored = stored_in(path)
    options: dict[str, object] = {"dtype": dtype}
    if num_labels is not None:
        options["num_labels"] = num_labels
    is_packed = "quantization_config" in read_mapping(path / _CONFIG)
    with _bounded(path, stored, is_packed=is_packed):
        model, report = _call(
            path,
            "transformers cannot load it",
            lambda: auto.from_pretrained(
                path,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **_LOCAL,
                **options,
            ),
        )
    return model, sorted(report["missing_keys"])


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder.

    Raises:
        CheckpointError: It cannot be read, or needs code that may not be run.
    """
    import transformers

    check_documents(path)

    def load() -> "PreTrainedTokenizerBase":
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **_LOCAL
        )
        return tokenizer

    tokenizer = _call(path, "its tokenizer cannot be read", load, call_tokenizers)
    _check_normaliser(path, tokenizer)
    return tokenizer


def _check_normaliser(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer whose replacements make a text, or what is decoded, many times longer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        step = getattr(backend, part, None)
        if step is None:
            continue
        state = parse_json(_call(path, f"the tokenizer's {part} cannot be read", step.__getstate__))
        factor = prod(
            max(1, len(str(value)))
            for key, value in _settings({part: state})
            if key in ("content", "prepend")
        )
        if factor > _LONGER:
            raise CheckpointError(
                f"'{path}': the tokenizer's {part} may make a text {factor:,} times as long, "
                f"expected at most {_LONGER} times. Use the tokenizer that belongs to the model."
            )


def load_adapter_config(path: Path) -> "PeftConfig":
    """Load the `adapter_config.json` of a folder.

    Raises:
        CheckpointError: It cannot be read, or asks for more than the adapter's tensors.
    """
    from peft import PeftConfig

    check_documents(path)
    _check_adapter(path)
    return _call(
        path,
        f"its {ADAPTER_CONFIG} cannot be read",
        lambda: PeftConfig.from_pretrained(str(path), **_LOCAL),
    )


def load_adapter(base: "PreTrainedModel", path: Path, config: "PeftConfig") -> "PeftModel":
    """Put an adapter on its base, trainable, so that a precision of it can be estimated.

    Raises:
        CheckpointError: The adapter cannot be read, or does not fit its base.
    """
    from peft import PeftModel

    if hasattr(config, "prompt_tuning_init"):
        # PEFT would load a tokenizer for a start value that the adapter's tensors replace.
        config.prompt_tuning_init = "RANDOM"
    model: PeftModel = _call(
        path,
        "peft cannot load it",
        lambda: PeftModel.from_pretrained(
            base, str(path), config=config, is_trainable=True, use_safetensors=True, **_LOCAL
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
        return caller(f"'{path}': {what}", function)
    except CheckpointError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise _needs_code(path) from None


def check_documents(path: Path) -> None:
    """Read the JSON files of a folder within the limits of `documents`, as libraries do without.

    Raises:
        CheckpointError: One is not a regular file, too large, nested too deeply or no JSON.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.name in _OBJECTS:
            read_mapping(file)
        elif not file.is_dir():
            _check_regular(file)


def _check_regular(file: Path) -> None:
    """Refuse a pipe or device, for which a library would wait, wherever its name is looked at."""
    try:
        mode = os.stat(file).st_mode
    except OSError:  # a broken link is missing, and is told as that
        return
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file}: not a regular file. Remove it.")


def _check_config(path: Path, *, trust_remote_code: bool) -> None:
    """Refuse a config that names code or files elsewhere, or numbers that its tensors lack."""
    file = path / _CONFIG
    config = read_mapping(file)
    weights = config.get("transformers_weights")
    if weights is not None and not re.fullmatch(
        r"[\w-][\w.-]*\.safetensors(\.index\.json)?", str(weights)
    ):
        raise CheckpointError(
            f"{file}: transformers_weights is {shown(weights)}, expected the name of a "
            ".safetensors file of the folder. Remove the key."
        )
    chunk = config.get("chunk_size_feed_forward", 0)
    if chunk not in (0, 1):
        raise CheckpointError(
            f"{file}: chunk_size_feed_forward is {shown(chunk)}, with which most texts cannot be "
            "read. Remove the key: it changes no result."
        )
    names = config.get("configuration_files")
    if names is not None:
        raise CheckpointError(
            f"{file}: configuration_files is {shown(names)}, which names other configs for other "
            "versions of transformers. Remove the key, or put the right config in its place."
        )
    if not trust_remote_code:
        for key, value in _settings(config):
            if "attn_implementation" in key and "/" in str(value):
                raise CheckpointError(
                    f"{file}: {key} is {shown(value)}, which is code of a Hub repository. Remove "
                    "the key, or pass --trust-remote-code if you trust it."
                )
    try:
        stored = stored_in(path)
    except CheckpointError:
        stored = Stored(0, 0, 0)  # told where the tensors are read
    most = max(_MOST, stored.tensors, stored.largest)
    longest = max(_LONGEST, stored.largest)
    for key, value in _settings(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        is_length = bool(_LENGTH.search(key))
        limit = longest if is_length else most if _COUNT.search(key) else _LARGEST
        if abs(value) > limit:
            raise CheckpointError(
                f"{file}: {key} is {shown(value)}, expected at most {limit:,}: the tensors of the "
                f"folder are {stored.tensors:,}, with dimensions up to {stored.largest:,}. Take "
                "the config of the model that the tensors are of."
            )
        if value < 1 and re.search(r"^(num|n)_(\w+_)?layers?$|^max_position_embeddings$", key):
            raise CheckpointError(
                f"{file}: {key} is {value}, expected at least 1. Take the config of the model that "
                "the tensors are of."
            )


def _check_adapter(path: Path) -> None:
    """Refuse an adapter that PEFT would build larger than its tensors, or with code from outside.

    Raises:
        CheckpointError: As said.
    """
    file = path / ADAPTER_CONFIG
    config = read_mapping(file)
    stored = stored_in(path)
    if config.get("megatron_config") is not None:
        raise CheckpointError(
            f"{file}: megatron_config makes peft import the module that megatron_core names, which "
            "is not done here. Remove the key."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and any(int(steps[:9]) > 1000 for steps in re.findall(r"\d+", start)):
        raise CheckpointError(
            f"{file}: init_lora_weights is {shown(start)}: so many steps make start values that "
            "the adapter's tensors replace. Write true there."
        )
    ranks = {"r": config.get("r")}
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := config.get(key), Mapping):
            ranks |= {f"{key}[{shown(name)}]": rank for name, rank in pattern.items()}
    numbers = dict(_settings({k: v for k, v in config.items() if k not in ("rank_pattern", "r")}))
    for key, value in [*ranks.items(), *numbers.items()]:
        limit = (
            stored.largest if key in ranks and "alpha" not in key else max(_MOST, stored.largest)
        )
        if isinstance(value, int) and abs(value) > limit:
            raise CheckpointError(
                f"{file}: {key} is {shown(value)}, expected at most {limit:,}, the largest "
                "dimension of the adapter's tensors. Take the config that was written with them."
            )


def _settings(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The values of a config at any depth, each with the key that it or its list stands under."""
    level: list[tuple[str, object]] = list(config.items())
    while level:
        inner: list[tuple[str, object]] = []
        for key, value in level:
            if isinstance(value, Mapping):
                inner += [(str(name), v) for name, v in value.items()]
            elif isinstance(value, list):
                inner += [(key, v) for v in value]
            else:
                yield key, value
        level = inner


@contextmanager
def _bounded(path: Path, stored: Stored, *, is_packed: bool) -> Iterator[None]:
    """Stop the building of a model that is larger than its files.

    transformers first builds a model that takes no memory, so that its size is known in time.
    """
    from torch.nn.modules import module as registration

    most = 2 * stored.elements * (_PACKED if is_packed else 1) + _SPARE_ELEMENTS
    most_modules = _MODULES * stored.tensors + _SPARE_MODULES
    sizes: dict[tuple[int, str], int] = {}
    modules = elements = 0

    def refuse() -> None:
        raise CheckpointError(
            f"{path / _CONFIG}: it describes a larger model than the tensors of the folder, which "
            f"are {stored.tensors:,} with {stored.elements:,} elements. Take the config of the "
            "model that they are of."
        )

    def count_module(owner: "torch.nn.Module", name: str, inner: object) -> None:
        nonlocal modules
        modules += 1
        if modules > most_modules:
            refuse()

    def count_tensor(owner: "torch.nn.Module", name: str, tensor: "torch.Tensor | None") -> None:
        nonlocal elements
        if tensor is None or not tensor.is_meta:
            return
        size = tensor.numel()
        elements += size - sizes.get((id(owner), name), 0)
        sizes[id(owner), name] = size
        if elements > most:
            refuse()

    with ExitStack() as stack:
        for register, hook in (
            (registration.register_module_module_registration_hook, count_module),
            (registration.register_module_parameter_registration_hook, count_tensor),
            (registration.register_module_buffer_registration_hook, count_tensor),
        ):
            stack.callback(register(hook).remove)
        yield


def _needs_code(path: Path) -> CheckpointError:
    """The error that a folder's code is not run, with what its `auto_map` names."""
    named: list[str] = []
    for name in (_CONFIG, "tokenizer_config.json"):
        auto_map = read_mapping(path / name).get("auto_map") if (path / name).exists() else None
        named += [str(value) for _, value in _settings({"auto_map": auto_map}) if value]
    names = ", ".join(sorted(set(named)))
    return CheckpointError(
        f"'{path}' needs Python code of its own (auto_map names {shown(names)}), "
        "which is not run. Read that code; if you trust it, pass --trust-remote-code (in YAML "
        "trust_remote_code: true)."
    )
