"""What a model folder may hold before a library reads it: files, numbers, and a size.

A config is compared with the headers of the tensors, so that it cannot ask for a model that the
files do not hold, nor for a loop that never ends.
"""

import base64
import math
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import CHAT, GROUPS
from mergekit_bayes.documents import (
    MEMORY,
    SIDE_FILE,
    DocumentError,
    check_memory,
    parse_json,
    read_bytes,
    read_mapping,
)
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.libraries import call

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Files that transformers and peft parse if they are there. Others of a tokenizer are text.
_OBJECTS = (
    CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TEXTS = (*GROUPS["tokenizer"], *GROUPS[CHAT])
# Settings that are repeated in a loop, and settings that are lengths of a text.
_LAYERS = re.compile(r"^(num|n)_(\w+_)?layers?$")
_POSITIVE = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "max_position_embeddings")
_COUNT = re.compile(r"layer|depth|block|expert|label|stage|group|class")
_LENGTH = re.compile(r"position|ctx|seq|block_size")
_ADAPTER_SIZE = re.compile(r"num_|rank|_dim$|size|len$|layer|_r$")
# Keys that name models, tokenizers and files of any place or server, and values that name none.
_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "adapters": (),
    "shadow_model": ("mirror",),
    "tokenizer_name_or_path": (),
    "prompt_tuning_init_state_dict_path": (),
}
_MOST = 65_536  # repetitions, whatever the files hold
_SHARED_LAYERS = 256  # published models that share one have 12 to 24
_LONGEST = 1 << 25  # tokens; the longest published contexts have 10 million
_WINDOW = 2048  # tokens, to which a text is padded; published models have 64 to 1024
_COPIES = 1024  # layers, virtual tokens and the like of an adapter, whatever it holds
_SPARE_ELEMENTS = 1 << 26  # that no file holds: buffers, and heads that are made up
_SPARE_MODULES = 4000
_TABLES = 2  # copies of the largest tensor until they are tied, beside twice its elements
_MODULES = 16  # modules for each tensor of the files; usual are 1 to 3
_LONGER = 1000  # times that a tokenizer may lengthen a text; usual is 1 to 3
_TOKEN_MEMORY = 1024  # bytes of a parsed vocabulary for each token; usual are 400 to 900
_VOCABULARY = 1 << 30  # bytes of one at most; XLM-V's 901,629 tokens are estimated at 740 MiB
_PACKED = 8  # values in one element of a quantised file


class Stored(NamedTuple):
    """What the files of a checkpoint hold, by their headers.

    Attributes:
        tensors: Number of tensors.
        elements: Number of their elements.
        largest: Largest dimension of any of them.
        widest: Number of elements of the largest of them.
    """

    tensors: int
    elements: int
    largest: int
    widest: int


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
            widest=max((spec.size for spec in specs), default=0),
        )


def _stored_or_none(path: Path) -> Stored:
    try:
        return stored_in(path)
    except CheckpointError:
        return Stored(0, 0, 0, 0)  # told where the tensors are read


def check_documents(path: Path) -> None:
    """Check the files of a folder that libraries read whole, before they do.

    Raises:
        CheckpointError: The folder is none, or a file is not a regular file, too large, nested too
            deeply or no JSON.
    """
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"'{path}': cannot be listed ({error.strerror}). Name a folder that save_pretrained "
            "wrote."
        ) from None
    for file in files:
        if file.is_dir():
            for inner in file.iterdir() if file.name == "additional_chat_templates" else ():
                _check_file(inner)
        elif file.name in _OBJECTS:
            read_mapping(file)
        else:
            _check_file(file)
    for name in ("tokenizer.json", "vocab.json"):
        if (path / name).exists():
            _check_vocabulary(path / name, _stored_or_none(path))


def _check_file(file: Path) -> None:
    """Refuse a pipe or device, which would be waited for, and a large text of a tokenizer."""
    try:
        status = file.stat()
    except OSError:  # a broken link is missing, and is told as that
        return
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: not a regular file. Remove it.")
    is_text = any(fnmatch(file.name, pattern) for pattern in _TEXTS) or file.suffix == ".jinja"
    if is_text and status.st_size > SIDE_FILE:
        raise CheckpointError(
            f"{file}: {status.st_size:,} bytes, where at most {SIDE_FILE:,} are read. Fetch it "
            "again."
        )


def _check_vocabulary(file: Path, stored: Stored) -> None:
    """Refuse a file of a tokenizer that a library could not survive.

    It is not parsed, which takes as long as loading it. A model with a row for each of a million
    tokens may have a list of them.
    """
    limit = max(MEMORY, min(_TOKEN_MEMORY * stored.largest, _VOCABULARY))
    try:
        data = read_bytes(file)
        check_memory(data, limit)
        if b"precompiled_charsmap" in data or b"\\u00" in data:  # names may be escaped
            content = parse_json(data, limit=limit)
            for key, value in settings_in({"": content}):
                if key == "precompiled_charsmap":
                    _check_charsmap(value)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    except DocumentError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Fetch it again.") from None


