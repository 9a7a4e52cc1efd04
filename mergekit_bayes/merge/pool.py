"""Carry out the units of a merge on threads."""

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

from mergekit_bayes.kernels import can_fuse
from mergekit_bayes.merge.journal import Journal
from mergekit_bayes.merge.output import Output
from mergekit_bayes.merge.work import Worker
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.records import Progress
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.units import Unit

# Entries read and combined at a time where nothing is written. The compiled pass works in blocks of
# its own; numpy's temporaries should stay in the second-level cache.
CHUNK, PLAIN_CHUNK = 1 << 18, 1 << 16
# Below this many entries to merge, loading numba costs more than it saves.
WORTH_FUSING = 1 << 25
AHEAD = 4  # units per thread that are submitted at a time
T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Carries out units on threads, each with its own buffers.

    Args:
        plan: The merge.
        chunk: Entries read, combined and written at a time; None for `entries_at_a_time`, or
            `PLAIN_CHUNK` in numpy.
        threads: How many threads; None for one per core, at most four.
        fused: Whether to use the compiled passes; None where they are worth their loading time.
        sync: Whether to wait for the disk after every unit.
        progress: Called with (bytes of the mean written, bytes of the mean in all).
    """

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
        self.plan, self.sync = plan, sync
        self._progress = progress
        self._threads = threads or default_threads()
        entries = sum(step.merged for step in plan.steps)
        is_worth_it = entries >= WORTH_FUSING if fused is None else fused
        self._fused = is_worth_it and can_fuse(len(plan.inputs))
        self._chunk = chunk if self._fused else chunk or PLAIN_CHUNK
        self._local = threading.local()
        self._writing = threading.Lock()

    def run(
        self, units: Sequence[Unit], done: Collection[int], output: Output, journal: Journal
    ) -> None:
        """Carry out those `units` whose number is not in `done`.

        Args:
            units: The work.
            done: Numbers of the units that an earlier run has written.
            output: Where tensors are written.
            journal: Where a line is added for each unit.
        """
        sizes = [step.spec.nbytes / max(step.spec.size, 1) for step in self.plan.steps]
        total = sum((u.stop - u.start) * sizes[u.step] for u in units)
        written = sum((u.stop - u.start) * sizes[u.step] for u in units if u.id in done)
        if self.sync:
            output.sync_names()
        remaining = [unit for unit in units if unit.id not in done]
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for future in self._futures(pool, remaining, output, journal):
                    unit = future.result()
                    written += (unit.stop - unit.start) * sizes[unit.step]
                    if self._progress is not None:
                        self._progress(int(written), int(total))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _futures(
        self, pool: ThreadPoolExecutor, units: Sequence[Unit], output: Output, journal: Journal
    ) -> Iterator[Future[Unit]]:
        """The units as they are finished.

        Only a few are submitted at a time, so that an error is raised before the first passes of
        all later steps have run.
        """
        pending: set[Future[Unit]] = set()
        for step, measured, batch in self._batches(pool, units):
            for unit in batch:
                pending.add(pool.submit(self._one, step, measured, unit, output, journal))
                if len(pending) > AHEAD * self._threads:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from finished
            finished, pending = wait(pending, timeout=0)
            yield from finished
        yield from as_completed(pending)

    def _batches(
        self, pool: ThreadPoolExecutor, units: Sequence[Unit]
    ) -> Iterator[tuple[Step, FirstPassResult, list[Unit]]]:
        """The units of each step, with what the first pass measured."""

        def ordered_map(act: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
            return pool.map(act, items)

        first_pass = FirstPass(self.plan, self._reader, ordered_map, fused=self._fused)
        by_step: dict[int, list[Unit]] = {}
        for unit in units:
            by_step.setdefault(unit.step, []).append(unit)
        for index, batch in by_step.items():
            step = self.plan.steps[index]
            yield step, first_pass.measure(step), batch

    def _reader(self) -> Reader:
        """The calling thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = Reader(self.plan)
        reader: Reader = self._local.reader
        return reader

    def _worker(self) -> Worker:
        """The calling thread's worker."""
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self.plan, self._reader(), self._chunk, fused=self._fused)
        worker: Worker = self._local.worker
        return worker

    def _one(
        self, step: Step, measured: FirstPassResult, unit: Unit, output: Output, journal: Journal
    ) -> Unit:
        tally = self._worker().run(unit, measured, output.sinks(step.name))
        with self._writing:
            if self.sync:
                output.sync()
            journal.add(unit.id, tally.to_json())
        return unit


def default_threads() -> int:
    """One thread per core that this process may use, at most four."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(4, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
