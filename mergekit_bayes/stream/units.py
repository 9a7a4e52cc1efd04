"""The work of a merge in units: ranges of one tensor, or all of one that is merged as a whole."""

from typing import NamedTuple

from mergekit_bayes.plan import MergePlan, Step

UNIT = 1 << 22  # entries; a killed merge repeats at most one unit per thread


class Unit(NamedTuple):
    """Entries `start:stop` of a step.

    Attributes:
        id: Number of the unit, from 0 on.
        step: Index of the step in the plan.
        start: First entry, in flat order.
        stop: End of the entries.
        position: Place of the unit in the whole merge, in [0, 1).
    """

    id: int
    step: int
    start: int
    stop: int
    position: float


def units_of(plan: MergePlan) -> list[Unit]:
    """All units of a plan, in order."""
    total = max(1, sum(step.spec.size for step in plan.steps))
    units: list[Unit] = []
    before = 0
    for index, step in enumerate(plan.steps):
        size = max(step.spec.size, 1) if is_whole(plan, step) else UNIT
        for start in range(0, step.spec.size, size):
            stop = min(start + size, step.spec.size)
            units.append(Unit(len(units), index, start, stop, (before + start) / total))
        before += step.spec.size
    return units


def is_whole(plan: MergePlan, step: Step) -> bool:
    """Whether all of a tensor must be in memory to merge it."""
    rule = plan.method.tensor
    if rule is None or step.settings is None:
        return step.axis is not None
    return rule.needs(step.settings) == "tensor"
