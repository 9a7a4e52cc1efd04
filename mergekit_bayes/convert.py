"""Convert PyTorch's pickled checkpoints to safetensors, shard by shard.

A pickle can run code when it is loaded, so a merge does not read any, and none is loaded here
either: `checkpoint.pickle_steps` reads where its tensors lie, and their bytes are copied. Every
tensor keeps its name, dtype, shape and bits. Tensors that are the same view of the same bytes (tied
weights) are stored once.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.archive import MOST_MEMBERS, SAVE_AGAIN, Archive
from mergekit_bayes.checkpoint.layout import check_index, read_index, shard_name, write_index
from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.pickle_steps import LARGEST, read_pickle
from mergekit_bayes.checkpoint.pickled import (
    ForeignError,
    Named,
    OtherTensor,
    PickledTensor,
    PickleError,
    Storage,
)
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import FETCHED, check_side_files, copy_side_files
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.sources import resolve
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, TensorSpec
from mergekit_bayes.checkpoint.stamps import refuse_changed, stamps_of
from mergekit_bayes.checkpoint.ties import ties_embeddings
from mergekit_bayes.configs.reading import refuse_output_name
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.records import Frozen, Progress

_PATTERNS = (*FETCHED, "pytorch_model*.bin", "adapter_model*.bin")
_STEMS = {"pytorch_model": "model", "adapter_model": "adapter_model"}  # pickle -> safetensors
# How many times its own size a file may take, written out. Names that share memory take more than
# the file where a config unties them: an embedding, which can be most of a model, up to four times.
_GROWTH = 4
_BLOCK = 4 << 20  # bytes of a strided tensor that are put in order at a time
_SIGN_BIT = {"F16": 15, "BF16": 15, "F32": 31, "F64": 63}


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

    One shard is open at a time, and its tensors are copied one by one. Of tensors that share all of
    their memory the first name is stored, unless the model's config says `tie_word_embeddings:
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
        ChangedError: A file was written to while it was read.
        ConfigError: `out` is a folder where a file is needed or the reverse, or `out` would replace
            the model itself.
    """
    refuse_output_name(str(out))
    path, target = resolve(ref, _PATTERNS), Path(out).expanduser()
    pickles = _find(path, ref)
    if path.is_dir() == (target.suffix == ".safetensors"):
        form = "a folder" if path.is_dir() else "a .safetensors file"
        raise ConfigError(f"-o {target}: '{ref}' becomes {form}. Name one.")
    if os.path.exists(target) and path.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"-o {target} would replace '{ref}' itself. Choose another -o.")
    if path.is_dir():
        check_side_files(path)
    stamps = stamps_of(pickles.files)
    with replacing(target, force=force) as partial:
        if not path.is_dir():
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
        refuse_changed(stamps)
    return ConvertReport(
        path=target,
        files=tuple(f.name for f in files) if path.is_dir() else (target.name,),
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
    if not path.is_dir():
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
    with Archive(file) as archive:
        tensors = _read_tensors(archive)
        tied = {} if keep_ties else _ties(tensors)
        stored = {name: tensor for name, tensor in tensors.items() if name not in tied}
        specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in stored.items()}
        nbytes = sum(spec.nbytes for spec in specs.values())
        if nbytes > _GROWTH * archive.size:
            largest = max(specs, key=lambda name: specs[name].nbytes)
            raise CheckpointError(
                f"{file}: has {archive.size:,} bytes, but its tensors would take {nbytes:,} when "
                f"they are written out, most of them {shown(largest)}: views that repeat the same "
                "numbers. Make them contiguous before they are saved."
            )
        # Ties are recorded as the format's own `save_model` does: alias to stored name.
        with SafetensorsSink(target, specs, {**tied, "format": "pt"}) as sink:
            for storage, names in _by_storage(stored).items():
                _copy(archive, storage, {name: stored[name] for name in names}, sink)
    return specs, tied


def _ties(tensors: Mapping[str, PickledTensor]) -> dict[str, str]:
    """Each tensor that is the very same view of memory as an earlier one, and that one's name."""
    first: dict[PickledTensor, str] = {}
    return {
        name: first[tensor]
        for name, tensor in tensors.items()
        if 0 not in tensor.shape and first.setdefault(tensor, name) != name
    }


def _by_storage(tensors: Mapping[str, PickledTensor]) -> dict[Storage, list[str]]:
    names: dict[Storage, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.storage, []).append(name)
    return names


