"""What making a model took, kept in `costs/` beside the steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mergekit_bayes.checkpoint.own_files import make_own_folder, write_own
from mergekit_bayes.documents import read_record
from mergekit_bayes.records import Record

T = TypeVar("T")


class Cost(Record):
    """What a step took.

    Attributes:
        seconds: Time by the clock.
        passes: Examples that were sent through a model.
    """

    seconds: float
    passes: int = 0


def timed(
    folder: Path, step: Callable[[], T], passes: Callable[[T], int] = lambda report: 0
) -> None:
    """Carry out a step and keep what it took.

    Args:
        folder: The step's folder, whose name the record has.
        step: Carries it out.
        passes: Examples that were sent through a model, by what the step returns.
    """
    start = time.monotonic()
    report = step()
    write_cost(folder, Cost(seconds=time.monotonic() - start, passes=passes(report)))


def write_cost(folder: Path, cost: Cost) -> None:
    """Keep what the step of a folder took."""
    file = _file(folder)
    make_own_folder(file.parent)
    write_own(file, cost.model_dump_json() + "\n")


def read_cost(folder: Path) -> Cost | None:
    """What the step of a folder took; None if that is not known.

    Raises:
        CheckpointError: The record cannot be read.
    """
    file = _file(folder)
    return (
        read_record(Cost, file, "Remove it; the time is then unknown.") if file.exists() else None
    )


def forget_cost(folder: Path) -> None:
    """Remove what a step took which is carried out again."""
    _file(folder).unlink(missing_ok=True)


def total(costs: list[Cost | None]) -> Cost | None:
    """What several steps took together; None if one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    return Cost(seconds=sum(c.seconds for c in known), passes=sum(c.passes for c in known))


def _file(folder: Path) -> Path:
    return folder.parent / "costs" / f"{folder.name}.json"
