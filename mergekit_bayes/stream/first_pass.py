"""What must be known before an entry can be merged: mean precisions, and a method's facts.

Sums are taken over windows that depend on the tensor alone and are added in order, so that neither
chunks nor threads change a bit.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode
from mergekit_bayes.kernels import first_pass, row_sums
from mergekit_bayes.kernels.base import Array
from mergekit_bayes.methods.base import FactInputs, Facts, Reduction
from mergekit_bayes.methods.histogram import BINS
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.plan.steps import Found
from mergekit_bayes.stream.bad_entries import mend_means, no_precision, refuse_bad
from mergekit_bayes.stream.chunks import Known, Reader, kind_of, numbers_of

WINDOW = 1 << 18  # entries
Spread = Callable[
    [Callable[[Any], Any], Iterable[Any]], Iterator[Any]
]  # a map, in order, perhaps by several threads


class _Window(NamedTuple):
    start: int
    stop: int
    row: int


class FirstPass:
    """Finds out what each step must know.

    Args:
        plan: The merge.
        reader: The calling thread's reader.
        spread: Runs windows.
        fused: Whether to use the compiled passes.
    """

    def __init__(
        self, plan: MergePlan, reader: Callable[[], Reader], spread: Spread, *, fused: bool
    ) -> None:
        self.plan, self.reader, self.spread, self.fused = plan, reader, spread, fused

    def known(self, step: Step) -> Known:
        """All of it for one step."""
        known = self._precisions(step)
        if step.copied is None:
            known.facts = self._facts(step, known)
        return known

    def _precisions(self, step: Step) -> Known:
        plan, pooled, means, bad = self.plan, {}, {}, [0] * len(self.plan.models)
        shrink, pool = plan.shrink, plan.config.pool
        for i, found in enumerate(step.precisions or ()):
            weighing = plan.weighings[i]
            size = step.spec.size if i == 0 else step.merged
            coarse = self._coarse(step, i, found, size // step.row)
            whole = coarse
            if coarse is None and pool is not None:
                mean, bad[i] = self._means(i, found, step.row, size, by_row=pool == "row")
                whole = coarse = mean.astype(np.float32)
            elif coarse is not None:
                wrong = no_precision(
                    coarse
                )  # counted in the second pass, entry by entry, unless it is pooled away
                whole = np.where(wrong, np.float32(weighing.contained), coarse)
                if pool == "tensor" and coarse.size > 1:
                    bad[i] = int(np.count_nonzero(wrong))
                    whole = coarse = whole.mean(keepdims=True, dtype=np.float64).astype(np.float32)
            if coarse is not None:
                pooled[i] = coarse
            if shrink is not None and shrink.amount and weighing.reshape:
                if whole is None:
                    mean, _ = self._means(i, found, step.row, size, by_row=shrink.by_row)
                else:
                    mean = whole.astype(np.float64)
                    mean = mean if shrink.by_row else mean.mean(keepdims=True)
                means[i] = shrink.amount * weighing.gain * (mean - weighing.contained)
        rows = max((m.size for m in means.values()), default=1)
        rows = max(rows, step.spec.shape[0]) if rows > 1 else 1
        extras = np.zeros((len(plan.models), rows))
        for i, extra in means.items():
            extras[i, : extra.size if extra.size > 1 else rows] = extra
        if any(bad) and (plan.config.on_bad == "error" or bad[0]):
            refuse_bad(plan, step, next(i for i, count in enumerate(bad) if count))
        return Known(pooled, extras, bad=tuple(bad))

    def _coarse(self, step: Step, i: int, found: Found | None, rows: int) -> Array | None:
        """A precision that is one number, or one for each of `rows`; None for one by entry."""
        models = self.plan.models
        if found is None:
            # A task without a precision here left the tensor alone; the base's number stands for
            # its own.
            number = models[i].isotropic
            return np.array([models[0].isotropic if number is None else number], np.float32)
        precision = models[found.model].precision
        assert precision is not None
        spec = precision.specs[found.name]
        own = next(s.name for s in (step.sources[i], *step.sources) if s.model == found.model)
        if spec.size > 1 and spec.shape == models[found.model].mean.specs[own].shape:
            return None
        values = decode(self.reader().raw(precision, found.name, 0, spec.size), spec.dtype).astype(
            np.float32
        )
        return values if values.size == 1 else values[:rows]

    def _means(
        self, i: int, found: Found | None, row: int, size: int, *, by_row: bool
    ) -> tuple[Array, int]:
        """Mean of a stored precision over the tensor, (1,), or one a row, (rows,), in float64; and
        bad entries.
        """
        assert found is not None
        if not by_row:
            sums, bad = self._sums(
                i,
                found,
                [
                    _Window(a, min(a + WINDOW, size), min(WINDOW, size - a))
                    for a in range(0, size, WINDOW)
                ],
            )
            return np.array([_added(sums) / max(size, 1)]), bad
        if row <= WINDOW:
            step = WINDOW // row * row
            sums, bad = self._sums(
                i, found, [_Window(a, min(a + step, size), row) for a in range(0, size, step)]
            )
            return (np.concatenate(sums) / row if sums else np.zeros(0)), bad
        pieces = [
            _Window(a, min(a + WINDOW, r + row), min(WINDOW, r + row - a))
            for r in range(0, size, row)
            for a in range(r, r + row, WINDOW)
        ]
        sums, bad = self._sums(i, found, pieces)
        each = math.ceil(row / WINDOW)
        return np.array([_added(sums[k : k + each]) for k in range(0, len(sums), each)]) / row, bad

    def _sums(self, i: int, found: Found, windows: Sequence[_Window]) -> tuple[list[Array], int]:
        parts = list(self.spread(lambda window: self._window_sums(i, found, window), windows))
        return [sums for sums, _ in parts], sum(bad for _, bad in parts)

    def _window_sums(self, i: int, found: Found, window: _Window) -> tuple[Array, int]:
        """Sums by row, and how many entries are no precision; of a task, those count as what adds
        nothing.
        """
        source, config, count = self.plan.models[found.model].precision, self.plan.config, 0
        assert source is not None
        raw, dtype = (
            self.reader().raw(source, found.name, window.start, window.stop),
            source.specs[found.name].dtype,
        )
        stored = (
            raw.view(np.uint16)
            if dtype == "BF16"
            else decode(raw, dtype).astype(np.float32, copy=False)
        )
        if config.on_bad == "base" or config.pool is not None:  # else the second pass sees them
            values = decode(raw, dtype).astype(np.float32, copy=False)
            if not (values.min() >= 0 and values.max() < np.inf):
                bad = no_precision(values)
                count = int(np.count_nonzero(bad))
                stored = np.where(bad, np.float32(self.plan.weighings[i].contained), values)
        sums = np.zeros((window.stop - window.start) // window.row)
        row_sums(stored, window.row, sums, fused=self.fused)
        return sums, count

    def _facts(self, step: Step, known: Known) -> Facts:
        plan, reduction = self.plan, self.plan.method.reduction
        if reduction is None:
            return self._finish(np.zeros(0))
        if plan.settings.get("scope", reduction.scope) == "model":
            return self._facts_of_model
        return self._finish(self._totals(reduction, [(step, known)]))

    @cached_property
    def _facts_of_model(self) -> Facts:
        reduction = self.plan.method.reduction
        assert reduction is not None
        steps = [(s, self._precisions(s)) for s in self.plan.steps if s.copied is None]
        return self._finish(self._totals(reduction, steps))

    def _finish(self, totals: Array) -> Facts:
        plan = self.plan
        if plan.method.facts is None:
            return None
        counts = tuple(w.count or 1.0 for w in plan.weighings[plan.base is not None :])
        return plan.method.facts(FactInputs(plan.settings, plan.guard, counts, totals))

    def _totals(self, reduction: Reduction, steps: Sequence[tuple[Step, Known]]) -> Array:
        count = reduction.count(len(self.plan.tasks))
        windows = [
            (step, known, a, min(a + WINDOW, step.merged))
            for step, known in steps
            for a in range(0, step.merged, WINDOW)
        ]
        # Counts may be added in any order, each thread its own; sums of floats may not.
        counted: dict[int, Array] = {}

        def measure(window: tuple[Step, Known, int, int]) -> Array | None:
            step, known, start, stop = window
            chunk = self.reader().chunk(step, known, start, stop)
            if self.plan.config.on_bad == "base":
                mend_means(chunk.means)
            numbers = numbers_of(self.plan, step, ())
            if reduction.kind == "histogram":
                into = counted.setdefault(threading.get_ident(), np.zeros((count, BINS), np.int64))
            else:
                into = np.zeros(count)
            first_pass(kind_of(self.plan, step), fused=self.fused)(chunk, numbers, into)
            return into if reduction.kind == "sum" else None

        totals = np.zeros(count)
        for sums in self.spread(measure, windows):
            if sums is not None:
                totals += sums
        if reduction.kind == "sum":
            return totals
        return sum(counted.values(), np.zeros((count, BINS), np.int64))


def _added(sums: Sequence[Array]) -> float:
    total = 0.0
    for part in sums:
        for x in part:
            total += float(x)
    return total
