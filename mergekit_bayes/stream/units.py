"""The work of a merge in units: ranges of one tensor."""

from typing import NamedTuple

from mergekit_bayes.plan import MergePlan

UNIT = 1 << 22  # entries: what a killed merge does again at most, a thread


class Unit(NamedTuple):
    """Entries `start:stop` of a step; `position` is its place in the whole, in [0, 1)."""

    id: int
    step: int
    start: int
    stop: int
    position: float


def units_of(plan: MergePlan) -> list[Unit]:
    """All units of a plan, in order."""
    whole = max(1, sum(s.spec.size for s in plan.steps))
    units: list[Unit] = []
    done = 0
    for k, step in enumerate(plan.steps):
        for start in range(0, step.spec.size, UNIT):
            stop = min(start + UNIT, step.spec.size)
            units.append(Unit(len(units), k, start, stop, (done + start) / whole))
        done += step.spec.size
    return units
