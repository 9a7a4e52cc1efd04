"""Stored precisions of one tensor as comparable likelihood precisions, chunk by chunk."""

from typing import Any

import numpy as np

from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.plan import MergePlan, Step, Weighing
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.tensors import Array, TensorSource, chunks, read_chunk


class Likelihoods:
    """The counted likelihood precisions of one tensor, chunk by chunk.

    Pooling and shrinking need a mean over the tensor or its rows first: one more pass over the precision.
    """

    def __init__(self, plan: MergePlan, step: Step, chunk: int) -> None:
        assert step.precisions is not None
        self.plan, self.step, self.names = plan, step, step.precisions
        self.row = step.spec.size // step.spec.shape[0] if step.spec.shape and step.spec.size else 1
        self.pooled: dict[int, Array] = {}
        self.shrunk: dict[int, Array] = {}
        pool, shrink = plan.config.pool, plan.shrink
        for i, weighing in enumerate(plan.weighings):
            if self.names[i] is None:
                continue
            by_row = pool == "row"
            if pool is not None:
                self.pooled[i] = self._means(i, by_row=by_row, chunk=chunk)
            if shrink is not None and shrink.amount and weighing.reshape:
                self.shrunk[i] = self._means(i, by_row=shrink.by_row, chunk=chunk)

    def read(self, i: int, start: int, stop: int) -> Array:
        """H of model `i`: what its data added, counted, pooled and shrunk."""
        weighing = self.plan.weighings[i]
        stored = self._stored(i, start, stop)
        if weighing.contains_base is None:
            likelihood = weighing.gain * (stored - weighing.contained)
        else:
            likelihood = weighing.gain * (stored - self._base_inside(weighing, start, stop))
        if i in self.shrunk:
            assert self.plan.shrink is not None
            mean = self._spread(self.shrunk[i], start, stop)
            likelihood = likelihood + self.plan.shrink.amount * weighing.gain * (mean - weighing.contained)
        elif self.names[i] is None and self.plan.shrink is not None and weighing.reshape:
            likelihood = likelihood * (1 + self.plan.shrink.amount)
        return likelihood

    def prior_precision(self, i: int, start: int, stop: int) -> Any:
        """What is added to H without being counted: the model's scalar prior and delta_0."""
        return np.float32(self.plan.weighings[i].prior + DELTA_0)

    def _base_inside(self, weighing: Weighing, start: int, stop: int) -> Array:
        """The base posterior inside a merge: today's base, counted as it was then."""
        now = self.plan.weighings[0]
        assert weighing.contains_base is not None
        likelihood = self.read(0, start, stop) * np.float32(weighing.contains_base / now.gain)
        return np.float32(weighing.contained + DELTA_0) + likelihood

    def _stored(self, i: int, start: int, stop: int) -> Array:
        model, name = self.plan.models[i], self.names[i]
        if name is None:
            return np.full(stop - start, model.isotropic, np.float32)
        if i in self.pooled:
            return self._spread(self.pooled[i], start, stop)
        assert model.precision is not None
        return _read_precision(model, model.precision, name, start, stop)

    def _spread(self, means: Array, start: int, stop: int) -> Array:
        if means.size == 1:
            return np.full(stop - start, means[0], np.float32)
        rows = np.arange(start, stop) // self.row
        return means[rows].astype(np.float32)

    def _means(self, i: int, *, by_row: bool, chunk: int) -> Array:
        """Mean of a stored precision over the tensor, or one per row (first axis); float64 sums."""
        model, name, spec = self.plan.models[i], self.names[i], self.step.spec
        assert model.precision is not None
        assert name is not None
        rows = spec.shape[0] if by_row and spec.shape else 1
        per_row = spec.size // max(rows, 1)
        sums = np.zeros(rows)
        for start, stop in chunks(spec, chunk):
            values = _read_precision(model, model.precision, name, start, stop).astype(np.float64)
            if rows == 1:
                sums[0] += values.sum()
            else:
                sums += np.bincount(np.arange(start, stop) // per_row, values, minlength=rows)
        return sums / max(per_row, 1)


def _read_precision(model: Posterior, source: TensorSource, name: str, start: int, stop: int) -> Array:
    stored = read_chunk(source, name, start, stop)
    good = np.isfinite(stored) & (stored >= 0)
    if not good.all():
        at = start + int(np.argmin(good))
        raise PrecisionError(
            f"the precision of '{name}' in {source.where(name)} is {stored[at - start]} at flat index {at}; "
            "a precision is finite and not negative. Make it anew."
        )
    return stored.astype(np.float32, copy=False)
