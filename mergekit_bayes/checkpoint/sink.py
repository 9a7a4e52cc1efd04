"""Write a safetensors file whose tensors arrive in any order."""

import errno
import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from mergekit_bayes.checkpoint.own_files import open_own
from mergekit_bayes.checkpoint.safetensors import open_file
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, TensorSpec
from mergekit_bayes.errors import CheckpointError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LostError(CheckpointError):
    """A file that was begun before no longer exists, or has another size."""


class SafetensorsSink:
    """A safetensors file whose tensors arrive in any order; the header is written last.

    Offsets follow from the specs, so data can be written at once. The metadata may change until
    `close`, as long as the header does not grow, which lets a hash of the data itself go into it.
    Used as a context manager, it writes the header at the end, and after an error leaves the file
    without one.

    Attributes:
        path: The file.
        metadata: The `__metadata__` that `close` will write.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        shared: bool = False,
        begun: bool = False,
        sparse: bool = False,
    ) -> None:
        """Create the file at its final size.

        Args:
            path: The file; it must not exist unless `shared` or `begun`.
            specs: Dtype and shape of every tensor, by name.
            metadata: The header's `__metadata__`; its length reserves the room for later changes.
            shared: The file may exist, begun by another process or by a merge that was stopped,
                in a folder of this account.
            begun: The file must exist there, at its final size.
            sparse: Take no room on the disk for what is never written, which is read as zeros.

        Raises:
            CheckpointError: The file cannot be created, or the disk is full.
            LostError: `begun`, and the file is missing or has another size.
        """
        self.path = path
        self.metadata = dict(metadata)
        self._offsets: dict[str, int] = {}
        at = 0
        self._entries: dict[str, object] = {}
        # Widest items first keeps every tensor aligned, as the format's own writer does.
        for name in sorted(specs, key=lambda n: (-ITEM_SIZE[specs[n].dtype], n)):
            spec = specs[name]
            self._offsets[name] = at
            offsets = [at, at + spec.nbytes]
            self._entries[name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
            at += spec.nbytes
        size = len(self._header())
        self._reserved = size + (-size) % 8
        self._start = 8 + self._reserved
        lost = LostError(f"{path}: what was written there is gone.")
        if begun and not os.path.lexists(path):
            raise lost
        if shared or begun:
            self._fd = open_file(path, os.O_RDWR | (0 if begun else os.O_CREAT), open_own)
        else:
            self._fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with ExitStack() as stack:
            stack.callback(self.abandon)
            found, final = os.fstat(self._fd).st_size, self._start + at
            if begun and found != final:
                raise lost
            if found > final:  # what is shared and was not begun here may hold anything
                self._guarded(os.ftruncate, self._fd, final)
            if sparse:
                self._guarded(os.ftruncate, self._fd, final)
            else:
                self._guarded(self._allocate, final)
            stack.pop_all()  # allocated in full: the caller closes it from here on

    def _header(self) -> bytes:
        content = {"__metadata__": self.metadata, **self._entries}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()

    def _allocate(self, size: int) -> None:
        # A full disk is found here, before the first tensor is combined.
        if not hasattr(os, "posix_fallocate"):  # macOS
            os.ftruncate(self._fd, size)
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(self._fd, size)

    def _guarded(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return call(*args, **kwargs)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: writing failed ({error.strerror}). Free some space or choose "
                "another -o."
            ) from None

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor, starting at its byte `offset`.

        Raises:
            CheckpointError: The file cannot be written.
        """
        at, done = self._start + self._offsets[name] + offset, 0
        while done < len(data):
            done += self._guarded(os.pwrite, self._fd, data[done:], at + done)

    def close(self) -> None:
        """Write the header and close the file, which is no safetensors file without this call.

        Raises:
            CheckpointError: The file cannot be written.
            ValueError: The metadata grew beyond the room that was reserved for it.
        """
        header = self._header()
        if len(header) > self._reserved:
            raise ValueError("the metadata grew beyond what was reserved for it")
        content = struct.pack("<Q", self._reserved) + header.ljust(self._reserved, b" ")
        self._guarded(os.pwrite, self._fd, content, 0)
        self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self.abandon)
            if error is None and self._fd >= 0:
                self.close()

    def sync(self) -> None:
        """Flush the file to the disk."""
        self._guarded(os.fsync, self._fd)

    def abandon(self) -> None:
        """Close the file as it is. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
