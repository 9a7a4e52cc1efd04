"""The work of a merge in units: each is a range of one tensor, read, combined and written chunk by
chunk.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, overflowed
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, MERGEABLE
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.kernels import elementwise
from mergekit_bayes.kernels.base import (
    Array,
    Chunk,
    Kind,
    Numbers,
    Pass,
    Tally,
    likelihood_precision,
    own_posterior,
)
from mergekit_bayes.kernels.plain import plain_pass
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.posterior.forms import spread
from mergekit_bayes.stream.bad_entries import no_mean, no_precision, refuse_bad, unchanged
from mergekit_bayes.stream.chunks import Known, Reader, kind_of, numbers_of, real_of
from mergekit_bayes.stream.units import Unit


@dataclass
class UnitTally:
    """What happened in a unit; its JSON is the unit's line in the journal.

    Attributes:
        entries: Merged, not copied.
        stored: Per model, the sum of its stored (or pooled) precisions.
        mended: Per model, entries that `--on-bad base` replaced.
    """

    entries: int = 0
    changed: int = 0
    lost: int = 0
    guarded: int = 0
    multiplier: float = 0.0
    stored: list[float] = field(default_factory=list)
    mended: list[int] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        self.entries += tally.entries
        self.changed += tally.changed
        self.lost += tally.lost
        self.guarded += tally.guarded
        self.multiplier = max(self.multiplier, tally.multiplier)
        sums = self.stored or [0.0] * tally.models
        self.stored = [a + float(b) for a, b in zip(sums, tally.stored, strict=True)]

    def mend(self, models: int, i: int, count: int) -> None:
        self.mended = self.mended or [0] * models
        self.mended[i] += count

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Sinks(NamedTuple):
    """Where a tensor's mean and precision go."""

    mean: SafetensorsSink
    precision: SafetensorsSink | None


