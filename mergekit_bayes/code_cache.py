"""Where compiled code is kept on disk, and whether nobody else can have put code there."""

import logging
import os
import stat
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)


def code_folder(source: Path) -> Path | None:
    """The folder in which code that is compiled from a source file is kept; None without one.

    It is a folder in the one that `NUMBA_CACHE_DIR` names, the `__pycache__` beside the source, or,
    where that cannot be written, one in the user's cache folder.

    Args:
        source: The file. Whoever can write beside it can change it, too.
    """
    named = os.environ.get("NUMBA_CACHE_DIR")
    # An account without a home, as in containers, has a relative one here: "~/.cache".
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    beside = [source.parent / "__pycache__", *([home] if home.is_absolute() else [])]
    for place in [Path(named)] if named else beside:
        folder = place if place.name == "__pycache__" else place / "bmerge"
        try:
            folder.mkdir(0o755, parents=True, exist_ok=True)
        except OSError:
            continue
        if not os.access(folder, os.W_OK):
            continue
        return folder if folder.parent == source.parent or is_trusted(folder) else None
    return None


@cache
def is_trusted(folder: Path) -> bool:
    """Whether only this account and root can have written to a cache folder.

    It may be in a folder that `NUMBA_CACHE_DIR` names and that is shared. There others cannot put
    another in its place if the shared folder is sticky, as /tmp is. A link of theirs is not
    followed: it leads elsewhere later.
    """
    if not folder.exists():
        return False
    inner, outer = folder.stat(), folder.parent.stat()
    owners = {path.lstat().st_uid for path in (folder, folder.parent)}
    is_safe = (
        {inner.st_uid, outer.st_uid, *owners} <= {os.geteuid(), 0}
        and not inner.st_mode & stat.S_IWOTH
        and (not outer.st_mode & stat.S_IWOTH or bool(outer.st_mode & stat.S_ISVTX))
    )
    if not is_safe:
        logger.warning(
            "'%s' can be written by other accounts, so compiled code is not cached there. "
            "NUMBA_CACHE_DIR names another folder.",
            folder,
        )
    return is_safe
