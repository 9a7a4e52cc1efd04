"""What must be known before an entry can be merged: mean precisions, and a method's facts."""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mergekit_bayes.kernels import first_pass
from mergekit_bayes.kernels.base import Array, Numbers, Reduce
from mergekit_bayes.methods.base import FactInputs, Facts, Reduction
from mergekit_bayes.methods.histogram import BINS
from mergekit_bayes.methods.measuring import WINDOW, OrderedMap
from mergekit_bayes.plan import Input, MergePlan, Operand, Step
from mergekit_bayes.posterior.forms import StoredPrecision, tensor_mean, without_bad
from mergekit_bayes.stream.bad_entries import refuse_bad, replace_bad_means
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.means import PrecisionMeans
from mergekit_bayes.stream.mixtures import settled
from mergekit_bayes.stream.numbers import kind_of, numbers_of
from mergekit_bayes.stream.pieces import measures
from mergekit_bayes.stream.products import products
from mergekit_bayes.stream.units import entries_at_a_time


class _Window(NamedTuple):
    """Entries `start:stop` of a step, and what is done with them."""

    step: Step
    result: FirstPassResult
    act: Reduce
    numbers: Numbers
    start: int
    stop: int


class FirstPass:
    """Measures what each step must know before its entries are merged.

    Args:
        plan: The merge.
        reader: Gives the calling thread's reader.
        ordered_map: Runs windows of entries, perhaps on several threads.
        fused: Whether to use the compiled passes.
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: Callable[[], Reader],
        ordered_map: OrderedMap,
        *,
        fused: bool,
    ) -> None:
        self.plan, self.reader, self.map, self.fused = plan, reader, ordered_map, fused
        self._means = PrecisionMeans(plan, reader, ordered_map, fused=fused)

    def measure(self, step: Step) -> FirstPassResult:
        """All that must be known of one step.

        Raises:
            PrecisionError: A precision that is pooled has bad entries, and no rule replaces them.
            MismatchError: What a rule for whole tensors cannot merge.
        """
        if step.has_matrices:  # which are neither pooled nor spread
            models = len(self.plan.inputs)
            result = FirstPassResult({}, np.zeros((models, 1)), bad=(0,) * models)
        else:
            result = self._precisions(step)
        rule = self.plan.method.tensor
        if step.copied is None and rule is not None:
            if step.settings is not None:
                if rule.needs(step.settings) == "products":
                    result.products = products(self.plan, step, self.reader, self.map)
                result.measured = measures(self.plan, step, self.reader, self.map)
        elif step.copied is None:
            result.facts = self._facts(step, result)
            result = settled(self.plan, step, result, self.reader, self.map)
        return result

    def _precisions(self, step: Step) -> FirstPassResult:
        plan = self.plan
        pooled: dict[Input, Array] = {}
        added: dict[int, Array] = {}
        bad = [0] * len(plan.inputs)
        for position, operand in enumerate(step.operands):
            if operand.precision is None:
                continue
            size = step.needed(operand)
            numbers, valid, bad[position] = self._coarse(step, operand, operand.precision, size)
            if numbers is not None:
                pooled[operand.input] = numbers
            if plan.shrink is not None and plan.shrink.amount and operand.input.weighing.reshape:
                added[position] = self._shrinkage(step, operand, valid, size)
        rows = max((extra.size for extra in added.values()), default=1)
        rows = max(rows, step.spec.shape[0]) if rows > 1 else 1
        extras = np.zeros((len(plan.inputs), rows))
        for position, extra in added.items():
            extras[position, : extra.size if extra.size > 1 else rows] = extra
        self._refuse_pooled(step, bad)
        return FirstPassResult(pooled, extras, bad=tuple(bad))

    def _coarse(
        self, step: Step, operand: Operand, precision: StoredPrecision, size: int
    ) -> tuple[Array | None, Array | None, int]:
        """The numbers of a precision that is coarser than one per entry, or is pooled.

        Args:
            step: The tensor.
            operand: The input's contribution.
            precision: Its precision.
            size: How many entries are needed, from the first on.

        Returns:
            The numbers in float32, None for a precision by entry; the same without bad ones; and
            how many bad ones were pooled away. The others are counted in the second pass, entry by
            entry.
        """
        pool = self.plan.config.pool
        numbers = precision.coarse(size // step.row)
        if numbers is None:
            if pool is None:
                return None, None, 0
            means, bad = self._entry_means(step, operand, size, by_row=pool == "row")
            pooled = means.astype(np.float32)
            return pooled, pooled, bad
        valid, bad = without_bad(numbers, operand.input.weighing.contained)
        if pool == "tensor" and numbers.size > 1:
            pooled = tensor_mean(valid)
            return pooled, pooled, bad
        return numbers, valid, 0

    def _shrinkage(self, step: Step, operand: Operand, valid: Array | None, size: int) -> Array:
        """What shrinkage adds to H: its amount times the mean of H, (1,) or (rows,) in float64."""
        shrink, weighing = self.plan.shrink, operand.input.weighing
        assert shrink is not None
        if valid is None:
            mean, _ = self._entry_means(step, operand, size, by_row=shrink.by_row)
        else:
            mean = valid.astype(np.float64)
            mean = mean if shrink.by_row else mean.mean(keepdims=True)
        added: Array = shrink.amount * weighing.gain * (mean - weighing.contained)
        return added

    def _entry_means(
        self, step: Step, operand: Operand, size: int, *, by_row: bool
    ) -> tuple[Array, int]:
        if by_row:
            return self._means.over_rows(operand, size, step.row)
        return self._means.over_tensor(operand, size)

    def _refuse_pooled(self, step: Step, bad: Sequence[int]) -> None:
        """Raise `PrecisionError` for bad entries that pooling would hide."""
        for operand, count in zip(step.operands, bad, strict=False):
            if count:
                if self.plan.config.on_bad == "error" or operand is step.donor:
                    refuse_bad(self.plan, step, operand)
                return

    def _facts(self, step: Step, result: FirstPassResult) -> Facts:
        plan, reduction = self.plan, self.plan.method.reduction
        if reduction is None:
            return self._finish(np.zeros(0))
        if plan.method.has_model_scope(plan.settings):
            return self._facts_of_model
        return self._finish(self._totals(reduction, [(step, result)]))

    @cached_property
    def _facts_of_model(self) -> Facts:
        reduction = self.plan.method.reduction
        assert reduction is not None
        steps = [
            (step, self._precisions(step))
            for step in self.plan.steps
            if step.copied is None and step.tied_to is None
        ]
        return self._finish(self._totals(reduction, steps))

    def _finish(self, totals: Array) -> Facts:
        plan = self.plan
        if plan.method.facts is None:
            return None
        counts = tuple(task.weighing.count or 1.0 for task in plan.tasks)
        return plan.method.facts(FactInputs(plan.settings, plan.guard, counts, totals))

    def _totals(self, reduction: Reduction, steps: Sequence[tuple[Step, FirstPassResult]]) -> Array:
        """The method's statistics, summed or counted over all merged entries of some steps."""
        count = reduction.count(len(self.plan.tasks))
        # Counts may be added in any order and by any windows, each thread its own; sums of floats
        # may not.
        counts = reduction.kind == "histogram"
        windows: list[_Window] = []
        for step, result in steps:
            size = entries_at_a_time(self.plan, step) if counts and self.fused else WINDOW
            act = first_pass(kind_of(self.plan, step), fused=self.fused)
            numbers = numbers_of(self.plan, step, None)
            for start in range(0, step.merged, size):
                stop = min(start + size, step.merged)
                windows.append(_Window(step, result, act, numbers, start, stop))
        counted: dict[int, Array] = {}

        def measure(window: _Window) -> Array | None:
            chunk = self.reader().chunk(window.step, window.result, window.start, window.stop)
            if self.plan.config.on_bad == "base":
                replace_bad_means(chunk.means)
            if not counts:
                sums = np.zeros(count)
                window.act(chunk, window.numbers, sums)
                return sums
            thread = threading.get_ident()
            if thread not in counted:
                counted[thread] = np.zeros((count, BINS), np.int64)
            window.act(chunk, window.numbers, counted[thread])
            return None

        totals = np.zeros(count)
        for sums in self.map(measure, windows):
            if sums is not None:
                totals += sums
        if not counts:
            return totals
        return sum(counted.values(), np.zeros((count, BINS), np.int64))
