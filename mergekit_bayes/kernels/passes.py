"""Choose the compiled pass or numpy's, which gives the same bits."""

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

from mergekit_bayes.kernels.base import (
    Array,
    Chunk,
    Kind,
    Numbers,
    Pass,
    Reduce,
)
from mergekit_bayes.kernels.launch import fused_pass, fused_reduction, fused_sums
from mergekit_bayes.kernels.plain import plain_pass, plain_reduction, plain_sums
from mergekit_bayes.methods.base import RULE, Method

MOST_MODELS = 24  # The compiled loop is unrolled over models; with more of them numpy is faster.

_uncompilable: set[Method] = set()  # methods that were warned about

T = TypeVar("T")


def can_fuse(models: int) -> bool:
    """Whether the compiled pass is available and faster for this number of models."""
    return models <= MOST_MODELS and find_spec("numba") is not None


def elementwise(kind: Kind, *, fused: bool) -> Pass:
    """The pass that combines a chunk.

    Args:
        kind: Which pass.
        fused: Use the compiled pass, which warns once about a method that numba cannot compile and
            then runs in numpy.
    """
    if not fused:
        return plain_pass(kind)
    return _or_plain(kind, fused_pass, plain_pass)


def first_pass(kind: Kind, *, fused: bool) -> Reduce:
    """The pass that adds up what the method must know beforehand; arguments as `elementwise`."""
    if not fused:
        return plain_reduction(kind)
    return _or_plain(kind, fused_reduction, plain_reduction)


def row_sums(stored: Array, row: int, sums: Array, *, fused: bool) -> None:
    """Sums of consecutive rows of stored precisions, in float64 and a fixed order.

    Args:
        stored: (rows * row,), as in a `Chunk`.
        row: Entries of a row.
        sums: (rows,), where the result goes.
        fused: Use the compiled pass.
    """
    if not fused:
        plain_sums(stored, row, sums)
        return
    fused_sums(stored, row, sums)


def _or_plain(
    kind: Kind,
    fused: Callable[[Kind], Callable[[Chunk, Numbers, T], None]],
    plain: Callable[[Kind], Callable[[Chunk, Numbers, T], None]],
) -> Callable[[Chunk, Numbers, T], None]:
    """The compiled pass; numpy's, with the same bits, for a method that numba cannot compile."""
    if kind.method in _uncompilable:
        return plain(kind)
    act = fused(kind)

    def run(chunk: Chunk, numbers: Numbers, into: T) -> None:
        nonlocal act
        try:
            act(chunk, numbers, into)
        except Exception as error:  # numba's, of many classes, before anything was written
            _warn(kind.method, str(error) or type(error).__name__)
            act = plain(kind)
            act(chunk, numbers, into)

    return run


def _warn(method: Method, error: str) -> None:
    if method in _uncompilable:
        return  # by another thread
    _uncompilable.add(method)
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", error).splitlines()]
    reasons = ("Cannot unify", "Result widened", "Use of unsupported", "No implementation")
    reason = next((r for start in reasons for r in lines if start in r), lines[0])
    warnings.warn(
        f"method '{method.name}' cannot be compiled and runs in numpy, more slowly "
        f"({reason[:200]}). {RULE}",
        RuntimeWarning,
        stacklevel=3,
    )
