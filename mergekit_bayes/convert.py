"""Convert PyTorch's pickled checkpoints to safetensors, shard by shard.

A pickle can run code when it is loaded, so a merge does not read any. Here it is read by
`torch.load(weights_only=True)`, which builds tensors and nothing else. Every tensor keeps its name,
dtype, shape and bits. Tensors that share their memory (tied weights) are stored once.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.foreign import HEAD, explain_stand_in
from mergekit_bayes.checkpoint.layout import check_index, read_index, shard_name, write_index
from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import FETCHED, check_side_files, copy_side_files
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.sources import resolve
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.checkpoint.ties import ties_embeddings
from mergekit_bayes.configs.reading import refuse_output_name
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.records import Frozen, Progress

_PATTERNS = (*FETCHED, "pytorch_model*.bin", "adapter_model*.bin")
_STEMS = {"pytorch_model": "model", "adapter_model": "adapter_model"}  # pickle -> safetensors
_SAVE_AGAIN = (
    "Save it again with `torch.save(model.state_dict(), ...)`, or ask its author for safetensors."
)
_DTYPES = {  # PyTorch's dtype -> its name in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class ConvertReport(Frozen):
    """What a conversion wrote.

    Attributes:
        path: The file or folder.
        files: Names of the safetensors files.
        tensors: Number of stored tensors.
        bytes: Their size.
        tied: Each tied name, with the name that is stored for it.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    tied: dict[str, str]


