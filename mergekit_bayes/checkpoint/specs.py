"""What a tensor is on disk, and the protocols of tensor sources and sinks."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.stamps import Stamp

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

# The dtypes of means: decoded to float32 (float64 where F64 is written), combined, rounded once.
MERGEABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# The format's name of a numpy dtype, by kind and bytes.
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


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor, as a header gives them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * ITEM_SIZE[self.dtype]


def spec_of(array: Array) -> TensorSpec:
    """The spec under which a numpy array would be stored."""
    return TensorSpec(_NAME_OF[array.dtype.str[1:]], array.shape)


class TensorSource(Protocol):
    """Named tensors to read from."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        ...


class CheckpointSource(TensorSource, Protocol):
    """Named tensors that are stored in the files of a checkpoint, or computed from it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The checkpoint's safetensors files, one per shard."""
        ...

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """All files that are read, as they were when opened. No output may replace any of them."""
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
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of the files' headers."""
        ...

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


class TensorSink(Protocol):
    """Named tensors to write to, whose specs are fixed before the first write."""

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor, starting at its byte `offset`."""
        ...


class Closing:
    """Mixin of resources that a `with` block closes, however the block ends."""

    def close(self) -> None:
        """Release the resource. Calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemorySource:
    """Arrays as a tensor source, for tests and previews: float16/32/64 and integers."""

    def __init__(self, tensors: Mapping[str, Array], label: str = "memory") -> None:
        """Serve `tensors` by name.

        Args:
            tensors: The arrays; each is stored under the dtype that numpy gives it.
            label: What messages call the source.
        """
        self._tensors = {n: np.asarray(t, order="C") for n, t in tensors.items()}
        self._specs = {n: spec_of(t) for n, t in self._tensors.items()}
        self._label = label

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every array, by name."""
        return self._specs

    def where(self, name: str) -> str:
        """The label, for messages."""
        return self._label

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the array's raw bytes, starting at byte `offset`."""
        out[:] = self._tensors[name].reshape(-1).view(np.uint8).data[offset : offset + len(out)]
