"""The sources that are compiled into a method's kernels."""

import sys
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

import numpy as np

from mergekit_bayes.documents import DocumentError, read_bytes
from mergekit_bayes.gaussian import constant, select
from mergekit_bayes.methods.base import Method

_PACKAGE = __name__.partition(".")[0]
_SHARED = (
    f"{_PACKAGE}.compiled",
    f"{_PACKAGE}.draws",
    f"{_PACKAGE}.gaussian",
    f"{_PACKAGE}.methods.histogram",
    *(f"{_PACKAGE}.kernels.{name}" for name in ("base", "bits", "fused", "increase", "inlining")),
)


def stamp(method: Method | None, facts: type = NoneType) -> int | None:
    """Checksum of every source that is compiled into a method's kernels.

    A cache on disk that compares only the file that holds the kernel compares the others by it.

    Args:
        method: The rule; None for what is compiled without one.
        facts: The method's NamedTuple, if the kernel makes one.

    Returns:
        The checksum; None where the method was typed at a prompt, and has no source to compare.
    """
    names = set(_SHARED)
    if method is not None:
        reduction = method.reduction.statistic if method.reduction is not None else None
        roots = (method.combine, method.unguarded_precision, reduction)
        names |= {f.__module__ for root in roots if root is not None for f in functions_of(root)}
        names |= {facts.__module__} - {"builtins"}
    sources = [_source(name) for name in sorted(names)]
    if any(source is None for source in sources):
        return None
    return zlib.crc32(b"".join(source for source in sources if source is not None))


def functions_of(function: Callable[..., Any]) -> Iterator[FunctionType]:
    """A function and the plain functions among its globals, theirs, and so on."""
    seen: set[object] = {select, constant}
    waiting: list[object] = [function]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, FunctionType) or current in seen:
            continue
        seen.add(current)
        yield current
        waiting += [current.__globals__.get(name) for name in current.__code__.co_names]


def constants_of(function: FunctionType) -> Iterator[str]:
    """The numbers and texts among a function's globals, which may come from any module."""
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, int | float | str | np.generic):
            yield f"{name}={value!r}"


def _source(module: str) -> bytes | None:
    """The bytes of a module's file, whether it is loaded or not."""
    try:
        if module in sys.modules:
            file = sys.modules[module].__file__
        else:
            spec = find_spec(module)
            file = None if spec is None else spec.origin
        return None if file is None else read_bytes(Path(file))
    except (OSError, DocumentError, AttributeError, ValueError, ImportError):
        return None
