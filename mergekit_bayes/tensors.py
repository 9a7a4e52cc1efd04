"""Stream named tensors in and out of safetensors files, without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' raw
bytes. Everything that a merge must know (names, dtypes, shapes, offsets) is in the JSON, so a plan
reads headers only and the data is read in chunks by `pread`: a file that shrinks under us is then an
error rather than a SIGBUS, and resident memory stays at one chunk.
"""

import errno
import hashlib
import json
import math
import os
import resource
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.errors import CheckpointError

Array = NDArray[Any]

# Bytes per element of each dtype of the format.
ITEM_SIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# What a mean may be stored in: decoded to float32 (float64 where F64 is written), combined, rounded once.
MERGEABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 64  # numpy's own limit
_SPARE = 128  # file descriptors for everything else
_BLOCK, _BLOCKS = 4096, 16  # identity: sixteen blocks a tensor


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_SIZE[self.dtype]


class TensorSource(Protocol):
    """Named tensors to read from."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes from byte `offset` on."""
        ...


class TensorSink(Protocol):
    """Named tensors to write to; the specs are known beforehand."""

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None: ...


class _Placed(NamedTuple):
    spec: TensorSpec
    file: int  # index into the source's files
    start: int  # absolute byte offset


class SafetensorsSource:
    """One safetensors file, or the shards of one checkpoint, checked before any tensor is read.

    Raises `CheckpointError` for a truncated file, a header that is not JSON or names a tensor twice, a size that
    disagrees with dtype and shape, overlapping or missing bytes, and a name that two shards hold. What a header
    claims is checked before anything of that size is allocated.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}
        self._fds: list[int] = []
        self._placed: dict[str, _Placed] = {}
        try:
            for index, path in enumerate(self.files):
                self._open(index, path)
        except BaseException:
            self.close()
            raise
        self._specs = {name: placed.spec for name, placed in self._placed.items()}

    def _open(self, index: int, path: Path) -> None:
        self._fds.append(_open(path, os.O_RDONLY | os.O_NONBLOCK))  # a pipe is then refused below, not waited for
        try:
            header, data_start = _read_header(self._fds[-1], path)
        except OSError as error:
            raise CheckpointError(f"{path}: its header cannot be read ({error.strerror}).") from None
        self.metadata |= header.pop("__metadata__")
        end = os.fstat(self._fds[-1]).st_size - data_start
        for name, placed in _check_header(header, path, index, data_start, end):
            if name in self._placed:
                other = self.files[self._placed[name].file]
                raise CheckpointError(f"{shown(name)} is in two shards, {other} and {path}. Remove the stale one.")
            self._placed[name] = placed

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def where(self, name: str) -> str:
        return str(self.files[self._placed[name].file])

    def file_of(self, name: str) -> int:
        """Index of the shard that holds a tensor."""
        return self._placed[name].file

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        placed, done = self._placed[name], 0
        while done < len(out):
            try:
                n = os.preadv(self._fds[placed.file], [out[done:]], placed.start + offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.where(name)}: reading '{name}' failed ({error.strerror}).") from None
            if n == 0:
                raise CheckpointError(
                    f"{self.where(name)}: ended while '{name}' was being read; it was changed or truncated."
                )
            done += n

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


class MemorySource:
    """Arrays as a source, for tests and previews. float16/32/64 and integers, by their numpy dtype."""

    def __init__(self, tensors: Mapping[str, Array], label: str = "memory") -> None:
        self._tensors = {n: np.asarray(t, order="C") for n, t in tensors.items()}
        self._specs = {n: TensorSpec(_NAME_OF[t.dtype.str[1:]], t.shape) for n, t in self._tensors.items()}
        self._label = label

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def where(self, name: str) -> str:
        return self._label

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        out[:] = self._tensors[name].reshape(-1).view(np.uint8).data[offset : offset + len(out)]


class LostError(CheckpointError):
    """A file that was begun is not there any more, or not in its size."""


class SafetensorsSink:
    """A safetensors file whose tensors arrive in any order; the header is written last.

    Offsets are known from the specs, so data can be written at once. The metadata may change until `close`
    as long as its JSON does not grow beyond `reserve`, which lets a hash of the data itself go into it. With `shared`
    the file may be there already, begun by another process or by a merge that was stopped: offsets are the same. With
    `begun` it must be there, in its size, or a `LostError` says so.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, shared: bool = False,
        begun: bool = False,
    ) -> None:  # fmt: skip
        self.path = path
        self.metadata = dict(metadata)
        self._offsets: dict[str, int] = {}
        at = 0
        self._entries: dict[str, Any] = {}
        # Widest items first keeps every tensor aligned, as the format's own writer does.
        for name in sorted(specs, key=lambda n: (-ITEM_SIZE[specs[n].dtype], n)):
            spec = specs[name]
            self._offsets[name] = at
            offsets = [at, at + spec.nbytes]
            self._entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
            at += spec.nbytes
        size = len(self._header())
        self._reserved = size + (-size) % 8
        self._start = 8 + self._reserved
        if begun and (not path.is_file() or path.stat().st_size != self._start + at):
            raise LostError(f"{path}: what was written there is gone.")
        self._fd = _open(path, os.O_RDWR | (0 if begun else os.O_CREAT) | (0 if shared else os.O_EXCL))
        self._guarded(self._allocate, self._start + at)

    def _header(self) -> bytes:
        content = {"__metadata__": self.metadata, **self._entries}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()

    def _allocate(self, size: int) -> None:
        # A full disk is then found before the first tensor is combined.
        if not hasattr(os, "posix_fallocate"):  # macOS
            os.ftruncate(self._fd, size)
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(self._fd, size)

    def _guarded(self, act: Any, *args: Any) -> Any:
        try:
            return act(*args)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: writing failed ({error.strerror}). Free some space or choose another -o."
            ) from None

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        at, done = self._start + self._offsets[name] + offset, 0
        while done < len(data):
            done += self._guarded(os.pwrite, self._fd, data[done:], at + done)

    def close(self) -> None:
        """Write the header. Without this call the file is not a safetensors file."""
        header = self._header()
        if len(header) > self._reserved:
            raise ValueError("the metadata grew beyond what was reserved for it")
        whole = struct.pack("<Q", self._reserved) + header.ljust(self._reserved, b" ")
        self._guarded(os.pwrite, self._fd, whole, 0)
        self.abandon()

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        self._guarded(os.fsync, self._fd)

    def abandon(self) -> None:
        """Close the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def decode(raw: Array, dtype: str) -> Array:
    """Raw bytes of a mergeable dtype as float32 (float64 for F64); may share memory with `raw`."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    if dtype in _F8:
        return _F8[dtype].values[raw.view(np.uint8)]
    return raw.view("<f8" if dtype == "F64" else "<f4")


