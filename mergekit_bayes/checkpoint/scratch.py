"""Folders for what is not complete, which the next run removes if a process was killed.

A process holds a lock on its folder, which the system releases when it ends, however it ends. The
next process that makes such a folder in the same place removes those that nobody holds.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from mergekit_bayes.checkpoint.specs import Closing

_LOCK, _NEW, _OLD = "lock", "new", "old"
_RANDOM = 8  # characters that `tempfile.mkdtemp` adds to a name


class Scratch(Closing):
    """A folder that only this account can enter, and that is removed at the end.

    Attributes:
        new: The folder in it to write to.
        old: Where `replacing` keeps what it replaces, until the new one is in place.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        """Make the folder, after those that killed processes have left are removed.

        Args:
            parent: Where it is made.
            prefix: What its name begins with; only folders of this name are taken for left over.

        Raises:
            OSError: It cannot be made.
        """
        remove_left_over(parent, prefix)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # Until it is locked, another process may take it for left over and remove it.
            with suppress(FileNotFoundError), ExitStack() as stack:
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                stack.callback(os.close, lock)
                with suppress(OSError):  # of a disk without locks; then nothing there is left over
                    fcntl.flock(lock, fcntl.LOCK_EX)
                self.new, self.old = folder / _NEW, folder / _OLD
                self.new.mkdir()
                self._folder, self._lock = folder, lock
                stack.pop_all()  # made in full: `close` or `keep` ends it
                return

    def close(self) -> None:
        """Remove the folder, except for what another process has kept from being put back."""
        if self._lock >= 0:
            try:
                if _put_back(self._folder):
                    shutil.rmtree(self._folder, ignore_errors=True)
            finally:
                self._unlock()

    def keep(self) -> None:
        """Leave the folder to the user: no process will take it for left over."""
        if self._lock >= 0:
            (self._folder / _LOCK).unlink()
            self._unlock()

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1


def remove_left_over(parent: Path, prefix: str) -> None:
    """Remove the folders of this name whose processes have ended."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(parent)
    for name in names:
        if name.startswith(prefix) and len(name) == len(prefix) + _RANDOM:
            # Whatever is in the way, above all a lock that is held, the folder is left alone.
            with suppress(OSError), ExitStack() as stack:
                _remove_unless_held(parent / name, stack)


def _remove_unless_held(folder: Path, stack: ExitStack) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, descriptor)
    names = set(os.listdir(descriptor))
    if os.fstat(descriptor).st_uid != os.geteuid() or not names <= {_LOCK, _NEW, _OLD}:
        return
    if not names:
        os.rmdir(folder)
        return
    lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    stack.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if _put_back(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _put_back(folder: Path) -> bool:
    """Undo a replacement that was stopped halfway; False if its place has been taken meanwhile."""
    new, old = folder / _NEW, folder / _OLD
    if not os.path.lexists(old):
        return True
    for name in os.listdir(new):  # the new one is still here, so it is not in place
        target = folder.parent / name
        if os.path.lexists(target):
            return False
        os.rename(old, target)
    return True
