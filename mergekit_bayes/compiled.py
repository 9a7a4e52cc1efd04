"""numba helpers. Import only after checking that numba is installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.extending import register_jitable

from mergekit_bayes.code_cache import is_trusted

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
        return cached if is_beside or is_trusted(folder) else njit(nogil=True, **options)(function)

    return compile_it
