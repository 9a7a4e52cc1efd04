"""From a plan's step and a range of entries to the arrays of a pass."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_bayes.checkpoint.codec import decode
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, CheckpointSource
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.kernels.base import Array, Chunk, Kind, Numbers, task_key
from mergekit_bayes.methods.base import Facts
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.plan.steps import Found
from mergekit_bayes.posterior.forms import spread


@dataclass
class Known:
    """What the first pass found out about one tensor.

    Attributes:
        pooled: Of each model whose precision is one number, or one a row: those numbers, (1,) or
            (rows,).
        extras: (models, 1) or (models, rows): added to H by row.
        facts: The method's numbers.
        bad: Per model, entries without a precision that pooling left out.
    """

    pooled: dict[int, Array]
    extras: Array
    facts: Facts = None
    bad: tuple[int, ...] = ()


def kind_of(plan: MergePlan, step: Step) -> Kind:
    """Which pass a step needs."""
    weighs, has_base = plan.method.needs_precision, plan.base is not None
    return Kind(
        method=plan.method,
        weighs=weighs,
        has_base=has_base,
        anchored=any(w.pull.precision is not None for w in plan.weighings[has_base:]),
        # A merge among the models may be a removal itself.
        removes=plan.method.unguarded_precision is not None
        and (min(step.scales, default=0.0) < 0 or not all(w.reshape for w in plan.weighings)),
    )


def real_of(step: Step) -> type[np.float32] | type[np.float64]:
    """What a step is computed in."""
    return np.float64 if step.spec.dtype == "F64" else np.float32


def numbers_of(plan: MergePlan, step: Step, facts: Facts) -> Numbers:
    """The constants of a step."""
    weighings = plan.weighings
    of_base = weighings[0].gain
    first = len(plan.models) - len(step.scales)
    keys: tuple[np.uint64, ...] = ()
    if plan.method.random:
        seed = int(plan.settings["seed"])
        keys = tuple(task_key(seed, step.name, m.identity) for m in plan.models[first:])
    return Numbers(
        scales=step.scales,
        facts=facts,
        gains=tuple(w.gain for w in weighings),
        contained=tuple(
            w.contained + (0.0 if w.contains_base is None else DELTA_0) for w in weighings
        ),
        base_shares=tuple(
            0.0 if w.contains_base is None else w.contains_base / of_base for w in weighings
        ),
        floors=tuple(0.0 if w.reshape else -math.inf for w in weighings),
        priors=tuple(w.prior + DELTA_0 for w in weighings),
        anchors=tuple(-1.0 if w.pull.precision is None else w.pull.precision for w in weighings),
        decays=tuple(w.pull.decay for w in weighings),
        keys=keys,
    ).cast(real_of(step))


class Reader:
    """Reads chunks into buffers that it keeps; one a thread."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self._buffers: dict[str, Array] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of its own for each purpose, reused from chunk to chunk; what it holds is
        anything.
        """
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if purpose not in self._buffers or self._buffers[purpose].size < nbytes:
            self._buffers[purpose] = np.empty(nbytes, np.uint8)
        array: Array = self._buffers[purpose][:nbytes].view(dtype).reshape(shape)
        return array

    def raw(self, source: CheckpointSource, name: str, start: int, stop: int) -> Array:
        """Entries `start:stop` as bytes."""
        item = ITEM_SIZE[source.specs[name].dtype]
        buffer = self.take("raw", ((stop - start) * item,), np.uint8)
        source.read_bytes(name, start * item, buffer.data)
        return buffer

    def chunk(self, step: Step, known: Known, start: int, stop: int) -> Chunk:
        """Entries `start:stop` of a step, all of them to be merged."""
        plan, n, real = self.plan, stop - start, real_of(step)
        sources = [(plan.models[s.model].mean, s.name) for s in step.sources]
        kinds = {source.specs[name].dtype for source, name in sources}
        means = self.take(
            "means",
            (len(sources), n),
            np.uint16 if kinds == {"BF16"} and real == np.float32 else real,
        )
        for row, (source, name) in zip(means, sources, strict=True):
            self._fill(row, source, name, start, stop)
        written = np.uint16 if step.spec.dtype == "BF16" else real
        mean = self.take("mean", (n,), written)
        if not plan.method.needs_precision:
            none = np.zeros((len(sources), 0), np.float32)
            return Chunk(means, none, np.zeros((len(sources), 1), real), n, n, start, mean, none[0])
        assert step.precisions is not None
        precisions = self._precisions(step.precisions, known, step.row, start, stop)
        extras, first, row_size = _rows(known.extras, step.row, start, stop)
        precision = self.take("precision", (n,), np.float32)
        return Chunk(
            means, precisions, extras.astype(real), first, row_size, start, mean, precision
        )

    def _precisions(
        self, names: tuple[Found | None, ...], known: Known, row: int, start: int, stop: int
    ) -> Array:
        files: list[tuple[CheckpointSource, str] | None] = []
        for i, found in enumerate(names):
            source = self.plan.models[found.model].precision if found is not None else None
            files.append(
                (source, found.name)
                if source is not None and found is not None and i not in known.pooled
                else None
            )
        whole = all(f is not None and f[0].specs[f[1]].dtype == "BF16" for f in files)
        result = self.take(
            "precisions", (len(names), stop - start), np.uint16 if whole else np.float32
        )
        for i, file in enumerate(files):
            if file is not None:
                self._fill(result[i], *file, start, stop)
            else:
                result[i] = spread(known.pooled[i], row, start, stop)
        return result

    def _fill(
        self, into: Array, source: CheckpointSource, name: str, start: int, stop: int
    ) -> None:
        dtype = source.specs[name].dtype
        if (dtype, into.dtype.str) in _AS_STORED:
            source.read_bytes(name, start * ITEM_SIZE[dtype], into.view(np.uint8).data)
        else:
            with np.errstate(over="ignore"):  # an F64 beyond F32 is infinite here, and refused
                into[:] = decode(self.raw(source, name, start, stop), dtype)


_AS_STORED = {("BF16", "<u2"), ("F32", "<f4"), ("F64", "<f8")}


def _rows(extras: Array, row: int, start: int, stop: int) -> tuple[Array, int, int]:
    """The extras of a chunk, entries left in its first row, and entries of the others."""
    if extras.shape[1] == 1:
        return extras, stop - start, stop - start
    return (
        np.ascontiguousarray(extras[:, start // row : (stop - 1) // row + 1]),
        row - start % row,
        row,
    )
