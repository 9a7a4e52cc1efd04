"""Carry out the units of a merge on threads."""

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any

from mergekit_bayes.kernels import can_fuse
from mergekit_bayes.merge.journal import Journal
from mergekit_bayes.merge.output import Output
from mergekit_bayes.merge.work import Worker
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.chunks import Known, Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.units import Unit

# Entries read, combined and written at a time. The compiled pass works in blocks of its own;
# numpy's temporaries should stay in the second cache.
CHUNK, PLAIN_CHUNK = 1 << 18, 1 << 16
# Below this many entries to merge, loading numba costs more than it saves.
WORTH_FUSING = 1 << 25
AHEAD = 4  # units a thread that are under way
Progress = Callable[[int, int], None]


class Pool:
    """Does units on threads, each with its own buffers."""

    def __init__(
        self,
        plan: MergePlan,
        chunk: int | None,
        threads: int | None,
        fused: bool | None,
        *,
        sync: bool,
        progress: Progress | None,
    ) -> None:
        self.plan, self.sync, self.progress = plan, sync, progress
        self.threads = threads or min(4, _cores())
        entries = sum(s.merged for s in plan.steps)
        self.fused = (entries >= WORTH_FUSING if fused is None else fused) and can_fuse(
            len(plan.models)
        )
        self.chunk = chunk or (CHUNK if self.fused else PLAIN_CHUNK)
        self._local = threading.local()
        self._writing = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def do(
        self, units: Sequence[Unit], done: Collection[int], output: Output, journal: Journal
    ) -> None:
        """Do those `units` that are not `done`."""
        sizes = [s.spec.nbytes / max(s.spec.size, 1) for s in self.plan.steps]
        total = sum((u.stop - u.start) * sizes[u.step] for u in units)
        written = sum((u.stop - u.start) * sizes[u.step] for u in units if u.id in done)
        if self.sync:
            output.sync_names()
        with ThreadPoolExecutor(self.threads) as pool:
            self._pool = pool
            try:
                for future in self._futures(
                    [u for u in units if u.id not in done], output, journal
                ):
                    unit = future.result()
                    written += (unit.stop - unit.start) * sizes[unit.step]
                    if self.progress is not None:
                        self.progress(int(written), int(total))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _futures(
        self, units: Sequence[Unit], output: Output, journal: Journal
    ) -> Iterator[Future[Unit]]:
        """As they are done. Few wait at a time: an error is heard of before the first pass of all
        other steps.
        """
        assert self._pool is not None
        pending: set[Future[Unit]] = set()
        for step, known, batch in self._batches(units):
            for unit in batch:
                pending.add(self._pool.submit(self._one, step, known, unit, output, journal))
                if len(pending) > AHEAD * self.threads:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from finished
            finished, pending = wait(pending, timeout=0)
            yield from finished
        yield from as_completed(pending)

    def _batches(self, units: Sequence[Unit]) -> Iterator[tuple[Step, Known, list[Unit]]]:
        first = FirstPass(self.plan, self._reader, self._spread, fused=self.fused)
        by_step: dict[int, list[Unit]] = {}
        for unit in units:
            by_step.setdefault(unit.step, []).append(unit)
        for k, batch in by_step.items():
            yield self.plan.steps[k], first.known(self.plan.steps[k]), batch

    def _spread(self, act: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        assert self._pool is not None
        return self._pool.map(act, items)

    def _reader(self) -> Reader:
        if not hasattr(self._local, "reader"):
            self._local.reader = Reader(self.plan)
            self._local.worker = Worker(self.plan, self._local.reader, self.chunk, fused=self.fused)
        reader: Reader = self._local.reader
        return reader

    def _one(self, step: Step, known: Known, unit: Unit, output: Output, journal: Journal) -> Unit:
        self._reader()
        tally = self._local.worker.run(unit, known, output.sinks(step.name))
        with self._writing:
            if self.sync:
                output.sync()
            journal.add(unit.id, tally.to_json())
        return unit


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