def encode(values: Array, dtype: str) -> memoryview:
    """Round float32 (float64 for F64) to nearest even, once, into the bytes of a mergeable dtype.

    A value that rounds beyond the largest becomes infinity, or NaN in F8_E4M3, which has no infinity: nothing is
    clipped to the largest, so that `overflowed` finds it.
    """
    if dtype in _F8:
        return _encode_f8(values, dtype)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        if (nan := (bits & 0x7FFFFFFF) > 0x7F800000).any():
            rounded[nan] = 0x7FC0  # rounding up would carry some of them over to zero
        return rounded.view(np.uint8).data
    numpy_dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=numpy_dtype).view(np.uint8).data


def overflowed(data: memoryview, dtype: str) -> int:
    """How many entries are infinity or NaN in the bytes of a mergeable dtype, as `encode` gives them."""
    if dtype in _F8:
        return int(np.count_nonzero((np.frombuffer(data, np.uint8) & 0x7F) >= _F8[dtype].infinity))
    if dtype == "BF16":
        return int(np.count_nonzero((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80))
    numpy_dtype = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    return int(np.count_nonzero(~np.isfinite(np.frombuffer(data, numpy_dtype))))


def chunks(spec: TensorSpec, size: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `size` elements that cover a tensor; none for an empty one."""
    for start in range(0, spec.size, size):
        yield start, min(start + size, spec.size)


def read_chunk(source: TensorSource, name: str, start: int, stop: int) -> Array:
    """Elements `start:stop` of a tensor in flat order, as float32 (float64 for F64)."""
    dtype = source.specs[name].dtype
    item = ITEM_SIZE[dtype]
    raw = np.empty((stop - start) * item, np.uint8)
    source.read_bytes(name, start * item, raw.data)
    return decode(raw, dtype)


def read_tensor(source: TensorSource, name: str) -> Array:
    """A whole tensor in its shape, as float32 (float64 for F64)."""
    spec = source.specs[name]
    return read_chunk(source, name, 0, spec.size).reshape(spec.shape)


def block_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of sixteen 4-KiB blocks spread over a tensor's bytes (all of a small one's)."""
    nbytes = source.specs[name].nbytes
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
    if nbytes <= _BLOCK * _BLOCKS:
        starts = range(0, nbytes, _BLOCK)
    else:
        starts = [(nbytes - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]  # type: ignore[assignment]
    for start in starts:
        out = memoryview(buffer)[: min(_BLOCK, nbytes - start)]
        source.read_bytes(name, start, out)
        digest.update(out)
    return digest.digest()


def full_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of all of a tensor's bytes."""
    nbytes, step = source.specs[name].nbytes, 1 << 20
    digest, buffer = hashlib.sha256(), bytearray(step)
    for start in range(0, nbytes, step):
        out = memoryview(buffer)[: min(step, nbytes - start)]
        source.read_bytes(name, start, out)
        digest.update(out)
    return digest.digest()


def identity(source: TensorSource, *, full: bool = False) -> str:
    """Who these tensors are: SHA-256 over each one's name, dtype, shape and content, in order of name.

    Content is sixteen 4-KiB blocks a tensor, or all of it if `full`. Independent of sharding.
    """
    content = full_hash if full else block_hash
    digest = hashlib.sha256()
    for name in sorted(source.specs):
        spec = source.specs[name]
        digest.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0".encode())
        digest.update(content(source, name))
    return digest.hexdigest()


_NAME_OF = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
            "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL"}  # fmt: skip


def spec_of(array: Array) -> TensorSpec:
    """The spec under which a numpy array would be stored."""
    return TensorSpec(_NAME_OF[array.dtype.str[1:]], array.shape)


def parse_json(text: bytes) -> Any:
    """JSON as checkpoints mean it: UTF-8, no name twice in an object, no NaN or infinity, no half of a character.

    Raises `ValueError` that says what is wrong.
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        if b"\\u" in text:  # only an escape can bring half of a surrogate pair
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    return found


def shown(value: object) -> str:
    """What a file says, for a message: quoted, control characters escaped, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}...{text[-1]}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {shown(twice)} twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


class _Float8(NamedTuple):
    mantissa: int  # bits
    bias: int  # of the exponent
    infinity: int  # the first code that is no finite number
    values: Array  # float32 of all 256 codes


def _float8(mantissa: int, bias: int, infinity: int, code_of_infinity: float) -> _Float8:
    codes = np.arange(128)
    exponent, fraction = codes >> mantissa, codes & ((1 << mantissa) - 1)
    fraction = np.where(exponent > 0, fraction + (1 << mantissa), fraction)
    values = np.ldexp(fraction.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa)
    values[infinity:] = np.nan
    values[infinity] = code_of_infinity
    return _Float8(mantissa, bias, infinity, np.concatenate([values, -values]))


# "OCP 8-bit floating point specification", 2023. E4M3 spends its last code on NaN and has no infinity.
_F8 = {"F8_E4M3": _float8(3, 7, 0x7F, math.nan), "F8_E5M2": _float8(2, 15, 0x7C, math.inf)}


def _encode_f8(values: Array, dtype: str) -> memoryview:
    # Half of the bits are enough if the last one says whether the others held anything ("round to odd"); the code of
    # each is then looked up, which takes a sixth of the time.
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) | ((bits & np.uint32(0xFFFF)) != 0)
    codes: Array = _f8_codes(dtype)[odd]
    return codes.data


