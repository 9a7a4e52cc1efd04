"""Stream named tensors in and out of safetensors files, without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' raw
bytes. Everything that a merge must know (names, dtypes, shapes, offsets) is in the JSON, so a plan
reads headers only. The data is read in chunks by `pread` instead of a memory map: a file that
shrinks meanwhile is then an error rather than a SIGBUS, and resident memory stays at one chunk.
"""

import errno
import os
import resource
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

from mergekit_bayes.checkpoint.foreign import HEAD, explain_foreign
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Closing, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp, stamp_of
from mergekit_bayes.documents import parse_json
from mergekit_bayes.errors import CheckpointError, printable, shown

_MAX_HEADER = 100_000_000  # the format's own limit
# Names are compared part by part, in time and memory that grow with the square of the parts.
_LONGEST_NAME, _MOST_PARTS = 4096, 50  # characters, of which names have about 100; and parts, 12
_MAX_DIMENSIONS = 64  # numpy's own limit
_SPARE = 128  # file descriptors left for everything else


class _Placed(NamedTuple):
    """A tensor and where its bytes lie."""

    spec: TensorSpec
    file: int  # index into the source's files
    start: int  # absolute byte offset


class SafetensorsSource(Closing):
    """One safetensors file, or the shards of one checkpoint, checked before any tensor is read.

    What a header claims is checked before anything of that size is allocated.

    Attributes:
        files: The files, in the order given.
        inputs: The same files, each with its stamp of when it was opened.
        metadata: The `__metadata__` of all headers, merged.
        notes: None.
        is_computed: False.
    """

    notes: tuple[str, ...] = ()
    is_computed = False

    def __init__(self, files: Sequence[Path]) -> None:
        """Open the files and check their headers.

        Raises:
            CheckpointError: A file is truncated; a header is not JSON or names a tensor twice; a
                size disagrees with dtype and shape; bytes overlap or are missing; or two shards
                hold one name.
        """
        self.files = tuple(files)
        self.inputs: dict[Path, Stamp] = {}
        self.metadata: dict[str, str] = {}
        self._fds: list[int] = []
        self._placed: dict[str, _Placed] = {}
        with ExitStack() as stack:
            stack.callback(self.close)
            for index, path in enumerate(self.files):
                self._open(index, path)
            stack.pop_all()  # opened in full: the caller closes it from here on
        self._specs = {name: placed.spec for name, placed in self._placed.items()}

    def _open(self, index: int, path: Path) -> None:
        # Without O_NONBLOCK a pipe would be waited for; with it, the check of its mode refuses it.
        self._fds.append(open_file(path, os.O_RDONLY | os.O_NONBLOCK))
        self.inputs[path] = stamp_of(self._fds[-1])
        try:
            header, metadata, data_start = _read_header(self._fds[-1], path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: its header cannot be read ({error.strerror})."
            ) from None
        self.metadata |= metadata
        end = os.fstat(self._fds[-1]).st_size - data_start
        for name, placed in _check_header(header, path, index, data_start, end):
            if name in self._placed:
                other = self.files[self._placed[name].file]
                raise CheckpointError(
                    f"{shown(name)} is in two shards, {other} and {path}. Remove the stale one."
                )
            self._placed[name] = placed

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        return self._specs

    def counted(self, count: float) -> Self:
        """The same source: the count of a stored precision is a factor."""
        return self

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self.files[self._placed[name].file])

    def file_of(self, name: str) -> int:
        """Index of the shard that holds a tensor."""
        return self._placed[name].file

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`.

        Safe in several threads at once.

        Raises:
            CheckpointError: The file cannot be read, or is shorter than it was when opened.
        """
        placed, done = self._placed[name], 0
        while done < len(out):
            try:
                n = os.preadv(self._fds[placed.file], [out[done:]], placed.start + offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.where(name)}: reading '{name}' failed ({error.strerror})."
                ) from None
            if n == 0:
                raise CheckpointError(
                    f"{self.where(name)}: ended while '{name}' was being read; it was changed or "
                    "truncated."
                )
            done += n

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        while self._fds:
            os.close(self._fds.pop())


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags, 0o666)


def open_file(path: Path, flags: int, opener: Callable[[Path, int], int] = _open) -> int:
    """Open a file and return its descriptor.

    Near the soft limit of open files, the limit is raised to the hard one, since a merge of many
    sharded models keeps many files open.

    Args:
        path: The file.
        flags: Flags of `os.open`.
        opener: What opens it.

    Raises:
        CheckpointError: The file cannot be opened.
    """
    try:
        fd = opener(path, flags)
    except OSError as error:
        if error.errno == errno.EMFILE:
            many = "too many open files; allow more with `ulimit -n 65536`"
            raise CheckpointError(f"{path}: cannot be opened ({many}).") from None
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft != hard and fd + _SPARE > soft:
        with suppress(OSError, ValueError):  # macOS reports no hard limit, yet has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return fd


def _read_header(fd: int, path: Path) -> tuple[dict[str, object], dict[str, str], int]:
    """The header's entries by tensor, its metadata, and the byte at which the data starts."""
    size = os.fstat(fd).st_size
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise CheckpointError(f"{path}: is not a file.")
    head = os.pread(fd, HEAD, 0)
    if len(head) < 8:
        raise _unreadable(
            path, head, size, f"{size} bytes are too few for a safetensors file. Fetch it again."
        )
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(size - 8, _MAX_HEADER):
        raise _unreadable(
            path,
            head,
            size,
            f"says its header has {length} bytes, but the file has {size}. "
            "It is truncated or not a safetensors file; fetch it again.",
        )
    try:
        header = parse_json(os.pread(fd, length, 8), strict=True)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _unreadable(
            path, head, size, f"its header is not JSON ({error}). Is it a safetensors file?"
        ) from None
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: its __metadata__ is not text by name. Is it a safetensors file?"
        )
    return header, metadata, 8 + length


def _unreadable(path: Path, head: bytes, size: int, symptom: str) -> CheckpointError:
    """The error for a header that makes no sense: what the file really is, or the symptom."""
    return CheckpointError(f"{path}: {explain_foreign(head, size, path) or symptom}")


def _check_header(
    header: Mapping[str, object], path: Path, index: int, data_start: int, available: int
) -> Iterator[tuple[str, _Placed]]:
    """Yield each tensor with its place, in order of the bytes, which must be covered exactly."""
    spans = []
    for name, entry in header.items():
        spec, start, stop = check_entry(name, entry, path)
        if stop - start != spec.nbytes:
            raise CheckpointError(
                f"{path}: {shown(name)} is {spec.dtype} {list(spec.shape)} and needs {spec.nbytes} "
                f"bytes, but its offsets [{start}, {stop}] give {stop - start}. The header is "
                "wrong; fetch it again."
            )
        if stop > available:
            raise CheckpointError(
                f"{path}: {shown(name)} should end at data byte {stop}, but there are {available}. "
                "The file is truncated; fetch it again."
            )
        spans.append((start, stop, name, spec))
    end = 0
    for start, stop, name, spec in sorted(spans, key=lambda span: span[:2]):
        if start != end:
            what = (
                "overlaps another tensor"
                if start < end
                else f"leaves {start - end} bytes unused before it"
            )
            raise CheckpointError(
                f"{path}: {shown(name)} {what}. The header is wrong; fetch it again."
            )
        end = stop
        yield name, _Placed(spec, index, data_start + start)
    if end != available:
        raise CheckpointError(
            f"{path}: has {available - end} bytes after its last tensor. The header is wrong; "
            "fetch it again."
        )


def check_entry(name: str, entry: object, path: Path) -> tuple[TensorSpec, int, int]:
    """Spec, first byte and end of a tensor, from its entry in the header.

    Raises:
        CheckpointError: The entry is not one of the format.
    """
    if len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{path}: a tensor has a name of {len(name):,} characters, {shown(name)}, where at "
            f"most {_LONGEST_NAME:,} are read. Save the model under shorter names."
        )
    if (parts := name.count(".") + 1) > _MOST_PARTS:
        raise CheckpointError(
            f"{path}: the name {shown(name)} of a tensor has {parts:,} parts, where at most "
            f"{_MOST_PARTS} are read. Save the model under shorter names."
        )
    if printable(name) != name or "\n" in name or "\t" in name:
        raise CheckpointError(
            f"{path}: the name {shown(name)} of a tensor holds control characters, which no "
            "model's has. Save the model under other names."
        )
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if all(
            type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)
        ):
            pass
        case _:
            raise CheckpointError(
                f"{path}: the header's entry for {shown(name)} is not dtype, shape and "
                "data_offsets, in whole numbers from 0 on. Fetch it again."
            )
    if dtype not in ITEM_SIZE:
        raise CheckpointError(f"{path}: {shown(name)} has the unknown dtype {shown(dtype)}.")
    # Multiplied step by step with an early stop, because the product of a forged shape could be an
    # integer of arbitrary length.
    size = ITEM_SIZE[dtype]
    for n in shape if len(shape) <= _MAX_DIMENSIONS else ():
        size *= max(n, 1)
        if size >= 1 << 63:
            break
    if len(shape) > _MAX_DIMENSIONS or size >= 1 << 63:
        raise CheckpointError(
            f"{path}: {shown(name)} has the shape {shown(shape)}, which no tensor can have. "
            "The header is wrong; fetch it again."
        )
    return TensorSpec(dtype, tuple(shape)), start, stop
