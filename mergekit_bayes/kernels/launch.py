"""Start compiled passes: as machine code that an earlier process kept, or compiled by numba."""

from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache
from threading import Lock
from types import NoneType
from typing import Any, cast

import numpy as np

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels import machine_code
from mergekit_bayes.kernels.base import (
    BLOCK,
    LANES,
    Array,
    Chunk,
    Kind,
    Numbers,
    Pass,
    Reduce,
    Tally,
)
from mergekit_bayes.kernels.machine_code import Constant
from mergekit_bayes.kernels.sources import constants_of, functions_of, stamp

_KEPT = 64  # constants of a pass: those of the sets of a prediction take turns at each chunk
_making = Lock()  # two threads would compile one function twice


class Function:
    """A function that is compiled, or loaded, for each layout of arguments when it first runs.

    Args:
        name: What tells it from others; None if its code cannot be kept.
        make: Makes numba's dispatcher.
    """

    def __init__(self, name: machine_code.Name | None, make: Callable[[], Any]) -> None:
        self._name, self._make = name, make
        self._kept: dict[str, machine_code.Code | None] = {}

    def __call__(self, *arguments: Any) -> None:
        """Run it. An argument that numba cannot compile it for raises numba's error.

        What many calls share may be given as a `machine_code.Constant`.
        """
        layout: str = ""
        values: list[Any] = []
        if self._name is not None:
            with suppress(TypeError):  # of another kind: numba may know it
                layout, values = machine_code.flatten(arguments)
        if not layout:
            self._compiled()(*_bare(arguments))
            return
        if layout not in self._kept:
            with _making:
                if layout not in self._kept:
                    self._kept[layout] = self._find(layout, arguments)
        code = self._kept[layout]
        if code is not None:
            code(values)
        else:
            self._compiled()(*_bare(arguments))

    def _compiled(self) -> Any:
        with _making:
            return self._make()

    def _find(self, layout: str, arguments: tuple[Any, ...]) -> machine_code.Code | None:
        """The kept code; None where numba has compiled the function now, which keeps it."""
        assert self._name is not None
        code = machine_code.find(self._name, layout)
        if code is None:
            from numba import typeof

            kernel = self._make()
            kernel.compile(tuple(typeof(argument) for argument in _bare(arguments)))
            machine_code.keep(self._name, layout, kernel)
        return code


def fused_pass(kind: Kind) -> Pass:
    """The pass of `kind`, compiled (or loaded from the cache) when it first runs.

    For a method that cannot be compiled it then raises numba's error, before it writes anything.
    """

    constants_of_call = _Constants()

    def run(chunk: Chunk, numbers: Numbers, tally: Tally) -> None:
        counts, largest = np.zeros(4, np.int64), np.zeros(1)
        _pass_of(kind, cast(Hashable, type(numbers.facts)))(
            tuple(chunk),
            *constants_of_call(chunk, numbers),
            tally.bad_means,
            tally.bad_precisions,
            tally.stored,
            tally.distances,
            tally.products,
            counts,
            largest,
        )
        tally.entries += chunk.mean.size
        tally.bad += int(counts[0])
        tally.changed += int(counts[1])
        tally.lost += int(counts[2])
        tally.guarded += int(counts[3])
        tally.multiplier = max(tally.multiplier, float(largest[0]))

    return run


def fused_reduction(kind: Kind) -> Reduce:
    """The method's first pass, compiled (or loaded from the cache) when it first runs.

    It raises as `fused_pass` does.
    """

    constants_of_call = _Constants()
    reduction = kind.method.reduction
    assert reduction is not None
    counts = reduction.kind == "histogram"

    def run(chunk: Chunk, numbers: Numbers, totals: Array) -> None:
        scratch: Any = np.zeros((len(totals), LANES))  # the code itself takes no memory
        if counts:
            scratch = tuple(np.empty(BLOCK, np.uint32) for _ in totals)
        constants = constants_of_call(chunk, numbers)
        _reduction_of(kind)(tuple(chunk), *constants, scratch, totals)

    return run


def fused_sums(stored: Array, row: int, sums: Array) -> None:
    """`plain_sums`, compiled."""
    _sums()(stored, row, sums)


@cache
def _pass_of(kind: Kind, facts: Hashable) -> Function:
    assert isinstance(facts, type)

    def make() -> Any:
        from mergekit_bayes.kernels.fused import make_pass

        return make_pass(kind, facts)

    return Function(_name_of("pass", kind, facts), make)


@cache
def _reduction_of(kind: Kind) -> Function:
    def make() -> Any:
        from mergekit_bayes.kernels.fused import make_histogram, make_reduction

        assert kind.method.reduction is not None
        counts = kind.method.reduction.kind == "histogram"
        return make_histogram(kind) if counts else make_reduction(kind)

    return Function(_name_of("reduction", kind, NoneType), make)


@cache
def _sums() -> Function:
    def make() -> Any:
        from mergekit_bayes.kernels.fused import fused_sums

        return fused_sums

    return Function(machine_code.Name("sums", str(stamp(None))), make)


def _name_of(what: str, kind: Kind, facts: type) -> machine_code.Name | None:
    """What tells a kernel from others; None where not all that it is made from is known."""
    method = kind.method
    checksum = stamp(method, facts)
    statistic = method.reduction.statistic if method.reduction is not None else None
    roots = [f for f in (method.combine, method.unguarded_precision, statistic) if f is not None]
    functions = [function for root in roots for function in functions_of(root)]
    names = [f"{f.__module__}.{f.__qualname__}" for f in functions]
    # What a function was made with where it was made is in no source.
    if checksum is None or any("<" in name for name in names):
        return None
    flags = [str(flag) for flag in (*kind[1:], method.random)]
    parts = (what, *flags, f"{facts.__module__}.{facts.__qualname__}", *names)
    constants = [text for function in functions for text in constants_of(function)]
    return machine_code.Name(" ".join(parts), " ".join([str(checksum), *constants]))


class _Constants:
    """The arguments of a pass besides its chunk, flattened once for all chunks of a tensor.

    They are plain tuples of the numbers, a zero of the arithmetic, and a Gaussian of it per task:
    numba's cache on disk names the classes of arguments, and could not be read any more after one
    was renamed.
    """

    def __init__(self) -> None:
        # By identity: the numbers, the arithmetic and what was made of them.
        self._kept: dict[int, tuple[Numbers, np.dtype[Any], tuple[Constant, ...]]] = {}

    def __call__(self, chunk: Chunk, numbers: Numbers) -> tuple[Constant, ...]:
        """Those for a chunk."""
        kept, real = self._kept.get(id(numbers)), chunk.extras.dtype
        if kept is not None and kept[0] is numbers and kept[1] == real:
            return kept[2]
        zero = real.type(0)
        plain = tuple(numbers._replace(facts=tuple(numbers.facts or ())))
        template = tuple(Gaussian(zero, zero) for _ in numbers.scales)
        constants = tuple(Constant(value) for value in (plain, zero, template))
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        self._kept[id(numbers)] = numbers, real, constants
        return constants


def _bare(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as numba takes them."""
    return tuple(a.value if isinstance(a, Constant) else a for a in arguments)
