"""numba helpers. Import only after checking that numba is installed."""

from collections.abc import Callable
from typing import Any

from numba import njit
from numba.extending import register_jitable

# `forceinline`: a call in the loop would keep it from being vectorised.
inlined = register_jitable(error_model="numpy", forceinline=True)


def compiled(**options: object) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function when it is first called.

    The result is cached on disk; where no cache folder can be written, it is compiled once
    per process.

    Args:
        options: Further options of `numba.njit`.
    """

    def compile_it(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write to
            return njit(nogil=True, **options)(function)

    return compile_it
