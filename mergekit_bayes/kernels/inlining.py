"""How a method's own functions get into a compiled loop."""

import ast
import inspect
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from types import FunctionType, NoneType
from typing import Any

from mergekit_bayes import draws, gaussian
from mergekit_bayes.compiled import inlined
from mergekit_bayes.gaussian import constant, rebase, select
from mergekit_bayes.kernels import base, bits, increase
from mergekit_bayes.methods.base import Method

_inlined: set[object] = {select, constant}  # what numba knows already

for _function in (
    rebase,
    base.likelihood_precision,
    base.own_posterior,
    base.task_posterior,
    base.anchored_task_posterior,
    base.removal_multiplier,
):
    inlined(_function)
    _inlined.add(_function)


def inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which numba now inlines with every plain function that it uses.

    Raises:
        TypeError: One of them holds a float that is not inside a call of `constant`.
    """
    for used in _functions(function):
        if used not in _inlined:
            _refuse_bare_floats(used)
            inlined(used)
            _inlined.add(used)
    return function


def facts_maker(facts: type) -> Callable[..., Any]:
    """The callable that makes a method's facts from their values, for numba.

    Args:
        facts: The method's NamedTuple, or the type of None.
    """
    return inline(no_facts) if facts is NoneType else facts


def no_facts() -> None:
    """The facts of a method that has none."""


def stamp(method: Method, facts: type = NoneType) -> int:
    """Checksum of every source that is compiled into a method's kernels.

    numba's cache on disk compares only the file that holds the kernel; in the kernel's closure,
    this number makes it compare the others.

    Args:
        method: The rule.
        facts: The method's NamedTuple, if the kernel makes one.
    """
    reduction = method.reduction.statistic if method.reduction is not None else None
    roots = (method.combine, method.unguarded_precision, reduction)
    modules = {f.__module__ for root in roots if root is not None for f in _functions(root)}
    modules |= {facts.__module__, *(m.__name__ for m in (base, bits, draws, gaussian, increase))}
    return zlib.crc32("".join(_source(name) for name in sorted(modules)).encode())


def _refuse_bare_floats(function: FunctionType) -> None:
    """Refuse a float that would be float64 in a comparison, where no result's type shows it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source, or a lambda in the middle of a line
        return
    allowed = {
        id(inner)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "constant"
        for inner in ast.walk(call)
    }
    for node in ast.walk(tree):
        value: object = None
        if isinstance(node, ast.Constant):
            value = node.value
        elif isinstance(node, ast.Name):
            value = function.__globals__.get(node.id)
        if isinstance(value, float) and id(node) not in allowed:
            raise TypeError(f"a bare {value} in {function.__name__}")


def _functions(function: Callable[..., Any]) -> Iterator[FunctionType]:
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


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # built in, or typed at a prompt: no source to compare
        return ""