def _read_tensors(archive: Archive) -> dict[str, PickledTensor]:
    """The tensors of an archive by name; an error if it holds anything else, or not their bytes."""
    file, members = archive.path, archive.members
    pickle = members.get("data.pkl")
    if pickle is None:
        raise CheckpointError(f"{file}: is a zip archive without data.pkl. {SAVE_AGAIN}")
    if pickle.size > LARGEST:
        raise CheckpointError(
            f"{file}: its pickle has {pickle.size:,} bytes, where at most {LARGEST:,} are read. "
            f"{SAVE_AGAIN}"
        )
    archive.check("data.pkl")
    order = members.get("byteorder")
    if order and archive.read(order.start, min(order.size, 8)) != b"little":
        raise CheckpointError(
            f"{file}: was saved on a machine of another byte order. Load it in Python and save it "
            "with `safetensors.torch.save_file`."
        )
    try:
        content = read_pickle(archive.read(pickle.start, pickle.size))
    except ForeignError as error:
        raise CheckpointError(
            f"{file}: holds {shown(str(error))} beside tensors, which could run code when it is "
            f"loaded, so it is refused. {SAVE_AGAIN}"
        ) from None
    except PickleError as error:
        raise CheckpointError(f"{file}: {error}. Fetch it again. {SAVE_AGAIN}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {_kind(content)}, not tensors by name. {SAVE_AGAIN}")
    if len(content) > MOST_MEMBERS:
        raise CheckpointError(
            f"{file}: holds {len(content):,} tensors, where at most {MOST_MEMBERS:,} are read."
        )
    return {name: _checked(archive, name, tensor) for name, tensor in content.items()}


def _kind(value: object) -> str:
    if isinstance(value, Named):
        return value.name.removeprefix("__builtin__.")
    is_tensor = isinstance(value, PickledTensor | OtherTensor)
    return "Tensor" if is_tensor else type(value).__name__


def _checked(archive: Archive, name: object, tensor: object) -> PickledTensor:
    """A tensor of the pickle, whose storage is in the archive and whose name can be stored."""
    file = archive.path
    if not isinstance(name, str) or not isinstance(tensor, PickledTensor | OtherTensor):
        raise CheckpointError(
            f"{file}: {shown(name)} is {_kind(tensor)}, where a state dict holds a tensor by its "
            f"name. {SAVE_AGAIN}"
        )
    if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
        raise CheckpointError(
            f"{file}: {shown(name)} cannot be a name in safetensors. {SAVE_AGAIN}"
        )
    if isinstance(tensor, OtherTensor) and tensor.is_broken:
        raise CheckpointError(
            f"{file}: {shown(name)} is {tensor.kind}. Fetch it again. {SAVE_AGAIN}"
        )
    if isinstance(tensor, OtherTensor) or tensor.dtype not in ITEM_SIZE:
        form = tensor.kind if isinstance(tensor, OtherTensor) else tensor.dtype
        raise CheckpointError(
            f"{file}: {shown(name)} is {form}, which safetensors cannot hold. Make it plain first."
        )
    storage = tensor.storage
    member = archive.members.get(f"data/{storage.key}")
    if member is None or member.size != storage.size:
        found = "are not there" if member is None else f"are {member.size:,}"
        raise CheckpointError(
            f"{file}: {shown(name)} needs the {storage.size:,} bytes of the member "
            f"{shown('data/' + storage.key)}, which {found}. Fetch it again."
        )
    return tensor


def _copy(
    archive: Archive,
    storage: Storage,
    tensors: Mapping[str, PickledTensor],
    sink: SafetensorsSink,
) -> None:
    """Write the tensors of one storage, after its bytes have been compared with their checksum."""
    member = f"data/{storage.key}"
    archive.check(member)
    start = archive.members[member].start
    whole = None
    for name, tensor in tensors.items():
        item, at = ITEM_SIZE[tensor.dtype], 0
        if 0 in tensor.shape:
            continue
        if tensor.is_plain:
            pieces = archive.chunks(start + tensor.offset * item, math.prod(tensor.shape) * item)
        else:
            if whole is None:  # read once, however many views there are
                whole = np.frombuffer(archive.read(start, storage.size), np.uint8)
            pieces = _in_order(tensor, whole)
        for piece in pieces:
            sink.write_bytes(name, at, memoryview(piece))
            at += len(piece)


def _in_order(tensor: PickledTensor, storage: Array) -> Iterator[bytes]:
    """The bytes of a strided tensor in row-major order, as safetensors stores them."""
    item = ITEM_SIZE[tensor.dtype]
    numbers = storage[: storage.size // item * item].view(f"<u{item}")[tensor.offset :]
    view = np.lib.stride_tricks.as_strided(
        numbers, tensor.shape, [n * item for n in tensor.stride], writeable=False
    )
    flips = np.array(_flips(tensor), numbers.dtype)
    rows = view if view.ndim else view.reshape(1)
    count = max(1, _BLOCK // max(1, rows[0].nbytes))
    for i in range(0, len(rows), count):
        yield (np.ascontiguousarray(rows[i : i + count]) ^ flips).tobytes()


def _flips(tensor: PickledTensor) -> int:
    """The bits of each element that are to be turned: signs, where a view negates."""
    if tensor.dtype != "C64":
        return 1 << _SIGN_BIT[tensor.dtype] if tensor.is_negative else 0
    real, imaginary = tensor.is_negative, tensor.is_negative != tensor.is_conjugate
    return real << 31 | imaginary << 63


def _unties(folder: Path) -> bool:
    """Whether the model's config says that its head is not tied to its embeddings."""
    return ties_embeddings(read_config(folder)) is False
