"""A pass over the bytes of a file of rows, for what readers of JSON and CSV do not survive.

A reader in C ends the process where JSON is nested deeply, and tells the place of no byte.
"""

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from mergekit_bayes.errors import CheckpointError

# Openers of compressed files, by ending.
COMPRESSED: dict[str, Any] = {  # called with the file and "rb"
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_BLOCK = 16 << 20  # bytes
_DEPTH = 100  # lists and objects inside each other; published rows have about 5
_RATIO, _FREE = 200, 1 << 30  # text shrinks 3 to 20 times; a small file may be anything
_COLUMNS = 20_000  # names in objects, or columns of a CSV; readers take the square of the number
_LINE = 64 << 20  # bytes; a long novel has 4 million
_NAME = re.compile(rb'"([^"\\]+)"\s*:')
_SIGNS = b'"[]{}'
_OTHERS = bytes(set(range(256)) - set(_SIGNS))
_STEPS = np.zeros(256, np.int64)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def check_bytes(file: Path, *, loader: str, separator: bytes = b",") -> None:
    """Refuse a file that is not UTF-8, is a bomb, or has rows that are too long, wide or deep.

    Args:
        file: A text file, which may be compressed.
        loader: Its format: `json`, `csv` or `text`.
        separator: What stands between the columns of a CSV.

    Raises:
        CheckpointError: As said, with the line, or it cannot be read.
    """
    most = max(_FREE, _RATIO * file.stat().st_size)
    decoder = codecs.getincrementaldecoder("utf-8")()
    nesting = _Nesting()
    lines, size, unfinished = 1, 0, 0
    is_by_line = ".json" not in file.suffixes  # an array may be one line
    try:
        content: IO[bytes]
        with COMPRESSED.get(file.suffix, Path.open)(file, "rb") as content:
            while block := content.read(_BLOCK):
                if not size:
                    _refuse_other_encodings(block, file)
                    _refuse_wide(block, file, loader, separator)
                size += len(block)
                if size > most:
                    raise CheckpointError(
                        f"{file}: more than {most:,} bytes when it is decompressed, {_RATIO} times "
                        "its size. Decompress it yourself if that is meant."
                    )
                _check_utf8(decoder, block, lines, file)
                unfinished = _longest_line(block, unfinished, file) if is_by_line else 0
                if loader == "json" and (before := nesting.too_deep(block)) is not None:
                    raise CheckpointError(
                        f"{file}, line {lines + before}: lists and objects are nested more than "
                        f"{_DEPTH} deep. Write such rows flat, or remove them."
                    )
                lines += block.count(b"\n")
            _check_utf8(decoder, b"", lines, file, final=True)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read ({reason}). Fetch it again.") from None


def _refuse_other_encodings(block: bytes, file: Path) -> None:
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CheckpointError(f"{file} is UTF-16. Save it as UTF-8.")
    if not any(block[:1024]):
        raise CheckpointError(
            f"{file} begins with zeros: a download or a copy that did not finish. Fetch it again."
        )


def _refuse_wide(block: bytes, file: Path, loader: str, separator: bytes) -> None:
    """Refuse more columns than readers can take; they choose the columns by the first rows."""
    names = 0
    if loader == "json" and block.count(b":") > _COLUMNS:
        names = len(set(_NAME.findall(block)))
    elif loader == "csv":
        names = block.partition(b"\n")[0].count(separator) + 1
    if names > _COLUMNS:
        raise CheckpointError(
            f"{file}: its rows have {names:,} names, expected at most {_COLUMNS:,}. Keep the "
            "columns that are needed."
        )


def _longest_line(block: bytes, unfinished: int, file: Path) -> int:
    """Refuse long lines; the bytes of the last one, which the next block goes on with."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    longest = unfinished + (int(ends[0]) if len(ends) else len(block))
    if longest > _LINE:
        raise CheckpointError(f"{file}: a line has more than {_LINE >> 20} MiB. Split such rows.")
    return len(block) - 1 - int(ends[-1]) if len(ends) else longest


def _check_utf8(
    decoder: codecs.IncrementalDecoder, block: bytes, lines: int, file: Path, *, final: bool = False
) -> None:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        # The decoder counts from what it kept of the block before, at most three bytes.
        line = lines + bytes(error.object[: error.start]).count(b"\n")
        raise CheckpointError(
            f"{file}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8. Save the "
            "file as UTF-8."
        ) from None


class _Nesting:
    """How deeply JSON is nested, block by block."""

    def __init__(self) -> None:
        self._depth = 0
        self._quotes = 0
        self._kept = b""

    def too_deep(self, block: bytes) -> int | None:
        """Number of line ends in this block before the JSON is too deep; None if it is not.

        A bracket counts outside of strings only. What is escaped is removed first: a run of
        backslashes loses its pairs, and then a quote after one is no end of a string.
        """
        data = self._kept + block
        end = len(data) - len(data.rstrip(b"\\"))
        self._kept = data[len(data) - end :]
        data = data[: len(data) - end]
        plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        signs = np.frombuffer(plain.translate(None, _OTHERS), np.uint8)
        quotes = np.cumsum(signs == ord('"')) + self._quotes
        depths = np.cumsum(np.where(quotes % 2 == 0, _STEPS[signs], 0)) + self._depth
        if not len(signs):
            return None
        self._quotes, self._depth = int(quotes[-1]) % 2, int(depths[-1])
        if depths.max() <= _DEPTH:
            return None
        number = int(np.argmax(depths > _DEPTH))
        kept = np.frombuffer(plain.translate(None, _OTHERS.replace(b"\n", b"")), np.uint8)
        ends = kept == ord("\n")
        place = np.flatnonzero(~ends)[number]
        return int(ends[:place].sum())
