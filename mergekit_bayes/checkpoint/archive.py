"""Read the archive that `torch.save` writes: a zip file whose members are stored as they are.

A zip file says everything twice, and readers differ in what they believe. Here both sayings must
agree: a member's size, name and method in the directory and before its bytes, and the directory's
own place and size. Members lie apart from each other and are not compressed. What is read is then
what any other reader finds, and no member is larger than the file.
"""

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.foreign import HEAD, explain_stand_in
from mergekit_bayes.checkpoint.safetensors import open_file
from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.errors import CheckpointError, shown

SAVE_AGAIN = (
    "Save it again with `torch.save(model.state_dict(), ...)`, or ask its author for safetensors."
)
MOST_MEMBERS = 200_000  # one for each tensor
_CHUNK = 4 << 20
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR = b"PK\x06\x06", b"PK\x06\x07"
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11  # the flags that torch.save sets
_IS_FOLDER = 1 << 4  # among the attributes of a file
_SATURATED = 0xFFFFFFFF  # in place of a number that a field of 64 bits holds


class Member(NamedTuple):
    """A stored file of the archive.

    Attributes:
        start: Its first byte in the archive.
        size: Its number of bytes.
        crc: Their CRC-32; 0 where it was not computed, which `torch.save` can be told.
    """

    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """A member as the directory describes it."""

    name: bytes
    header: int
    size: int
    crc: int
    flags: int


class Archive(Closing):
    """A file of `torch.save`, open for reading.

    Attributes:
        path: The file.
        size: Its number of bytes.
        members: The members by name, without the folder that holds them all.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check its directory.

        Raises:
            CheckpointError: It cannot be opened, or is not such an archive.
        """
        self.path = path
        # Without O_NONBLOCK a pipe would be waited for; with it, the check of its mode refuses it.
        self._fd = open_file(path, os.O_RDONLY | os.O_NONBLOCK)
        with ExitStack() as stack:
            stack.callback(self.close)
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a file.")
            self.size = status.st_size
            try:
                self.members = self._read_members()
            except struct.error:
                raise self._broken("its directory is cut") from None
            stack.pop_all()  # opened in full: the caller closes it from here on

    def read(self, start: int, size: int) -> bytes:
        """Some of the archive's bytes.

        Raises:
            CheckpointError: The file cannot be read, or ends before.
        """
        pieces = []
        while size > 0:
            try:
                pieces.append(os.pread(self._fd, size, start))
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading failed ({error.strerror}).") from None
            if not pieces[-1]:
                raise CheckpointError(
                    f"{self.path}: ended while it was being read; it was changed or truncated."
                )
            start, size = start + len(pieces[-1]), size - len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self, start: int, size: int) -> Iterator[bytes]:
        """The same bytes, a few MB at a time.

        Raises:
            CheckpointError: As `read`.
        """
        for done in range(0, size, _CHUNK):
            yield self.read(start + done, min(_CHUNK, size - done))

    def check(self, name: str) -> None:
        """Compare a member's bytes with their CRC-32.

        Raises:
            CheckpointError: They differ, or the file cannot be read.
        """
        member, crc = self.members[name], 0
        if member.crc == 0:
            return
        for chunk in self.chunks(member.start, member.size):
            crc = zlib.crc32(chunk, crc)
        if crc != member.crc:
            raise CheckpointError(
                f"{self.path}: the bytes of its member {shown(name)} are not those that were "
                f"saved (CRC-32 {crc:08x}, expected {member.crc:08x}). Fetch it again."
            )

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _broken(self, symptom: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: is not an archive as torch.save writes it ({symptom}). Fetch it again. "
            f"{SAVE_AGAIN}"
        )

    def _read_members(self) -> dict[str, Member]:
        head = self.read(0, min(HEAD, self.size))
        if not head.startswith(_LOCAL):
            if reason := explain_stand_in(head):
                raise CheckpointError(f"{self.path}: {reason}")
            raise CheckpointError(
                f"{self.path}: is not a file of torch.save since PyTorch 1.6, or was cut. Fetch it "
                f"again. {SAVE_AGAIN}"
            )
        count, start, size = self._find_directory()
        directory = self.read(start, size)
        if b"/constants.pkl" in directory:
            raise CheckpointError(f"{self.path}: is a program of TorchScript, not tensors by name.")
        members: dict[str, Member] = {}
        roots, folded, spans = set[str](), set[str](), list[tuple[int, int]]()
        for entry in _entries(directory, count, self._broken):
            begin = self._begin(entry)
            try:
                root, slash, name = entry.name.decode().partition("/")
            except UnicodeDecodeError:
                raise self._broken("a name in it is not UTF-8") from None
            roots.add(root)
            if not slash or not root or len(roots) > 1:
                raise self._broken(f"{shown(root)} is not within its folder")
            if name.casefold() in folded:
                raise self._broken(f"it holds {shown(name)} twice")
            folded.add(name.casefold())
            members[name] = Member(begin, entry.size, entry.crc)
            spans.append((entry.header, begin + entry.size))
        end = 0
        for first, stop in sorted(spans):
            if first < end or (end == 0 and first != 0):
                raise self._broken("its members overlap, or do not begin at byte 0")
            end = stop
        if end > start:
            raise self._broken("a member reaches into the directory")
        return members

    def _find_directory(self) -> tuple[int, int, int]:
        """Number of entries, first byte and size of the directory, which must end the archive."""
        end = self.size - 22
        tail = self.read(max(0, end), min(22, self.size))
        if not tail.startswith(_END):
            raise self._broken("its directory is not at its end: it was cut, or has more behind it")
        disk, on, here, count, size, start, comment = struct.unpack("<4x4HLLH", tail)
        if (disk, on, here, comment) != (0, 0, count, 0):
            raise self._broken("it has several parts or a comment")
        if end >= 76 and self.read(end - 20, 4) == _LOCATOR:
            disk, place, disks = struct.unpack("<4xLQL", self.read(end - 20, 20))
            end -= 76
            if (disk, place, disks) != (0, end, 1) or self.read(end, 4) != _END64:
                raise self._broken("its end is not where it says")
            length, _, _, *rest = struct.unpack("<4xQHHLLQQQQ", self.read(end, 56))
            if length != 44 or rest[:2] != [0, 0] or rest[2] != rest[3]:
                raise self._broken("its end is not as it should be")
            for old, new, most in zip(
                (count, size, start), rest[3:], (0xFFFF, _SATURATED, _SATURATED), strict=True
            ):
                if old not in (new, most):
                    raise self._broken("it names two directories")
            count, size, start = rest[3:]
        if start + size != end:
            raise self._broken("its directory is not at its end")
        if count > MOST_MEMBERS or size > MOST_MEMBERS * 250:
            raise self._broken(f"{count:,} members, where at most {MOST_MEMBERS:,} are read")
        return count, start, size

    def _begin(self, entry: _Entry) -> int:
        """The first byte of a member, whose own header must say what the directory says."""
        if entry.header + 30 + len(entry.name) > self.size:
            raise self._broken("a member lies behind its end")
        header = self.read(entry.header, 30 + len(entry.name))
        signature, _, flags, method, _, _, packed, size, n, extra = struct.unpack(
            "<4sHHHLLLLHH", header[:30]
        )
        if (signature, flags, method, header[30:], n) != (
            _LOCAL,
            entry.flags,
            0,
            entry.name,
            len(entry.name),
        ):
            raise self._broken("a member's header differs from the directory")
        # A writer that learns the size while it writes leaves 0 here, and repeats it behind.
        allowed = (entry.size, _SATURATED, 0 if flags & _DESCRIPTOR else entry.size)
        if packed not in allowed or size not in allowed:
            raise self._broken("a member's header gives another size than the directory")
        begin: int = entry.header + 30 + n + extra
        if size == _SATURATED and entry.size != _SATURATED:
            fields = self.read(entry.header + 30 + n, min(extra, self.size - begin + extra))
            if _wide(fields, 2) not in ([entry.size, entry.size], [0, 0]):
                raise self._broken("a member's header gives another size than the directory")
        if begin + entry.size > self.size:
            raise self._broken("a member lies behind its end")
        return begin


