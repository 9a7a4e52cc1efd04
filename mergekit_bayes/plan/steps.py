"""One step of a plan: a tensor of the output and where it comes from."""

from dataclasses import dataclass
from typing import NamedTuple

from mergekit_bayes.checkpoint.specs import TensorSpec


class Found(NamedTuple):
    """A tensor of one of the plan's models."""

    model: int
    name: str


@dataclass(frozen=True)
class Step:
    """One tensor of the output. Sources are in the order of `MergePlan.models`; the donor is the
    first.

    Attributes:
        spec: As it is written.
        sources: Each model's tensor; the donor's where a task lacks it (its scale is then zero).
        precisions: Each model's precision, None for one number everywhere; None where no precision
            is written.
        pooled: Shape of the written precision: the tensor's own, one number a row, or one number.
        scales: One per task.
        merged: Entries that are merged, from the first on; the others are the donor's.
        copied: The reason, if all of the tensor is the donor's.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Found, ...]
    precisions: tuple[Found | None, ...] | None
    precision_shape: tuple[int, ...]
    scales: tuple[float, ...]
    merged: int
    copied: str | None = None

    @property
    def row(self) -> int:
        """Entries of one row: one slice of the first axis."""
        return self.spec.size // self.spec.shape[0] if self.spec.shape and self.spec.size else 1


class Matched(NamedTuple):
    steps: list[Step]
    left_out: dict[str, str]
    mended: dict[str, str]  # what a rule decided for a tensor that is merged

    def rule(self, name: str, what: str) -> None:
        before = self.mended.get(name)
        self.mended[name] = what if before is None else f"{before}; {what}"
