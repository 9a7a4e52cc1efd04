"""numba helpers. Import only after checking that numba is installed."""

import logging
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.extending import register_jitable

logger = logging.getLogger(__name__)

# `forceinline`: a call in the loop would keep it from being vectorised.
inlined = register_jitable(error_model="numpy", forceinline=True)


def compiled(**options: object) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function when it is first called.

    The result is cached on disk, as code that later processes run. Where no cache folder can be
    written, or others could have put code into it, it is compiled once per process.

    Args:
        options: Further options of `numba.njit`.
    """

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            cached = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write to
            return njit(nogil=True, **options)(function)
        folder = Path(cached.stats.cache_path)
        # Whoever can write beside the source can change the source.
        is_beside = folder.parent == Path(function.__code__.co_filename).parent
        return cached if is_beside or _is_trusted(folder) else njit(nogil=True, **options)(function)

    return compile_it


@cache
def _is_trusted(folder: Path) -> bool:
    """Whether only this account and root can have written to a cache folder.

    numba makes it in a folder that `NUMBA_CACHE_DIR` may name and that may be shared. There others
    cannot put another in its place if the shared folder is sticky, as /tmp is.
    """
    if not folder.exists():
        return False
    inner, outer = folder.stat(), folder.parent.stat()
    is_safe = (
        {inner.st_uid, outer.st_uid} <= {os.geteuid(), 0}
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
