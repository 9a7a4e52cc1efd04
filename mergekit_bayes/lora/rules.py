"""Which methods merge adapters alone: those for which what each adapter changed is enough."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.kernels.arrays import facts_of
from mergekit_bayes.methods import METHODS, Method, check_fit, choose, method_named, settings_of

# The method by which adapters are merged where none is named.
USUAL = choose(with_base=True, by_precision=False)


class Rule(NamedTuple):
    """A method with its settings.

    Attributes:
        method: The method.
        settings: All its settings, checked.
    """

    method: Method
    settings: Mapping[str, float | str]

    @property
    def is_equivariant(self) -> bool:
        """Whether it gives in core space what it gives on the dense changes."""
        return self.method.is_equivariant(self.settings)

    @property
    def is_a_sum(self) -> bool:
        """Whether it adds the scaled changes."""
        return self.method.name == USUAL.name

    @property
    def has_model_scope(self) -> bool:
        """Whether it must know of all layers before it merges one."""
        return self.method.has_model_scope(self.settings)

    @property
    def text(self) -> str:
        """Its name and settings, for the report."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return self.method.name + (f" ({settings})" if settings else "")


def choose_rule(
    name: str | None, given: Mapping[str, float | str], count: int, scales: Sequence[float]
) -> Rule:
    """The rule by which the cores of adapters are merged.

    Args:
        name: Of the method; None for task arithmetic.
        given: Its settings, as given.
        count: Number of adapters.
        scales: As given.

    Raises:
        ConfigError: There is no such method or setting, or it does not merge so many adapters, or
            needs precisions or the base's weights.
    """
    method = USUAL if name is None else method_named(name, with_base=True)
    if method.needs_precision:
        raise ConfigError(
            f"--method {method.name} weighs entries by their precision, and cores have none. Use "
            f"--weights precision without --method, or whole models: {_fold_by(method)}."
        )
    if method.reads_weights:
        others = [m.name for m in METHODS.values() if m.merges_changes]
        raise ConfigError(
            f"--method {method.name} needs the weights of the models, and adapters alone tell only "
            f"what changed: merge whole models, {_fold_by(method)}, or take one of "
            f"{', '.join(others)}."
        )
    check_fit(method, count, scales, "adapter")
    is_average = not (method.needs_base or method.takes_base)
    if is_average and (min(scales) < 0 or not sum(scales) > 0):
        raise ConfigError(
            f"--method {method.name} takes the scales for shares: none below zero, not all zero. "
            f"--method {USUAL.name} takes any."
        )
    settings = settings_of(method, given)
    if method.reduction is None:
        facts_of(method, settings, count, np.zeros(0))  # it may refuse the settings
    return Rule(method, settings)


def _fold_by(method: Method) -> str:
    """The command that merges whole models by a method."""
    base = " --base BASE" if method.needs_base or method.takes_base else ""
    return f"`bmerge merge BASE+A BASE+B{base} --method {method.name} -o OUT`"


def check_space(name: str | None, given: Mapping[str, float | str], space: str) -> None:
    """Refuse a method, or settings, for a space in which it does not merge.

    Args:
        name: Of the method; None where none is named.
        given: Its settings.
        space: In which adapters are merged, not `core`.

    Raises:
        ConfigError: The method means something else there.
    """
    if name is not None and (name != USUAL.name or space == "factor"):
        method_named(name, with_base=True)  # a misspelt name is the first thing to tell
        raise ConfigError(
            f"--method {name} merges adapters in their core space: use --space core, or leave "
            f"--space out. --space {space} has its own rule."
        )
    if given:
        raise ConfigError(
            f"--param {next(iter(given))} is a setting of a method: name one with --method."
        )
