"""DARE's random drop (Yu et al., ICML 2024), which both of its methods share."""

from typing import NamedTuple

from mergekit_bayes.methods.base import FactInputs, Parameter


class Drop(NamedTuple):
    """How much is dropped.

    Attributes:
        density: Share of each task vector that is kept, in (0, 1].
    """

    density: float


DROP_PARAMETERS = (
    Parameter(
        "density", 0.1, "share of each task vector that is kept; the paper drops 90 %", 1e-6, 1
    ),
    Parameter("seed", 0, "of the random numbers, a whole number", 0, 2**53),
)


def drop_facts(inputs: FactInputs) -> Drop:
    """The facts of a method that drops."""
    return Drop(float(inputs.settings["density"]))
