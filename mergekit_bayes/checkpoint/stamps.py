"""Whether input files are still what they were when they were opened.

A merge reads for minutes or hours. What somebody writes into an input meanwhile would be in one
part of the output and not in the other, so that the files are looked at again before the output
gets its name. This sees what the system records of a file: its size, the time of the last write,
and which file it is. A write that leaves all of these as they were is found by hashing alone.
"""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.side_files import group_of
from mergekit_bayes.errors import CheckpointError

_COARSE = 2 * 10**9  # ns; the coarsest times that a file system keeps


class ChangedError(CheckpointError):
    """An input is not what it was when it was opened."""


class Stamp(NamedTuple):
    """What the system records of a file.

    Attributes:
        size: Bytes.
        written: Time of the last write, in nanoseconds.
        place: Device and inode; None for a file that is not kept open, because some network file
            systems number a file anew once it was closed.
    """

    size: int
    written: int
    place: tuple[int, int] | None


def stamp_of(descriptor: int) -> Stamp:
    """The stamp of a file that stays open."""
    status = os.fstat(descriptor)
    return Stamp(status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino))


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of files that are not kept open; those that cannot be opened are left out."""
    stamps = {}
    for path in paths:
        with suppress(OSError):  # reported where the file is read
            stamps[path] = _stamp(path)._replace(place=None)
    return stamps


def documents_in(folder: Path) -> list[Path]:
    """The configs of a model's folder, and what belongs to its tokenizer, chat template and so on.

    Empty for a file, and for a folder that cannot be listed.
    """
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listdir(folder))
    return [folder / n for n in names if n.endswith("config.json") or group_of(Path(n)) is not None]


def refuse_changed(stamps: Mapping[Path, Stamp]) -> None:
    """Check that files are what they were when they were stamped.

    Raises:
        ChangedError: A file was written to or replaced.
        CheckpointError: A file is gone or cannot be reached, which is no sign of a change.
    """
    for path, before in stamps.items():
        try:
            now = _stamp(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be opened any more ({error.strerror}), so that nothing shows "
                "whether it was changed while it was in use. Bring it back, then run the same "
                "command again."
            ) from None
        if before.place is not None and now.place != before.place:
            raise changed_error(path, "another file has its name now")
        if now.size != before.size:
            raise changed_error(path, f"it had {before.size:,} bytes, and has {now.size:,}")
        if now.written != before.written:
            raise changed_error(path, f"it was written to, last at {_clock(now.written)}")


def changed_error(path: Path | str, change: str) -> ChangedError:
    """The error for an input that was changed while a command was reading it."""
    return ChangedError(
        f"{path}: was changed while it was in use ({change}). Old and new content would be mixed, "
        "so that nothing made of it is kept. Wait until it is written, then run the same command "
        "again."
    )


def to_json(stamps: Mapping[Path, Stamp]) -> dict[str, list[int]]:
    """Stamps as JSON, to be compared by a later process: size, time and inode by path."""
    return {
        _key(path): [stamp.size, stamp.written, *(stamp.place or ())[1:]]
        for path, stamp in stamps.items()
    }


def changed_since(
    recorded: object, stamps: Mapping[Path, Stamp], *, same_machine: bool
) -> list[Path]:
    """The files that were written after an earlier process had recorded their stamps.

    On another machine a file may be a copy, whose time says nothing; there it is taken for the same
    file if it has the same inode, as on a network disk.

    Args:
        recorded: What `to_json` made; all else counts as no record.
        stamps: The stamps of now.
        same_machine: Whether the earlier process was on this machine.
    """
    if not isinstance(recorded, dict):
        return []
    changed = []
    for path, now in stamps.items():
        match recorded.get(_key(path)):
            case [int(size), int(written), *_] if same_machine:
                is_changed = (size, written) != now[:2]
            case [int(size), int(written), int(inode)] if now.place and inode == now.place[1]:
                is_changed = size != now.size or abs(written - now.written) > _COARSE
            case _:
                is_changed = False
        if is_changed:
            changed.append(path)
    return changed


def _key(path: Path) -> str:
    """A path as text that can be encoded, whatever bytes its name has."""
    return str(path).encode(errors="backslashreplace").decode()


def _stamp(path: Path) -> Stamp:
    # Opened rather than asked for by name: a network disk then asks its server, not its cache.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return stamp_of(descriptor)
    finally:
        os.close(descriptor)


def _clock(nanoseconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds // 10**9))
    except (OverflowError, ValueError, OSError):  # a time that no clock shows
        return f"{nanoseconds} ns"
