"""What is counted in a merge: by unit, as a journal keeps it, and over all units for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.kernels.base import Tally
from mergekit_bayes.plan import Input, MergePlan, Operand, Step
from mergekit_bayes.stream.units import Unit

TallyLine = Mapping[str, Any]  # as JSON
MOVES = 4  # sums a model of how far it was moved


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
        moves: For each model, `MOVES` sums of how far the merge moved it: those of
            `kernels.base.Tally.distances` and `products`.
        shares: For each task, the merged entries times its responsibility in the mixture that it
            is a component of, zero for others; empty where no mixture is merged.
    """

    entries: int = 0
    changed: int = 0
    lost: int = 0
    guarded: int = 0
    multiplier: float = 0.0
    stored: list[float] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        """Add what a pass counted."""
        self.entries += tally.entries
        self.changed += tally.changed
        self.lost += tally.lost
        self.guarded += tally.guarded
        self.multiplier = max(self.multiplier, tally.multiplier)
        sums = self.stored or [0.0] * tally.models
        self.stored = [a + b for a, b in zip(sums, tally.stored.tolist(), strict=True)]
        by_model = zip(tally.distances.tolist(), tally.products.tolist(), strict=True)
        moves = [value for sums_of_model in by_model for pair in sums_of_model for value in pair]
        before = self.moves or [0.0] * len(moves)
        self.moves = [a + b for a, b in zip(before, moves, strict=True)]

    def add_replaced(self, counts: Sequence[int]) -> None:
        """Add how many entries of each model were replaced."""
        before = self.replaced or [0] * len(counts)
        self.replaced = [a + b for a, b in zip(before, counts, strict=True)]

    def add_shares(self, shares: Sequence[float]) -> None:
        """Add the shares that components have of their mixtures, in all entries of the unit."""
        self.shares = [self.entries * share for share in shares]

    @classmethod
    def from_json(cls, line: TallyLine) -> "UnitTally":
        """The tally that `to_json` made a line of."""
        replaced = line["mended"]
        return cls(**{k: v for k, v in line.items() if k != "mended"}, replaced=replaced)

    @staticmethod
    def is_line(value: object) -> TypeGuard[TallyLine]:
        """Whether a value has the form that `to_json` gives."""
        if not isinstance(value, dict) or value.keys() != UnitTally().to_json().keys():
            return False
        lists = [value[key] for key in ("stored", "mended", "moves", "shares")]
        if not all(isinstance(numbers, list) for numbers in lists):
            return False
        counts = [value[key] for key in ("entries", "changed", "lost", "guarded")]
        numbers = [value["multiplier"], *value["stored"], *value["moves"], *value["shares"]]
        return all(type(count) is int for count in (*counts, *value["mended"])) and all(
            type(number) in (int, float) for number in numbers
        )

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
            "moves": self.moves,
            "shares": self.shares,
        }


