"""The work of a merge in units: each is a range of one tensor, read, combined and written chunk by chunk."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.kernels import Array, Chunk, Kind, Numbers, Pass, Tally, elementwise
from mergekit_bayes.kernels.base import alone, likelihood
from mergekit_bayes.kernels.plain import plain_pass
from mergekit_bayes.merge.chunks import Known, Reader, kind_of, numbers_of, real_of, spread
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.posterior import CheckpointSource
from mergekit_bayes.tensors import ITEM_SIZE, MERGEABLE, SafetensorsSink, chunks, decode, encode, read_chunk

UNIT = 1 << 22  # entries: what a killed merge does again at most, a thread


class Unit(NamedTuple):
    """Entries `start:stop` of a step; `position` is its place in the whole, in [0, 1)."""

    id: int
    step: int
    start: int
    stop: int
    position: float


def units_of(plan: MergePlan) -> list[Unit]:
    """All units of a plan, in order."""
    whole = max(1, sum(s.spec.size for s in plan.steps))
    units: list[Unit] = []
    done = 0
    for k, step in enumerate(plan.steps):
        for start in range(0, step.spec.size, UNIT):
            stop = min(start + UNIT, step.spec.size)
            units.append(Unit(len(units), k, start, stop, (done + start) / whole))
        done += step.spec.size
    return units


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
        if unit.start == 0 and sinks.precision is not None and step.precision_shape != step.spec.shape:
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

    def _merge(self, step: Step, known: Known, start: int, stop: int, sinks: Sinks, tally: UnitTally) -> None:
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
        """A dtype that the pass does not write itself: compare after the rounding that really happened."""
        if self.plan.base is None or not counts.changed:
            return
        means = [decode(m, "BF16") if m.dtype == np.uint16 else m for m in chunk.means]
        moved = np.zeros(chunk.mean.size, bool)
        for scale, mean in zip(step.scales, means[1:], strict=True):
            moved |= (mean != means[0]) & (scale != 0)
        written, before = decode(np.frombuffer(data, np.uint8), step.spec.dtype), encode(means[0], step.spec.dtype)
        same = written == decode(np.frombuffer(before, np.uint8), step.spec.dtype)
        counts.lost = int(np.count_nonzero(moved & same))

    def _mend(self, step: Step, known: Known, chunk: Chunk, numbers: Numbers, start: int, tally: UnitTally) -> Chunk:
        """Bad entries of a task take the base's value, as if it had learnt nothing there; or an error names them."""
        plan = self.plan
        means = [decode(m, "BF16") if m.dtype == np.uint16 else m for m in chunk.means]
        stored = [decode(p, "BF16") if p.dtype == np.uint16 else p.copy() for p in chunk.precisions]
        for i, mean in enumerate(means):
            bad = ~np.isfinite(mean)
            if stored[i].size:
                bad |= ~(np.isfinite(stored[i]) & (stored[i] >= 0))
            if not bad.any():
                continue
            if plan.config.on_bad == "error" or i == 0:
                self._name_bad(step, i)
                raise AssertionError("a bad entry was counted but not found")
            tally.mend(len(means), i, int(np.count_nonzero(bad)))
            chunk.means[i][bad] = chunk.means[0][bad]
            if stored[i].size:
                of_base = stored[0] * numbers.gains[0] - numbers.gains[0] * numbers.insides[0]
                stored[i][bad] = (numbers.insides[i] + numbers.shares[i] * of_base)[bad] if numbers.shares[i] else (
                    numbers.insides[i])  # fmt: skip
        if not chunk.precisions.size:
            return chunk
        return chunk._replace(precisions=np.stack(stored).astype(np.float32))

    def _name_bad(self, step: Step, i: int) -> None:
        """Count a tensor's bad entries and raise."""
        plan, source = self.plan, step.sources[i]
        model = plan.models[source.model]
        way_out = "Make it anew" + (
            ", or take the base's values there with --on-bad base." if i > 0 and plan.base is not None else "."
        )
        _scan(
            model.mean, source.name, step, lambda x: ~np.isfinite(x), CheckpointError,
            f"{model.mean.where(source.name)}: '{source.name}'", f"Did its training diverge? {way_out}",
        )  # fmt: skip
        found = step.precisions[i] if step.precisions else None
        if found is not None:
            precision = plan.models[found.model].precision
            assert precision is not None
            _scan(
                precision, found.name, step, lambda x: ~(np.isfinite(x) & (x >= 0)), PrecisionError,
                f"the precision of '{found.name}' in {precision.where(found.name)}",
                f"A precision is finite and not negative. {way_out}",
            )  # fmt: skip

    def _refuse(self, step: Step) -> None:
        if step.spec.dtype in ("F16", "F8_E4M3", "F8_E5M2"):
            raise CheckpointError(
                f"'{step.name}': the merge does not fit {step.spec.dtype}. Write it as --dtype BF16 or F32."
            )
        raise CheckpointError(f"'{step.name}': the merge is not finite. Are its precisions on the same scale?")

    def _copy(self, step: Step, known: Known, start: int, stop: int, sinks: Sinks) -> None:
        donor, name = self.plan.donor.mean, step.sources[0].name
        raw = self.reader.raw(donor, name, start, stop)
        stored, written = donor.specs[name].dtype, step.spec.dtype
        data = raw.data
        if stored != written and stored in MERGEABLE:
            data = encode(decode(raw, stored), written)
            if not _is_finite(data, written):
                self._refuse(step)
        sinks.mean.write_bytes(step.name, start * ITEM_SIZE[written], data)
        if sinks.precision is not None and step.precision_shape == step.spec.shape:
            sinks.precision.write_bytes(step.name, start * 4, encode(self._donors(step, known, start, stop), "F32"))

    def _donors(self, step: Step, known: Known, start: int, stop: int) -> Array:
        """The donor's own precision, counted as in the rest of the merge."""
        assert step.precisions is not None
        found = step.precisions[0]
        if 0 in known.pooled or found is None:
            stored = spread(known.pooled[0], step.row, start, stop)
        else:
            source = self.plan.donor.precision
            assert source is not None
            stored = decode(self.reader.raw(source, found.name, start, stop), source.specs[found.name].dtype)
        extras = known.extras[0].astype(np.float32)
        return self._alone(step, np.asarray(stored, np.float32), spread(extras, step.row, start, stop), stop - start)

    def _alone(self, step: Step, stored: Array, extra: Array, n: int) -> Array:
        numbers = numbers_of(self.plan, step, ())
        zero = np.float32(0)
        h = likelihood(stored, numbers.gains[0], numbers.insides[0], zero, zero, extra)
        return np.broadcast_to(alone(zero, numbers.priors[0], h).precision, (n,)).astype(np.float32)

    def _write_pooled(self, step: Step, known: Known, sink: SafetensorsSink) -> None:
        """A precision of one number, or one a row, from those of the models: by the method itself, row by row."""
        rows = int(np.prod(step.precision_shape))
        kept = np.broadcast_to(known.pooled[0] if 0 in known.pooled else np.zeros(1), (rows,)).astype(np.float32)
        extras = np.broadcast_to(known.extras, (len(self.plan.models), max(rows, known.extras.shape[1])))[:, :rows]
        result = self._alone(step, kept, extras[0].astype(np.float32), rows)
        merged = rows if step.merged == step.spec.size else step.merged // step.row
        if step.copied is None and merged:
            stored = np.stack([np.broadcast_to(known.pooled[i], (max(rows, known.pooled[i].size),))[:merged]
                               for i in range(len(self.plan.models))]).astype(np.float32)  # fmt: skip
            real = real_of(step)
            means = np.zeros(stored.shape, real)
            chunk = Chunk(means, stored, np.ascontiguousarray(extras[:, :merged], real), 1, 1, 0,
                          np.zeros(merged, real), np.zeros(merged, np.float32))  # fmt: skip
            plain_pass(kind_of(self.plan, step))(chunk, numbers_of(self.plan, step, known.facts), Tally(len(means)))
            result = np.concatenate([chunk.precision, result[merged:]])
        sink.write_bytes(step.name, 0, encode(result, "F32"))


_AS_COMPUTED = ("BF16", "F32", "F64")


def _is_finite(data: memoryview, dtype: str) -> bool:
    """Whether dtypes of a small range hold what was put there; the pass has looked at the others itself."""
    if dtype in _AS_COMPUTED:
        return True
    return bool(np.isfinite(decode(np.frombuffer(data, np.uint8), dtype)).all())


def _scan(
    source: CheckpointSource, name: str, step: Step, is_bad: Any, error: type[Exception], what: str, way_out: str
) -> None:
    count, first = 0, None
    for start, stop in chunks(source.specs[name], 1 << 18):
        values = read_chunk(source, name, start, stop)
        bad = is_bad(values)
        count += int(np.count_nonzero(bad))
        if first is None and bad.any():
            at = int(np.argmax(bad))
            first = (values[at], start + at)
    if first is not None:
        more = f", the first of {count:,} bad entries" if count > 1 else ""
        raise error(f"{what} is {first[0]} at flat index {first[1]}{more}. {way_out}")
