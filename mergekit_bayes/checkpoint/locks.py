"""Locks on files, which the system releases when a process ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mergekit_bayes.checkpoint.own_files import open_own

MOMENT = 3.0  # seconds that a process waits for others to begin, look or leave


def open_lock(path: Path, flags: int = 0) -> int:
    """A descriptor of a file that is to be locked, in a folder of this account.

    Args:
        path: The file.
        flags: More flags of `os.open`.

    Raises:
        CheckpointError: It is a link, or belongs to another account.
    """
    return open_own(path, os.O_RDWR | flags)


def try_lock(file: int, *, shared: bool = False) -> bool:
    """Lock a file, or change its lock, without waiting; False if another process is in the way."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def attempts() -> Iterator[None]:
    """Yield at once, and again every 10 ms until a moment has passed."""
    end = time.monotonic() + MOMENT
    yield
    while time.monotonic() <= end:
        time.sleep(0.01)
        yield