def run_convert(
    ref: str,
    out: str | Path,
    force: bool = False,
    *,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a pickled checkpoint to safetensors with the same shards, and copy its side files.

    One shard is mapped at a time, and its tensors are written one by one. Of tensors that share all
    of their memory the first name is stored, unless the model's config says `tie_word_embeddings:
    false`: its loader would then not find the others, and all are stored.

    Args:
        ref: A folder with `pytorch_model.bin` (or its shards and index, or `adapter_model.bin`),
            one such file, or `org/name[@revision]`.
        out: A folder; for a file, a `.safetensors` file.
        force: Replace an existing `out`.
        progress: Called with (bytes of the pickles read, bytes of the pickles in all).

    Raises:
        CheckpointError: There is no pickled checkpoint, it holds more than tensors, or `out`
            exists.
        ConfigError: `out` is a folder where a file is needed or the reverse, or `out` would replace
            the model itself.
    """
    refuse_output_name(str(out))
    path, target = resolve(ref, _PATTERNS), Path(out).expanduser()
    pickles = _find(path, ref)
    if path.is_file() != (target.suffix == ".safetensors"):
        form = "a .safetensors file" if path.is_file() else "a folder"
        raise ConfigError(f"-o {target}: '{ref}' becomes {form}. Name one.")
    if target.exists() and path.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"-o {target} would replace '{ref}' itself. Choose another -o.")
    if path.is_dir():
        check_side_files(path)
    with replacing(target, force=force) as partial:
        if path.is_file():
            stored = _convert(pickles, [partial], keep_ties=False, progress=progress)
        else:
            partial.mkdir()
            count = len(pickles.files)
            files = [partial / shard_name(pickles.stem, i, count) for i in range(count)]
            stored = _convert(pickles, files, keep_ties=_unties(path), progress=progress)
            if len(files) > 1:
                shards = {f.name: list(specs) for f, specs in zip(files, stored.specs, strict=True)}
                write_index(partial, pickles.stem, shards, stored.nbytes)
            copy_side_files(path, partial)
    return ConvertReport(
        path=target,
        files=(target.name,) if path.is_file() else tuple(f.name for f in files),
        tensors=sum(map(len, stored.specs)),
        bytes=stored.nbytes,
        tied=stored.tied,
    )


class _Pickles(NamedTuple):
    files: tuple[Path, ...]
    stem: str  # of the safetensors files
    index_file: Path | None


class _Stored(NamedTuple):
    specs: list[dict[str, TensorSpec]]  # by shard
    tied: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for specs in self.specs for spec in specs.values())


def _find(path: Path, ref: str) -> _Pickles:
    """The pickles of a folder, or the one file."""
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"'{ref}' is a .safetensors file already; every command reads it as it is."
            )
        return _Pickles((path,), "model", None)
    for pickles, stem in _STEMS.items():
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if os.path.exists(path / name):
                pickle = path / f"{pickles}.bin"
                way_out = (
                    f" To convert its pickle all the same, name the file: {pickle}."
                    if pickle.exists()
                    else ""
                )
                raise CheckpointError(
                    f"'{ref}' holds {name} already, and every command reads it as it is.{way_out}"
                )
    for pickles, stem in _STEMS.items():
        single, index = path / f"{pickles}.bin", path / f"{pickles}.bin.index.json"
        if os.path.exists(single) and os.path.lexists(index):
            raise CheckpointError(
                f"{path}: holds both {single.name} and {index.name}. Remove the stale one."
            )
        if os.path.exists(single):
            return _Pickles((single,), stem, None)
        if os.path.lexists(index):
            names = sorted(set(read_index(index).values()))
            return _Pickles(tuple(path / name for name in names), stem, index)
    raise CheckpointError(
        f"'{ref}' holds neither pytorch_model.bin nor pytorch_model.bin.index.json. "
        "Name a folder that does, or the file."
    )


def _convert(
    pickles: _Pickles, targets: list[Path], *, keep_ties: bool, progress: Progress | None
) -> _Stored:
    sizes = [file.stat().st_size for file in pickles.files]
    stored, file_of = _Stored([], {}), dict[str, str]()
    for i, (file, target) in enumerate(zip(pickles.files, targets, strict=True)):
        specs, tied = _convert_file(file, target, keep_ties)
        for name in (*specs, *tied):
            if name in file_of:
                raise CheckpointError(
                    f"{shown(name)} is in two shards, {file_of[name]} and {file.name}. Remove the "
                    "stale one."
                )
            file_of[name] = file.name
        stored.specs.append(specs)
        stored.tied.update(tied)
        if progress:
            progress(sum(sizes[: i + 1]), sum(sizes))
    if pickles.index_file is not None:
        check_index(pickles.index_file, read_index(pickles.index_file), file_of)
    return stored


def _convert_file(
    file: Path, target: Path, keep_ties: bool
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Write one pickle's tensors: the specs of what is stored, and the stored name of each tie."""
    tensors = _load(file)
    specs = {name: _spec(tensor, name, file) for name, tensor in tensors.items()}
    tied = {} if keep_ties else _ties(tensors)
    stored = {name: spec for name, spec in specs.items() if name not in tied}
    # Ties are recorded as the format's own `save_model` does: alias to stored name.
    with SafetensorsSink(target, stored, {**tied, "format": "pt"}) as sink:
        for name in stored:
            sink.write_bytes(name, 0, _bytes(tensors[name]))
    return stored, tied


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Each tensor that is the very same view of memory as an earlier one, and that one's name."""
    first: dict[object, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        view = (
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if tensor.numel() and first.setdefault(view, name) != name:
            ties[name] = first[view]
    return ties


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name, mapped from the file; an error if it holds anything else."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        if file.is_file():
            with file.open("rb") as content:
                head = content.read(HEAD)
            if reason := explain_stand_in(head):
                raise CheckpointError(f"{file}: {reason}")
        raise CheckpointError(
            f"{file}: is not a file of torch.save since PyTorch 1.6, or was cut. Fetch it again. "
            f"{_SAVE_AGAIN}"
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|class|function) ([A-Za-z_][\w.]*\.\w+)", str(error))
        raise CheckpointError(
            f"{file}: holds {match[1] if match else 'something'} beside tensors, which could run "
            f"code when it is loaded, so it is refused. {_SAVE_AGAIN}"
        ) from None
    except Exception as error:  # a broken archive makes torch raise errors of many classes
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{file}: cannot be loaded as tensors only ({type(error).__name__}: {reason}). "
            f"Fetch it again. {_SAVE_AGAIN}"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file}: holds {type(content).__name__}, not tensors by name. {_SAVE_AGAIN}"
        )
    for name, tensor in content.items():
        _check_entry(file, name, tensor)
    return {name: tensor.detach() for name, tensor in content.items()}


def _check_entry(file: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{file}: {shown(name)} is {type(tensor).__name__}, where a state dict holds a tensor "
            f"by its name. {_SAVE_AGAIN}"
        )
    if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
        raise CheckpointError(
            f"{file}: {shown(name)} cannot be a name in safetensors. {_SAVE_AGAIN}"
        )


def _spec(tensor: Tensor, name: str, file: Path) -> TensorSpec:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
        form = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
        raise CheckpointError(
            f"{file}: {shown(name)} is {form}, which safetensors cannot hold. Make it dense first."
        )
    return TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, as safetensors stores them."""
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _unties(folder: Path) -> bool:
    """Whether the model's config says that its head is not tied to its embeddings."""
    return ties_embeddings(read_config(folder)) is False
