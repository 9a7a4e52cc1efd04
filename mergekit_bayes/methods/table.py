"""The table of merging rules, how one is chosen, and how its settings are checked."""

import math
from collections.abc import Mapping, Sequence

from mergekit_bayes.errors import ConfigError, nearest
from mergekit_bayes.methods.ace import ACE
from mergekit_bayes.methods.arcee_fusion import ARCEE_FUSION
from mergekit_bayes.methods.average import AVERAGE
from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.breadcrumbs import BREADCRUMBS
from mergekit_bayes.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from mergekit_bayes.methods.consensus import CONSENSUS
from mergekit_bayes.methods.dare_linear import DARE_LINEAR
from mergekit_bayes.methods.dare_ties import DARE_TIES
from mergekit_bayes.methods.della import DELLA
from mergekit_bayes.methods.della_linear import DELLA_LINEAR
from mergekit_bayes.methods.fisher import FISHER
from mergekit_bayes.methods.fisher_negation import FISHER_NEGATION
from mergekit_bayes.methods.gradient_matching import GRADIENT_MATCHING
from mergekit_bayes.methods.iso_c import ISO_C
from mergekit_bayes.methods.karcher import KARCHER
from mergekit_bayes.methods.model_stock import MODEL_STOCK
from mergekit_bayes.methods.multislerp import MULTISLERP
from mergekit_bayes.methods.nearswap import NEARSWAP
from mergekit_bayes.methods.nuslerp import NUSLERP
from mergekit_bayes.methods.precision_average import PRECISION_AVERAGE
from mergekit_bayes.methods.regmean import REGMEAN
from mergekit_bayes.methods.sce import SCE
from mergekit_bayes.methods.slerp import SLERP
from mergekit_bayes.methods.task_arithmetic import TASK_ARITHMETIC
from mergekit_bayes.methods.ties import TIES
from mergekit_bayes.methods.tsv_m import TSV_M

# The methods that --weights and --base choose among.
TABLE = (AVERAGE, PRECISION_AVERAGE, TASK_ARITHMETIC, GRADIENT_MATCHING)
_BY_NAME = (
    FISHER,
    FISHER_NEGATION,
    TIES,
    CONSENSUS,
    DARE_LINEAR,
    DARE_TIES,
    DELLA,
    DELLA_LINEAR,
    BREADCRUMBS,
    BREADCRUMBS_TIES,
    SCE,
    ARCEE_FUSION,
    SLERP,
    TSV_M,
    ISO_C,
    REGMEAN,
    ACE,
    KARCHER,
    NUSLERP,
    MULTISLERP,
    MODEL_STOCK,
    NEARSWAP,
)
METHODS = {m.name: m for m in (*TABLE, *_BY_NAME)}
# What other tools and papers call the sum or the average of models with equal weights.
_OF_OTHER_TOOLS = ("linear", "mean", "model_soup", "soup", "uniform", "weighted_average")


def choose(*, with_base: bool, by_precision: bool) -> Method:
    """The method that two questions decide.

    Args:
        with_base: Whether there is a base.
        by_precision: Whether precisions weigh.
    """
    for method in TABLE:
        if method.needs_base == with_base and method.needs_precision == by_precision:
            return method
    raise AssertionError("the table has a method for each of the four answers")


def method_named(name: str, *, with_base: bool) -> Method:
    """The method of a name.

    Args:
        name: As the user wrote it.
        with_base: Whether there is a base, which decides what is proposed for another tool's name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _OF_OTHER_TOOLS:
        near: str | None = choose(with_base=with_base, by_precision=False).name
    else:
        near = nearest(name, METHODS)
    hint = f" Did you mean '{near}'?" if near else ""
    raise ConfigError(f"--method {name}: no such method.{hint} `bmerge methods` lists them.")


def check_fit(
    method: Method, count: int, scales: Sequence[float | str], what: str = "model"
) -> None:
    """Refuse a number of models that a method does not take, and scales if it takes none.

    Args:
        method: The method.
        count: How many models are merged, without a base.
        scales: Their scales, as given.
        what: What messages call one of them.

    Raises:
        ConfigError: There are too few or too many, or a scale other than 1.
    """
    if method.tasks is not None and count != method.tasks:
        models = f"1 {what}" if method.tasks == 1 else f"{method.tasks} {what}s"
        raise ConfigError(f"--method {method.name} merges {models}, not {count}.")
    if count < method.fewest:
        raise ConfigError(
            f"--method {method.name} merges at least {method.fewest} {what}s, not {count}."
        )
    if not method.takes_scales and any(s != 1.0 for s in scales):
        raise ConfigError(
            f"--method {method.name} takes no --scale; its settings are --param (`bmerge methods`)."
        )


def settings_of(method: Method, given: Mapping[str, float | str]) -> dict[str, float | str]:
    """A method's settings: its defaults, overridden by what is given.

    Raises:
        ConfigError: An unknown name, a value out of bounds, or a word that is not a choice.
    """
    parameters = {p.name: p for p in method.parameters}
    settings = {name: p.default for name, p in parameters.items()}
    for name, value in given.items():
        if name not in parameters:
            names = ", ".join(parameters) or "none"
            near = nearest(name, parameters)
            hint = f"Did you mean '{near}'?" if near else f"It has {names}."
            raise ConfigError(f"--param {name}: {method.name} has no such setting. {hint}")
        settings[name] = _checked(parameters[name], value)
    return settings


def _checked(parameter: Parameter, value: float | str) -> float | str:
    if parameter.choices:
        if value not in parameter.choices:
            choices = " or ".join(parameter.choices)
            raise ConfigError(f"--param {parameter.name}={value}: expected {choices}.")
        return value
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    integer = isinstance(parameter.default, int)
    is_allowed = math.isfinite(number) and parameter.low <= number <= parameter.high
    if not is_allowed or (integer and number % 1):
        bounds = f" from {parameter.low:.16g}" if math.isfinite(parameter.low) else ""
        bounds += f" to {parameter.high:.16g}" if math.isfinite(parameter.high) else ""
        expected = f"a {'whole ' if integer else ''}number{bounds}"
        raise ConfigError(f"--param {parameter.name}={value}: expected {expected}.")
    return int(number) if integer else number