class MergeTotals:
    """Sums over all units.

    They are added in the order of the units, so that they do not depend on who wrote the units.

    Args:
        plan: The merge.
        units: All of its units.
        tallies: The line of each unit in the journals.

    Attributes:
        entries: Merged entries.
        changed: Entries at which some task differs from the base.
        lost: Those of them that rounding gave back the base's value.
        guarded: Entries at which the guard acted.
        multiplier: The largest multiplier of a removal.
        replaced: For each input, entries that `--on-bad base` replaced.
        likelihood: For each input, the sum of its likelihood precision.
        zero: For each input, the tensors in which its precision is zero.
        shares: For each component of a mixture, the mean of its responsibilities over the entries
            in which the mixture counts; none of a mixture that counts in no entry.
        moves: For each step that is merged by precision, its index and `MOVES` sums of each model.
    """

    def __init__(
        self, plan: MergePlan, units: Sequence[Unit], tallies: Mapping[int, TallyLine]
    ) -> None:
        self._plan = plan
        self.entries = self.changed = self.lost = self.guarded = 0
        self.multiplier = 0.0
        self.replaced: dict[Input, int] = dict.fromkeys(plan.inputs, 0)
        self.likelihood: dict[Input, float] = dict.fromkeys(plan.inputs, 0.0)
        self.zero: dict[Input, list[str]] = {model: [] for model in plan.inputs}
        self._weighed: dict[Input, int] = dict.fromkeys(plan.inputs, 0)  # tensors, own precision
        self.moves: dict[int, list[float]] = {}
        responsible: dict[Input, float] = {t: 0.0 for t in plan.tasks if t.mixture is not None}
        by_step: dict[int, tuple[int, list[float]]] = {}
        count = len(plan.inputs)
        for unit in units:
            if plan.steps[unit.step].tied_to is not None:
                continue  # a copy is counted once
            tally = UnitTally.from_json(tallies[unit.id])
            if (len(tally.stored), len(tally.moves)) not in ((0, 0), (count, MOVES * count)):
                raise CheckpointError(
                    f"{plan.target}.partial: a journal counts {len(tally.stored)} models in unit "
                    f"{unit.id}, and the merge has {count}. Remove that folder, and "
                    "merge again."
                )
            self._add(tally)
            for task, share in zip(plan.tasks, tally.shares, strict=False):
                if task.mixture is not None:
                    responsible[task] += share
            if tally.stored and plan.method.needs_precision:
                entries, sums = by_step.get(unit.step, (0, [0.0] * count))
                sums = [a + b for a, b in zip(sums, tally.stored, strict=True)]
                by_step[unit.step] = (entries + tally.entries, sums)
                moves = self.moves.get(unit.step, [0.0] * (MOVES * count))
                self.moves[unit.step] = [a + b for a, b in zip(moves, tally.moves, strict=True)]
        self.shares = _by_mixture(responsible)
        for index, (entries, sums) in by_step.items():
            self._add_likelihood(plan.steps[index], entries, sums)

    @property
    def guarded_share(self) -> float:
        """Share of merged entries at which the guard acted."""
        return self.guarded / self.entries if self.entries else 0.0

    def refuse_zero(self) -> None:
        """Check that no model's precision is zero everywhere.

        Raises:
            PrecisionError: One is.
        """
        for model, names in self.zero.items():
            precision = model.posterior.precision
            if names and len(names) == self._weighed[model] and precision is not None:
                raise PrecisionError(
                    f"the precision of '{model.ref}' ({precision.files[0]}) is zero everywhere. "
                    f"Make it again with `bmerge precision {model.ref} --data TEXTS --force`."
                )

    def _add(self, tally: UnitTally) -> None:
        self.entries += tally.entries
        self.changed += tally.changed
        self.lost += tally.lost
        self.guarded += tally.guarded
        self.multiplier = max(self.multiplier, tally.multiplier)
        for model, count in zip(self._plan.inputs, tally.replaced, strict=False):
            self.replaced[model] += count

    def _add_likelihood(self, step: Step, entries: int, sums: Sequence[float]) -> None:
        """Add the likelihood precision of a tensor, whose stored precisions have these sums."""
        base_sum = 0.0
        for operand, stored in zip(step.operands, sums, strict=True):
            if not operand.owns_precision:
                continue
            self._weighed[operand.input] += 1
            if stored == 0:
                self.zero[operand.input].append(step.name)
            likelihood = self._likelihood(operand, entries, stored, base_sum)
            base_sum = likelihood if operand is step.donor else base_sum
            self.likelihood[operand.input] += likelihood

    def _likelihood(self, operand: Operand, entries: int, stored: float, base_sum: float) -> float:
        """Sum of H over the merged entries; `base_sum` is that of the base."""
        weighing, shrink = operand.input.weighing, self._plan.shrink
        likelihood = weighing.gain * (stored - entries * weighing.contained)
        if weighing.contains_base is not None:
            base_gain = self._plan.inputs.donor.weighing.gain
            contained = entries * DELTA_0 + base_sum * weighing.contains_base / base_gain
            likelihood -= weighing.gain * contained
        elif shrink is not None and weighing.reshape:
            likelihood *= 1 + shrink.amount
        return likelihood


def _by_mixture(sums: Mapping[Input, float]) -> dict[Input, float]:
    """Each component's part of what its mixture has in all, which is how many entries it counts in.

    The components of a mixture that counts in none are left out.
    """
    entries: dict[int | None, float] = {}
    for task, of_task in sums.items():
        entries[task.mixture] = entries.get(task.mixture, 0.0) + of_task
    return {t: of_task / entries[t.mixture] for t, of_task in sums.items() if entries[t.mixture]}
