"""Regular files, read up to a number of bytes, and their text."""

import errno
import io
import os
import stat
from pathlib import Path

SIDE_FILE = 128 << 20  # bytes; the largest published tokenizers have about 35 MB
CONFIG = 16 << 20  # bytes; the largest tokenizer_config.json have about 1 MB
SETTINGS = 1 << 20  # bytes of YAML; the front matter of the largest cards has about 300 KB


class DocumentError(ValueError):
    """A document cannot be read; the text is the reason, as it fits into parentheses."""


def open_regular(file: Path) -> io.BufferedReader:
    """Open a regular file to read it.

    A pipe under `/dev`, as a shell's `<(...)` makes it, is opened as well; no other pipe is waited
    for.

    Raises:
        OSError: The file cannot be opened.
        DocumentError: It is no regular file.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        is_shell_pipe = stat.S_ISFIFO(mode) and str(file).startswith("/dev/")
        if not stat.S_ISREG(mode) and not is_shell_pipe:
            raise DocumentError("not a regular file")
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(file: Path, limit: int = SIDE_FILE) -> bytes:
    """The bytes of a file that `open_regular` opens.

    Args:
        file: The file.
        limit: The most bytes that are read.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: It is no regular file, or is larger than `limit`.
    """
    with open_regular(file) as content:
        size = os.fstat(content.fileno()).st_size
        data = content.read(size + 1) if size <= limit else b""
        if len(data) > size:  # it grows, or is a pipe or one of the kernel's, which say 0
            data += content.read(max(0, limit + 1 - len(data)))
        if (found := max(len(data), size)) > limit:
            raise DocumentError(f"{found:,} bytes, where at most {limit:,} are read")
        return data


def read_text(file: Path, limit: int = SIDE_FILE) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: As `read_bytes`, or the file is not UTF-8.
    """
    return decode_text(read_bytes(file, limit))


def decode_text(data: bytes) -> str:
    """Bytes as UTF-8 text.

    Raises:
        DocumentError: They are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DocumentError("not UTF-8 but UTF-16") from None
        raise DocumentError(f"not UTF-8 from byte {error.start} on") from None
