"""What a tensor is on disk, and the protocols of sources and sinks."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray


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


class Closing:
    """A resource that a `with` block closes, however the block ends."""

    def close(self) -> None:
        """Release the resource. Calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


class CheckpointSource(TensorSource, Protocol):
    """Named tensors that lie in the files of a checkpoint, or are computed from it."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read: an output must not replace any of them."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks about the files for whoever reads them, one sentence each."""
        ...

    @property
    def is_computed(self) -> bool:
        """Whether tensors are computed as they are read, and their dtype is that of arithmetic."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def file_of(self, name: str) -> int:
        """Index of the shard to which a tensor belongs."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class PrecisionSource(CheckpointSource, Protocol):
    """The precisions of a checkpoint, stored or computed."""

    def counted(self, count: float) -> "PrecisionSource":
        """The precisions as if `count` observations had been seen.

        Only a computed precision depends on the count nonlinearly and answers with another source.
        A stored one returns itself: its count is a factor, which the reader applies.
        """
        ...


Array = NDArray[Any]
# Bytes per element of each dtype of the format.
ITEM_SIZE = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# What a mean may be stored in: decoded to float32 (float64 where F64 is written), combined, rounded
# once.
MERGEABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class TensorSink(Protocol):
    """Named tensors to write to; the specs are known beforehand."""

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None: ...


class MemorySource:
    """Arrays as a source, for tests and previews. float16/32/64 and integers, by their numpy dtype."""

    def __init__(self, tensors: Mapping[str, Array], label: str = "memory") -> None:
        self._tensors = {n: np.asarray(t, order="C") for n, t in tensors.items()}
        self._specs = {
            n: TensorSpec(_NAME_OF[t.dtype.str[1:]], t.shape) for n, t in self._tensors.items()
        }
        self._label = label

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def where(self, name: str) -> str:
        return self._label

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        out[:] = self._tensors[name].reshape(-1).view(np.uint8).data[offset : offset + len(out)]


_NAME_OF = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u8": "U64",
    "u4": "U32",
    "u2": "U16",
    "u1": "U8",
    "b1": "BOOL",
}


def spec_of(array: Array) -> TensorSpec:
    """The spec under which a numpy array would be stored."""
    return TensorSpec(_NAME_OF[array.dtype.str[1:]], array.shape)
