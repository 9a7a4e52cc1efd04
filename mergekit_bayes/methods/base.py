"""The contract of a merging rule, and how one is declared.

A rule is one function, `combine(base, tasks, scales, facts)`, which states it for one entry. The
same function runs on floats, on numpy arrays and compiled by numba, with the same bits:

1. It is pure and elementwise: plain operators and numpy's elementwise functions.
2. A branch on an entry is `select(condition, yes, no)`, from `mergekit_bayes.gaussian`; an `if`
   would ask an array for one truth value.
3. A number of its own is `constant(number, like)`, from the same module. When compiled, a bare
   `0.5` or a `len(tasks)` would widen float32 to float64.
4. Tasks, scales and draws are tuples, taken by index: `for t in range(len(tasks))`.
5. What it must know beforehand comes as `facts`, a NamedTuple of its own that holds numbers and
   tuples of numbers; `combine` is given all as floats of the entries' dtype, `matrix` as they are.

A rule may state itself a second time for the weights of linear layers, which are then merged as
whole matrices, in `matrix(base, tasks, scales, facts)`: means are float64 arrays of shape (outputs,
inputs), precisions of shape (inputs, inputs), symmetric, the same for every output (`matrices.py`),
or sums of Kronecker products (`kronecker.py`) or of low rank beside a diagonal (`low_rank.py`),
which add, scale and multiply in the same way; numpy's linear algebra is allowed. `combine` stays
the rule of all other tensors: embeddings, norms, biases, heads of a vocabulary. A rule without
precisions is given every linear layer so, one with precisions those whose precision is stored as a
matrix. What it cannot merge it says in an ArithmeticError, whose text the user gets with the
layer's name.

A rule that cannot be compiled still merges: in numpy, more slowly, with a warning. One that cannot
run on arrays either is refused with the same `RULE`.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeAlias

from numpy.typing import NDArray

from mergekit_bayes.gaussian import Gaussian, Number
from mergekit_bayes.methods.tensors import TensorRule

Tasks: TypeAlias = tuple[Gaussian, ...]
Scales: TypeAlias = tuple[Number, ...]  # one per task, dimensionless
Draws: TypeAlias = tuple[Number, ...]  # one per task, uniform in [0, 1)
Facts: TypeAlias = tuple[object, ...] | None
Totals: TypeAlias = NDArray[Any]  # (statistics,) of float64, or (statistics, BINS) of int64
Settings: TypeAlias = Mapping[str, float | str]

# The contract in one sentence, for messages about a method that breaks it.
RULE = (
    "The rule: plain operators, `select` for branches, loops by index, and "
    "`constant(number, like)` for numbers of its own, such as 0.5 or len(tasks); see "
    "mergekit_bayes/methods/base.py."
)


class Parameter(NamedTuple):
    """One setting of a method: `--param name=value`.

    Attributes:
        name: As the user writes it.
        default: An int where only whole numbers are allowed.
        meaning: One line, with the unit.
        low: Least number allowed.
        high: Largest number allowed.
        choices: The words allowed, for a setting that is not a number.
    """

    name: str
    default: float | str
    meaning: str
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()


class Reduction(NamedTuple):
    """A first pass over all entries, for what a method must know before it combines them.

    Attributes:
        kind: `sum` adds each statistic up in float64; `histogram` counts its magnitudes.
        statistic: `(base, tasks, k) -> value` of one entry, for k below `count(len(tasks))`, under
            the contract of `combine`.
        count: `number of tasks -> number of statistics`.
        scope: Totals over each `tensor` or over the `model`; `--param scope=` overrides it where
            the method has that setting.
    """

    kind: Literal["sum", "histogram"]
    statistic: Callable[[Any, Tasks, int], Number]
    count: Callable[[int], int]
    scope: Literal["tensor", "model"]


class FactInputs(NamedTuple):
    """What a method makes its facts of.

    Attributes:
        settings: The method's settings, checked: ints, floats and words, as their defaults are.
        guard: Bound on the amplification of a removal, in (0, 1].
        counts: Observations that each task's precision stands for; 1 where unknown.
        totals: What the method's reduction added up; empty without one.
    """

    settings: Settings
    guard: float
    counts: tuple[float, ...]
    totals: Totals


class Method(NamedTuple):
    """A merging rule.

    Attributes:
        name: Its key in `METHODS` and the value of `--method`.
        combine: `(base, tasks, scales, facts) -> Gaussian`, under the contract above. A `random`
            method takes a fifth argument, `draws`. `base` may be None unless `needs_base`. A
            method that needs no precision returns the one that it was given.
        needs_base: Whether it requires a base; otherwise it takes none.
        needs_precision: Whether it requires precisions; otherwise it is given none.
        summary: One line for `bmerge methods`, with the paper.
        example: A command line.
        formula: What the report and the card state; the summary where there is none.
        parameters: Its settings.
        reduction: Its first pass, if any.
        facts: Makes the facts that `combine` takes; without it they are None. Without a reduction
            it may refuse the settings by a `ConfigError`.
        unguarded_precision: `(base, tasks, scales) -> precision` as it would be without the guard
            on removal, by the same operations; None for a method without a guard.
        random: Whether it takes draws. It then has a setting `seed`.
        is_posterior: Whether a merge can be merged again: natural parameters add up.
        can_be_undone: Whether the opposite scale takes a task out of a merge again.
        tasks: Number of tasks that it takes; None for any.
        ignores: Settings of a merge by precision that it has no use for, which are refused.
        matrix: The rule for whole matrices, under the contract above; None for one that has none.
        needs_matrices: Whether it is of no use where no tensor is merged as a matrix. With
            precisions it then reads those of inputs, and no Kronecker products.
        tensor: The rule by which it merges every tensor as a whole (`tensors.py`); None for one
            that merges by `combine`.
        takes_base: Whether it takes a base that it does not need.
        fewest: The least number of tasks that it takes.
        takes_scales: Whether scales say how far each task goes in; otherwise all are 1.
        reads_weights: Whether it needs the weights themselves. Otherwise, with a base where it
            takes one, what each task changed is enough: moving all models, and the base, by one
            tensor moves the merge by it.
        turns: Whether it commutes with orthogonal maps of outputs and inputs by what it declares
            here; of a rule that reads `products` it is known.
    """

    name: str
    combine: Callable[..., Gaussian]
    needs_base: bool
    needs_precision: bool
    summary: str
    example: str
    formula: str | None = None
    parameters: tuple[Parameter, ...] = ()
    reduction: Reduction | None = None
    facts: Callable[[FactInputs], Facts] | None = None
    unguarded_precision: Callable[[Gaussian, Tasks, Scales], Number] | None = None
    random: bool = False
    is_posterior: bool = False
    can_be_undone: bool = False
    tasks: int | None = None
    ignores: tuple[str, ...] = ()
    matrix: Callable[..., Gaussian] | None = None
    needs_matrices: bool = False
    tensor: TensorRule | None = None
    takes_base: bool = False
    takes_scales: bool = True
    fewest: int = 1
    reads_weights: bool = False
    turns: bool = False

    @property
    def code(self) -> str:
        """Hash of the files that state the rule, so that no merge goes on by another one.

        What these import is left out: of this package its version decides.
        """
        statistic = self.reduction.statistic if self.reduction else None
        tensor = self.tensor.combine if self.tensor else None
        parts = (self.combine, self.matrix, self.facts, statistic, tensor)
        modules = {part.__module__ for part in parts if part is not None}
        files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
        digest = hashlib.sha256()
        for file in filter(None, files):
            with suppress(OSError), open(file, "rb") as source:  # in a zip, or removed since
                digest.update(hashlib.file_digest(source, "sha256").digest())
        return digest.hexdigest()

    @property
    def merges_changes(self) -> bool:
        """Whether it needs no more of models than what each changed of their base."""
        return not (self.needs_precision or self.reads_weights)

    def is_equivariant(self, settings: Settings) -> bool:
        """Whether it commutes with orthogonal maps of a matrix's outputs and inputs.

            merge(P m_1 Q, ..., P m_T Q) = P merge(m_1, ..., m_T) Q    for orthogonal P and Q

        Of a whole matrix, that is; a rule for matrices by its `matrix`.

        Args:
            settings: The method's.
        """
        if self.tensor is not None:
            return self.tensor.needs(settings) == "products"
        return self.turns

    def has_model_scope(self, settings: Settings) -> bool:
        """Whether its first pass goes over all tensors before any of them is merged."""
        reduction = self.reduction
        return reduction is not None and settings.get("scope", reduction.scope) == "model"

    @property
    def writes_posterior(self) -> bool:
        """Whether a merge writes a precision beside its mean."""
        return self.is_posterior and self.needs_precision
