"""Functions compiled by numba, for those who have found it installed."""

from typing import Any

from numba import njit
from numba.extending import register_jitable

# `forceinline`: a call in the loop would keep it from being vectorised.
inlined = register_jitable(error_model="numpy", forceinline=True)


def compiled(**options: Any) -> Any:
    """A compiled function that is kept on disk, or where there is no place to keep it, compiled anew each time."""

    def compile_it(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write to
            return njit(nogil=True, **options)(function)

    return compile_it