@cache
def _f8_codes(dtype: str) -> Array:
    """The code of every float32 whose lower sixteen bits are zero, by its upper ones."""
    kind, bits = _F8[dtype], np.arange(1 << 16, dtype=np.uint32) << 16
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Normal numbers: drop the low bits of the fraction to nearest even; a carry moves into the exponent by itself.
    dropped = 23 - kind.mantissa
    code = (magnitude + np.uint32((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & np.uint32(1))) >> dropped
    # Subnormal ones: the sum's last bit is worth one step, so that the addition itself rounds to nearest even.
    step = 2.0 ** (1 - kind.bias - kind.mantissa)
    offset = np.float32(step * 2**23)
    with np.errstate(invalid="ignore"):
        steps = (magnitude.view(np.float32) + offset).view(np.uint32) - offset.view(np.uint32)
    smallest_normal = np.float32(2.0 ** (1 - kind.bias)).view(np.uint32)
    code = np.where(magnitude < smallest_normal, steps, code - np.uint32((127 - kind.bias) << kind.mantissa))
    code = np.minimum(code, np.uint32(kind.infinity))
    code[magnitude > 0x7F800000] = 0x7F
    signed: Array = (code | ((bits >> 24) & np.uint32(0x80))).astype(np.uint8)
    return signed


def _open(path: Path, flags: int) -> int:
    """A file descriptor; the process may have as many as the system lets it, once it comes near the usual limit."""
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.EMFILE:
            many = "too many open files; allow more with `ulimit -n 65536`"
            raise CheckpointError(f"{path}: cannot be opened ({many}).") from None
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft != hard and fd + _SPARE > soft:
        with suppress(OSError, ValueError):  # macOS names no limit and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return fd


def _read_header(fd: int, path: Path) -> tuple[dict[str, Any], int]:
    size = os.fstat(fd).st_size
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise CheckpointError(f"{path}: is not a file.")
    head = os.pread(fd, 8, 0)
    if len(head) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file. Fetch it again.")
    (length,) = struct.unpack("<Q", head)
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path}: says its header has {length} bytes, but the file has {size}. "
            "It is truncated or not a safetensors file; fetch it again."
        )
    try:
        header = parse_json(os.pread(fd, length, 8))
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}). Is it a safetensors file?") from None
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: its __metadata__ is not text by name. Is it a safetensors file?")
    return {"__metadata__": metadata, **header}, 8 + length