def _entries(
    directory: bytes, count: int, broken: Callable[[str], CheckpointError]
) -> Iterator[_Entry]:
    """The entries of the directory, which must fill it."""
    at = 0
    for _ in range(count):
        signature, flags, method, crc, packed, size, n, extra, comment, disk, attributes, header = (
            struct.unpack_from("<4s4xHH4xLLLHHHH2xLL", directory, at)
        )
        begin, at = at + 46, at + 46 + n + extra + comment
        if signature != _CENTRAL or at > len(directory):
            raise broken("its directory is cut")
        wide = [value == _SATURATED for value in (size, packed, header)]
        if any(wide):
            values = iter(_wide(directory[begin + n : begin + n + extra], sum(wide)))
            size, packed, header = (
                next(values, -1) if is_wide else value
                for is_wide, value in zip(wide, (size, packed, header), strict=True)
            )
        if method != 0 or size != packed:
            raise broken("a member is compressed; torch.save stores them as they are")
        if flags & ~(_DESCRIPTOR | _UTF8) or disk != 0 or min(size, header) < 0:
            raise broken("a member is encrypted, patched or in another part")
        name = directory[begin : begin + n]
        # PyTorch's reader leaves the memory of such a member as it finds it.
        if size and (attributes & _IS_FOLDER or name.endswith(b"/")):
            raise broken("a member is marked as a folder")
        yield _Entry(name, header, size, crc, flags)
    if at != len(directory):
        raise broken("its directory has more entries than it says")


def _wide(extra: bytes, count: int) -> list[int]:
    """The first numbers of the field of 64-bit numbers; fewer where it has fewer."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + size]
            count = min(count, len(field) // 8)
            return list(struct.unpack_from(f"<{count}Q", field))
        at += 4 + size
    return []
