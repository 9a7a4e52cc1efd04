"""What happened in a unit of a merge, and the line in which a journal keeps it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_bayes.kernels.base import Tally

TallyLine = Mapping[str, Any]  # as JSON


@dataclass
class UnitTally:
    """What happened in a unit.

    Attributes:
        entries: Merged entries; copied ones do not count.
        changed: Entries at which some task differs from the base.
        lost: Those of them that rounding gave back the base's value.
        guarded: Entries at which the guard acted.
        multiplier: The largest multiplier of a removal.
        stored: For each model, the sum of its stored (or pooled) precisions.
        replaced: For each model, entries that `--on-bad base` replaced.
    """

    entries: int = 0
    changed: int = 0
    lost: int = 0
    guarded: int = 0
    multiplier: float = 0.0
    stored: list[float] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        """Add what a pass counted."""
        self.entries += tally.entries
        self.changed += tally.changed
        self.lost += tally.lost
        self.guarded += tally.guarded
        self.multiplier = max(self.multiplier, tally.multiplier)
        sums = self.stored or [0.0] * tally.models
        self.stored = [a + float(b) for a, b in zip(sums, tally.stored, strict=True)]

    def add_replaced(self, counts: Sequence[int]) -> None:
        """Add how many entries of each model were replaced."""
        before = self.replaced or [0] * len(counts)
        self.replaced = [a + b for a, b in zip(before, counts, strict=True)]

    @classmethod
    def from_json(cls, line: TallyLine) -> "UnitTally":
        """The tally that `to_json` made a line of."""
        replaced = line["mended"]
        return cls(**{k: v for k, v in line.items() if k != "mended"}, replaced=replaced)

    def to_json(self) -> TallyLine:
        """The tally as a journal keeps it."""
        return {
            "entries": self.entries,
            "changed": self.changed,
            "lost": self.lost,
            "guarded": self.guarded,
            "multiplier": self.multiplier,
            "stored": self.stored,
            "mended": self.replaced,
        }