def _check_header(
    header: Mapping[str, Any], path: Path, index: int, data_start: int, available: int
) -> Iterator[tuple[str, _Placed]]:
    spans = []
    for name, entry in header.items():
        spec, start, stop = _check_entry(name, entry, path)
        if stop - start != spec.nbytes:
            raise CheckpointError(
                f"{path}: {shown(name)} is {spec.dtype} {list(spec.shape)} and needs {spec.nbytes} bytes, "
                f"but its offsets [{start}, {stop}] give {stop - start}. The header is wrong; fetch it again."
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
            what = "overlaps another tensor" if start < end else f"leaves {start - end} bytes unused before it"
            raise CheckpointError(f"{path}: {shown(name)} {what}. The header is wrong; fetch it again.")
        end = stop
        yield name, _Placed(spec, index, data_start + start)
    if end != available:
        raise CheckpointError(
            f"{path}: has {available - end} bytes after its last tensor. The header is wrong; fetch it again."
        )


def _check_entry(name: str, entry: Any, path: Path) -> tuple[TensorSpec, int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if all(
            type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop)
        ):
            pass
        case _:
            raise CheckpointError(
                f"{path}: the header's entry for {shown(name)} is not dtype, shape and data_offsets, in whole numbers "
                "from 0 on. Fetch it again."
            )
    if dtype not in ITEM_SIZE:
        raise CheckpointError(f"{path}: {shown(name)} has the unknown dtype {shown(dtype)}.")
    # Counted step by step: the product of a long shape would be a number as long as the shape.
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
