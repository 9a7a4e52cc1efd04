"""What every merging rule looks like."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mergekit_bayes.gaussian import Gaussian

Combine = Callable[[Any, tuple[Gaussian, ...], tuple[float, ...], float], Gaussian]


class Method(NamedTuple):
    """A merging rule.

    Attributes:
        combine: `(base, tasks, scales, guard) -> Gaussian`, elementwise and pure. `base` is None for a method that
            needs none. A method that needs no precision passes on what it was given.
    """

    name: str
    combine: Combine
    needs_base: bool
    needs_precision: bool