def _check_charsmap(value: object) -> None:
    """Refuse a map of characters that says it is longer than it is: Rust ends the process then."""
    try:
        data = base64.b64decode(str(value or "AAAAAA=="), validate=True)
    except ValueError:
        raise DocumentError("its precompiled_charsmap is not base64") from None
    if len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4:
        raise DocumentError("its precompiled_charsmap is shorter than it says")


def check_config(path: Path, *, trust_remote_code: bool) -> None:
    """Refuse a config that names code or files elsewhere, or numbers that its tensors lack."""
    file = path / CONFIG
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
        for key, value in settings_in(config):
            if "attn_implementation" in key and "/" in str(value):
                raise CheckpointError(
                    f"{file}: {key} is {shown(value)}, which is code of a Hub repository. Remove "
                    "the key, or pass --trust-remote-code if you trust it."
                )
    stored = _stored_or_none(path)
    for key, value in settings_in(config):
        if isinstance(value, int) and not isinstance(value, bool):
            _check_number(key, value, stored, file)


def _check_number(key: str, value: int, stored: Stored, file: Path) -> None:
    """Refuse a number of a config that its tensors do not bear out, where one follows from them."""
    least: float = -math.inf
    most: float = math.inf
    if _LAYERS.search(key):
        # A layer has a tensor of its own, but for models that share one among all.
        most = max(_SHARED_LAYERS, stored.tensors)
    elif key == "attention_window":
        most = _WINDOW
    elif _LENGTH.search(key):
        most = max(_LONGEST, stored.largest)
    elif _COUNT.search(key):
        most = max(_MOST, stored.tensors, stored.largest)
    if key in _POSITIVE:
        least = 1
    if not least <= value <= most:
        expected = f"at least {least}" if value < least else f"at most {most:,}"
        raise CheckpointError(
            f"{file}: {key} is {shown(value)}, expected {expected}: the tensors of the folder are "
            f"{stored.tensors:,}, with dimensions up to {stored.largest:,}. Take the config of the "
            "model that they are of."
        )


def check_adapter(path: Path) -> None:
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
    for key, inside in _ELSEWHERE.items():
        if config.get(key) not in (None, *inside):
            raise CheckpointError(
                f"{file}: {key} is {shown(config[key])}, from which peft would load more than the "
                "adapter. Nothing is read from elsewhere because a config says so: use an adapter "
                "that is complete, such as LoRA."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and any(int(steps[:9]) > 1000 for steps in re.findall(r"\d+", start)):
        raise CheckpointError(
            f"{file}: init_lora_weights is {shown(start)}: so many steps make start values that "
            "the adapter's tensors replace. Write true there."
        )
    copies = list(settings_in({"": config.get("layer_replication")}))
    if len(copies) > _COPIES:
        raise CheckpointError(
            f"{file}: layer_replication has {len(copies):,} numbers, expected at most {_COPIES}. "
            "Take the config that was written with the adapter's tensors."
        )
    ranks = config.get("rank_pattern")
    sizes = [("r", config.get("r"), stored.largest)]
    sizes += [(key, rank, stored.largest) for key, rank in settings_in({"rank_pattern": ranks})]
    sizes += [
        (key, value, max(stored.largest, _COPIES))
        for key, value in settings_in({k: v for k, v in config.items() if k != "rank_pattern"})
        if _ADAPTER_SIZE.search(key)
    ]
    for key, value, limit in sizes:
        if isinstance(value, int) and abs(value) > limit:
            raise CheckpointError(
                f"{file}: {shown(key)} is {shown(value)}, expected at most {limit:,}: that is the "
                "largest dimension of the adapter's tensors. Take the config that was written with "
                "them."
            )


def check_normaliser(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer whose replacements make a text, or what is decoded, many times longer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        step = getattr(backend, part, None)
        if step is None:
            continue
        state = parse_json(
            call(f"'{path}': the tokenizer's {part} cannot be read", step.__getstate__)
        )
        factor = math.prod(
            max(1, len(str(value)))
            for key, value in settings_in({part: state})
            if key in ("content", "prepend")
        )
        if factor > _LONGER:
            raise CheckpointError(
                f"'{path}': the tokenizer's {part} may make a text {factor:,} times as long, "
                f"expected at most {_LONGER} times. Use the tokenizer that belongs to the model."
            )


@contextmanager
def bounded_build(path: Path, stored: Stored, *, is_packed: bool) -> Iterator[None]:
    """Stop the building of a model that is larger than its files.

    transformers first builds a model that takes no memory, so that its size is known in time.
    """
    from torch.nn.modules import module as registration

    # One table of tokens may be stored for an encoder, a decoder, both, and a head.
    built = 2 * stored.elements + _TABLES * stored.widest
    most = built * (_PACKED if is_packed else 1) + _SPARE_ELEMENTS
    most_modules = _MODULES * stored.tensors + _SPARE_MODULES
    sizes: dict[tuple[int, str], int] = {}
    modules = elements = 0

    def refuse() -> None:
        raise CheckpointError(
            f"{path / CONFIG}: it describes a larger model than the tensors of the folder, which "
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


def settings_in(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
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
