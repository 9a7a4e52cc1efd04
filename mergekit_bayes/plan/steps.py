"""One step of a plan: a tensor of the output and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_bayes.checkpoint.specs import CheckpointSource, TensorSpec
from mergekit_bayes.checkpoint.token_rows import stored_dtype
from mergekit_bayes.methods.tensors import Setting
from mergekit_bayes.plan.inputs import Input
from mergekit_bayes.plan.tied_heads import Ties
from mergekit_bayes.posterior.forms import Form, StoredPrecision, form_of_directions
from mergekit_bayes.posterior.stored import DIAGONAL, LEFT, PRECISION, RIGHT, named


class TensorRef(NamedTuple):
    """A mean's tensor: the input that owns it, and its name there."""

    input: Input
    name: str

    @property
    def source(self) -> CheckpointSource:
        """What the tensor is read from."""
        return self.input.posterior.mean

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape, as stored."""
        return self.source.specs[self.name]

    @property
    def stored_dtype(self) -> str:
        """The dtype in which the model has it, where its rows were rearranged for the merge."""
        return stored_dtype(self.source, self.name)

    @property
    def where(self) -> str:
        """Its file, for messages."""
        return self.source.where(self.name)


class Operand(NamedTuple):
    """What one input contributes to a tensor.

    Attributes:
        input: The base or a task.
        mean: Its tensor. The donor's tensor where a task lacks it or has scale zero there.
        scale: The task's scale in this tensor, dimensionless; 0 for the base.
        precision: Its precision; None where precisions do not count.
        owns_precision: Whether the precision is the input's own. Otherwise the donor's stands in,
            because the task did not change the tensor.
    """

    input: Input
    mean: TensorRef
    scale: float = 0.0
    precision: StoredPrecision | None = None
    owns_precision: bool = True


@dataclass(frozen=True)
class Step:
    """One tensor of the output.

    Attributes:
        name: Its name, the donor's if that stores it.
        spec: Its dtype and shape as written.
        base: The operand of the base; None without one.
        tasks: The operands of the tasks, in the order of the plan. A copied tensor has the donor's
            operand only.
        precision_shape: Shape of the written precision: the tensor's own, one number per row, one
            number, or that of matrices (`posterior/forms.py`). None where no precision is written.
        merged: How many entries are merged, from the first on; the others are the donor's, and
            those that it lacks the `rest`'s.
        copied: The reason why all of the tensor is the donor's; None if some of it is merged.
        tied_to: The tensor of which this one is a copy, because all models tie them; None for a
            tensor of its own. A copy is made from the same operands, and counts nowhere.
        rest: The task's operand that gives the rows beyond the donor's, whose vocabulary is
            shorter; None where the donor has all rows.
        axis: The axis of a linear layer's inputs, -1 or -2, where the tensor is merged as a whole
            matrix; None where it is merged entry by entry.
        settings: Of a tensor that is merged by a rule for whole tensors: the method's settings as
            they hold in it. None for a copied one, and where the method has no such rule.
    """

    name: str
    spec: TensorSpec
    base: Operand | None
    tasks: tuple[Operand, ...]
    precision_shape: tuple[int, ...] | None = None
    merged: int = 0
    copied: str | None = None
    tied_to: str | None = None
    rest: Operand | None = None
    axis: int | None = None
    settings: Mapping[str, Setting] | None = field(default=None, hash=False)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, the base's first: the order of the plan's inputs."""
        return self.tasks if self.base is None else (self.base, *self.tasks)

    @property
    def donor(self) -> Operand:
        """The operand of the base, or of the first task without one.

        The tensor has its name and shape, and entries that are not merged are copied from it.
        """
        return self.tasks[0] if self.base is None else self.base

    def needed(self, operand: Operand) -> int:
        """How many entries of an operand's tensor are read, from the first on."""
        if operand is self.rest:
            return self.spec.size
        return operand.mean.spec.size if operand is self.donor else self.merged

    def owner(self, entry: int) -> tuple[Operand, int]:
        """The operand from which an entry that is not merged is copied, and the end of its part."""
        end = self.donor.mean.spec.size
        if self.rest is not None and entry >= end:
            return self.rest, self.spec.size
        return self.donor, end

    @property
    def contributors(self) -> list[Input]:
        """The inputs whose own tensor is merged into this one, the base or donor first.

        Of a copied tensor that is the donor.
        """
        if self.copied is not None:
            return [self.donor.mean.input]
        base = [] if self.base is None else [self.base.input]
        return base + [
            operand.input
            for operand in self.tasks
            if operand.scale != 0 and operand.mean.input is operand.input
        ]

    @property
    def source(self) -> str:
        """The name of the tensor, of which this step may be a copy."""
        return self.name if self.tied_to is None else self.tied_to

    @property
    def row(self) -> int:
        """Entries of one row: one slice of the first axis."""
        return self.spec.size // self.spec.shape[0] if self.spec.shape and self.spec.size else 1

    @property
    def precision_spec(self) -> TensorSpec | None:
        """Dtype and shape of the written precision; None where none is written."""
        return None if self.precision_shape is None else TensorSpec("F32", self.precision_shape)

    @property
    def has_matrices(self) -> bool:
        """Whether the written precision is one of matrices, in whatever form."""
        return self.form is not None

    @property
    def precision_parts(self) -> dict[str, TensorSpec]:
        """The tensors of the written precision in its file: dtype and shape by name."""
        spec = self.precision_spec
        if spec is None:
            return {}
        right, left = named(RIGHT, self.name), named(LEFT, self.name)
        form, axis = form_of_directions(spec.shape, self.spec.shape) or (Form.ENTRY, 0)
        if form <= Form.ENTRY:
            return {named(PRECISION, self.name): spec}
        one = right if axis == -1 else left
        if form is Form.KRONECKER:
            r, c = self.spec.shape[-2:]
            terms = spec.shape[:-3]
            return {
                left: TensorSpec("F32", (*terms, r, r)),
                right: TensorSpec("F32", (*terms, c, c)),
            }
        if form is Form.LOW_RANK:
            *leading, rows, n = spec.shape[: len(self.spec.shape)]
            return {
                named(DIAGONAL, self.name): TensorSpec("F32", (*leading, n)),
                one: TensorSpec("F32", (*leading, rows - 1, n)),
            }
        return {one: TensorSpec("F32", spec.shape[: len(self.spec.shape) + 1])}

    @property
    def form(self) -> Form | None:
        """The form of the written precision, if it is one of directions."""
        found = form_of_directions(self.precision_shape or (), self.spec.shape)
        return None if found is None else found[0]

    @property
    def has_coarse_precision(self) -> bool:
        """Whether the written precision has fewer numbers than the tensor has entries."""
        return self.precision_shape is not None and self.precision_shape != self.spec.shape


@dataclass(frozen=True)
class MatchedTensors:
    """What becomes of every tensor of the inputs.

    Attributes:
        steps: The tensors of the output, in the donor's order.
        left_out: Tensors that are not in the output, with the reason.
        decisions: What a rule (tied heads, `--on-missing`, `--vocab`) decided for a tensor that is
            merged.
        ties: The tied tensors.
    """

    left_out: dict[str, str]
    ties: Ties
    steps: list[Step] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)

    def record_decision(self, name: str, decision: str) -> None:
        """Add what a rule decided for a tensor to what other rules decided for it."""
        before = self.decisions.get(name)
        self.decisions[name] = decision if before is None else f"{before}; {decision}"
