"""Merging rules, one file each, listed in one table.

Each is elementwise, so a slice of a merge is the merge of slices: this permits streaming.
"""

import difflib
import math
from collections.abc import Mapping

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods.average import AVERAGE
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.dare_linear import DARE_LINEAR
from mergekit_bayes.methods.dare_ties import DARE_TIES
from mergekit_bayes.methods.fisher import FISHER
from mergekit_bayes.methods.gradient_matching import GRADIENT_MATCHING
from mergekit_bayes.methods.precision_average import PRECISION_AVERAGE
from mergekit_bayes.methods.slerp import SLERP
from mergekit_bayes.methods.task_arithmetic import TASK_ARITHMETIC
from mergekit_bayes.methods.ties import TIES

TABLE = (AVERAGE, PRECISION_AVERAGE, TASK_ARITHMETIC, GRADIENT_MATCHING)  # chosen by --weights and --base
METHODS = {m.name: m for m in (*TABLE, FISHER, TIES, DARE_LINEAR, DARE_TIES, SLERP)}

__all__ = ["METHODS", "TABLE", "Method", "choose", "settings_of"]


def choose(*, with_base: bool, by_precision: bool) -> Method:
    """The method that two questions decide: is there a base, and do precisions weigh?"""
    for method in TABLE:
        if method.needs_base == with_base and method.needs_precision == by_precision:
            return method
    raise AssertionError("the table has a method for each of the four answers")


def settings_of(method: Method, given: Mapping[str, float | str]) -> dict[str, float | str]:
    """The method's settings: its defaults with what is given, checked.

    Raises `ConfigError` for an unknown name, a value out of bounds, or a word that is no choice.
    """
    known = {p.name: p for p in method.parameters}
    result = {name: p.default for name, p in known.items()}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else f" It has {', '.join(known) or 'none'}."
            raise ConfigError(f"--param {name}: {method.name} has no such setting.{hint}")
        result[name] = _checked(known[name], value)
    return result


def _checked(parameter: Parameter, value: float | str) -> float | str:
    if parameter.choices:
        if value not in parameter.choices:
            raise ConfigError(f"--param {parameter.name}={value}: expected {' or '.join(parameter.choices)}.")
        return value
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    whole = isinstance(parameter.default, int)
    if not (math.isfinite(number) and parameter.low <= number <= parameter.high) or (whole and number % 1):
        bounds = f" from {parameter.low:.16g}" if math.isfinite(parameter.low) else ""
        bounds += f" to {parameter.high:.16g}" if math.isfinite(parameter.high) else ""
        raise ConfigError(f"--param {parameter.name}={value}: expected a {'whole ' if whole else ''}number{bounds}.")
    return number