class Worker:
    """Does units; one a thread."""

    def __init__(self, plan: MergePlan, reader: Reader, chunk: int, *, fused: bool) -> None:
        self.plan, self.reader, self.size, self.fused = plan, reader, chunk, fused
        self._passes: dict[Kind, Pass] = {}

    def run(self, unit: Unit, known: Known, sinks: Sinks) -> UnitTally:
        """Read, combine and write one unit.

        Raises `CheckpointError` or `PrecisionError` for an entry that cannot be merged.
        """
        step, tally = self.plan.steps[unit.step], UnitTally()
        if unit.start == 0:
            for i, count in enumerate(known.bad):
                tally.mend(len(known.bad), i, count)
            if sinks.precision is not None and step.precision_shape != step.spec.shape:
                self._write_pooled(step, known, sinks.precision)
        at = unit.start
        while at < unit.stop:
            end = min(at + self.size, unit.stop)
            if at < step.merged:
                end = min(end, step.merged)
                self._merge(step, known, at, end, sinks, tally)
            else:
                self._copy(step, known, at, end, sinks)
            at = end
        return tally

    def _merge(
        self, step: Step, known: Known, start: int, stop: int, sinks: Sinks, tally: UnitTally
    ) -> None:
        kind = kind_of(self.plan, step)
        if kind not in self._passes:
            self._passes[kind] = elementwise(kind, fused=self.fused)
        numbers = numbers_of(self.plan, step, known.facts)
        chunk = self.reader.chunk(step, known, start, stop)
        counts = Tally(len(chunk.means))
        self._passes[kind](chunk, numbers, counts)
        if counts.bad_means.any() or counts.bad_precisions.any():
            chunk = self._mend(step, known, chunk, numbers, start, tally)
            counts = Tally(len(chunk.means))
            self._passes[kind](chunk, numbers, counts)
        data = chunk.mean.view(np.uint8).data
        if step.spec.dtype not in _AS_COMPUTED:
            data = encode(chunk.mean, step.spec.dtype)
            self._count_lost(step, chunk, data, counts)
        if counts.bad or not _is_finite(data, step.spec.dtype):
            self._refuse(step)
        tally.add(counts)
        item = ITEM_SIZE[step.spec.dtype]
        sinks.mean.write_bytes(step.name, start * item, data)
        if sinks.precision is not None and step.precision_shape == step.spec.shape:
            sinks.precision.write_bytes(step.name, start * 4, chunk.precision.view(np.uint8).data)

    def _count_lost(self, step: Step, chunk: Chunk, data: memoryview, counts: Tally) -> None:
        """A dtype that the pass does not write itself: compare after the rounding that really
        happened.
        """
        if self.plan.base is None or not counts.changed:
            return
        means = [decode(m, "BF16") if m.dtype == np.uint16 else m for m in chunk.means]
        moved = np.zeros(chunk.mean.size, bool)
        for scale, mean in zip(step.scales, means[1:], strict=True):
            moved |= (mean != means[0]) & (scale != 0)
        written, before = (
            decode(np.frombuffer(data, np.uint8), step.spec.dtype),
            encode(means[0], step.spec.dtype),
        )
        same = written == decode(np.frombuffer(before, np.uint8), step.spec.dtype)
        counts.lost = int(np.count_nonzero(moved & same))

    def _mend(
        self, step: Step, known: Known, chunk: Chunk, numbers: Numbers, start: int, tally: UnitTally
    ) -> Chunk:
        """Bad entries of a task take the base's value, as if it had learnt nothing there; or an
        error names them.
        """
        plan = self.plan
        means = [decode(m, "BF16") if m.dtype == np.uint16 else m for m in chunk.means]
        weighed = chunk.precisions if plan.method.needs_precision else ()
        stored = [decode(p, "BF16") if p.dtype == np.uint16 else p.copy() for p in weighed]
        extras = [spread(e, step.row, start, start + chunk.mean.size) for e in known.extras]
        of_base: Any = 0
        if stored:
            of_base = likelihood_precision(numbers, 0, stored[0], 0, extras[0])
        for i, mean in enumerate(means):
            bad = no_mean(mean)
            if stored:
                bad |= no_precision(stored[i])
            if not bad.any():
                continue
            if plan.config.on_bad == "error" or i == 0:
                refuse_bad(plan, step, i)
                raise AssertionError("a bad entry was counted but not found")
            tally.mend(len(means), i, int(np.count_nonzero(bad)))
            chunk.means[i][bad] = chunk.means[0][bad]
            if stored:
                stored[i][bad] = np.broadcast_to(
                    unchanged(numbers, i, of_base, extras[i]), bad.shape
                )[bad]
        return chunk._replace(precisions=np.stack(stored).astype(np.float32)) if stored else chunk

    def _refuse(self, step: Step) -> None:
        """Raise `CheckpointError` or `PrecisionError` for a merged entry that is not finite: what
        is to blame.
        """
        for i in range(len(step.sources) if step.copied is None else 1):
            if self.plan.config.on_bad == "error" or i == 0:
                refuse_bad(self.plan, step, i)
        if step.spec.dtype in ("F16", "F8_E4M3", "F8_E5M2"):
            raise CheckpointError(
                f"'{step.name}': the merge does not fit {step.spec.dtype}. Write it as --dtype "
                "BF16 or F32."
            )
        raise CheckpointError(
            f"'{step.name}': the merge is not finite. Are its precisions on the same scale?"
        )

    def _copy(self, step: Step, known: Known, start: int, stop: int, sinks: Sinks) -> None:
        donor, name = self.plan.donor.mean, step.sources[0].name
        raw = self.reader.raw(donor, name, start, stop)
        stored, written = donor.specs[name].dtype, step.spec.dtype
        data = raw.data
        if stored != written and stored in MERGEABLE:
            values = decode(raw, stored)
            data = encode(values, written)
            if no_mean(values).any() or overflowed(data, written):
                self._refuse(step)
        sinks.mean.write_bytes(step.name, start * ITEM_SIZE[written], data)
        if sinks.precision is not None and step.precision_shape == step.spec.shape:
            precision = self._donors(step, known, start, stop)
            self._check_donors(step, precision)
            sinks.precision.write_bytes(step.name, start * 4, encode(precision, "F32"))

    def _donors(self, step: Step, known: Known, start: int, stop: int) -> Array:
        """The donor's own precision, counted as in the rest of the merge."""
        assert step.precisions is not None
        found = step.precisions[0]
        if 0 in known.pooled or found is None:
            stored = spread(known.pooled[0], step.row, start, stop)
        else:
            source = self.plan.donor.precision
            assert source is not None
            stored = decode(
                self.reader.raw(source, found.name, start, stop), source.specs[found.name].dtype
            )
        extras = known.extras[0].astype(np.float32)
        return self._alone(
            step,
            np.asarray(stored, np.float32),
            spread(extras, step.row, start, stop),
            stop - start,
        )

    def _alone(self, step: Step, stored: Array, extra: Array, n: int) -> Array:
        self._check_donors(step, stored)
        numbers = numbers_of(self.plan, step, ())
        zero = np.float32(0)
        h = likelihood_precision(numbers, 0, stored, zero, extra)
        precision = own_posterior(zero, numbers.priors[0], h).precision
        return np.broadcast_to(precision, (n,)).astype(np.float32)

    def _write_pooled(self, step: Step, known: Known, sink: SafetensorsSink) -> None:
        """A precision of one number, or one a row, from those of the models: by the method itself,
        row by row.
        """
        plan, rows = self.plan, int(np.prod(step.precision_shape))
        extras = [spread(e, 1, 0, rows) for e in known.extras]
        stored = known.pooled.get(0, np.zeros(1, np.float32))
        result = self._alone(step, stored, extras[0].astype(np.float32), rows)
        merged = rows if step.merged == step.spec.size else step.merged // step.row
        if step.copied is None and merged:
            real, numbers, n = real_of(step), numbers_of(plan, step, known.facts), len(plan.models)
            numbers_by_row = [
                np.broadcast_to(spread(known.pooled[i], 1, 0, merged), merged) for i in range(n)
            ]
            kept = np.stack(numbers_by_row).astype(np.float32)
            added = np.stack([np.broadcast_to(e[:merged], merged) for e in extras]).astype(real)
            if plan.config.on_bad == "base":
                of_base = likelihood_precision(numbers, 0, kept[0], 0, added[0])
                for i in range(1, n):
                    kept[i] = np.where(
                        no_precision(kept[i]), unchanged(numbers, i, of_base, added[i]), kept[i]
                    )
            chunk = Chunk(
                np.zeros(kept.shape, real),
                kept,
                np.ascontiguousarray(added),
                1,
                1,
                0,
                np.zeros(merged, real),
                np.zeros(merged, np.float32),
            )
            plain_pass(kind_of(plan, step))(chunk, numbers, Tally(n))
            result[:merged] = chunk.precision
        self._check_donors(step, result)
        sink.write_bytes(step.name, 0, encode(result, "F32"))

    def _check_donors(self, step: Step, precision: Array) -> None:
        """What is copied of the donor's precision must be one; of a merged entry, the pass has seen
        to it.
        """
        if no_precision(precision).any():
            self._refuse(step)


_AS_COMPUTED = ("BF16", "F32", "F64")


def _is_finite(data: memoryview, dtype: str) -> bool:
    """Whether dtypes of a small range hold what was put there; the pass has looked at the others
    itself.
    """
    return dtype in _AS_COMPUTED or not overflowed(data, dtype)
