"""How a method's own functions get into a compiled loop."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, NoneType
from typing import Any

from mergekit_bayes.compiled import inlined
from mergekit_bayes.gaussian import constant, rebase, select
from mergekit_bayes.kernels import base
from mergekit_bayes.kernels.sources import functions_of

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
    for used in functions_of(function):
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
