"""Carry out a merge plan: stream chunks through a method, and write the mean, its precision and a report.

Memory is a few chunks a thread, whatever the model's size: every tensor is read, combined and written piece by piece
(a slice of a merge is the merge of slices). Arithmetic is float32 (float64 where the output is), with one rounding at
the end. The bytes depend on the plan alone, not on chunks, threads, parts, or how often it was stopped and resumed.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing
from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.kernels import can_fuse
from mergekit_bayes.merge.chunks import Known, Reader
from mergekit_bayes.merge.first import FirstPass
from mergekit_bayes.merge.journal import BusyError, Journal, Part, Partial, wait_for
from mergekit_bayes.merge.output import Output, publish, refuse_existing
from mergekit_bayes.merge.report import MergeReport, Totals, make_report
from mergekit_bayes.merge.work import Unit, Worker, units_of
from mergekit_bayes.plan import MergeConfig, MergePlan, Step, partial_path, plan_merge, report_path
from mergekit_bayes.tensors import LostError

__all__ = [
    "CHUNK", "MergeConfig", "MergePlan", "MergeReport", "Part", "carry_out", "join", "parse_part", "part_of_launcher",
    "plan_merge", "run_merge",
]  # fmt: skip

# Entries read, combined and written at a time. The compiled pass works in blocks of its own; numpy's temporaries should
# stay in the second cache.
CHUNK, PLAIN_CHUNK = 1 << 18, 1 << 16
# Below this many entries to merge, loading numba costs more than it saves.
WORTH_FUSING = 1 << 25
AHEAD = 4  # units a thread that are under way
PATIENCE = 60.0  # seconds without any other part at work, after which the first does what is left
_WHOLE = Part(1, 1)

Progress = Callable[[int, int], None]


def run_merge(
    config: MergeConfig,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
    part: Part | None = None,
    sync: bool = False,
    fused: bool | None = None,
    chunk: int | None = None,
) -> MergeReport | None:
    """Plan a merge and carry it out; see `carry_out`."""
    with closing(plan_merge(config)) as plan:
        return carry_out(plan, progress=progress, threads=threads, part=part, sync=sync, fused=fused, chunk=chunk)


def _quiet(_: str) -> None:
    pass


def carry_out(
    plan: MergePlan,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = _quiet,
    threads: int | None = None,
    part: Part | None = None,
    sync: bool = False,
    fused: bool | None = None,
    chunk: int | None = None,
) -> MergeReport | None:
    """Carry out a plan that `plan_merge` made.

    Killed at any moment, the output's final name does not exist or is whole, and the same plan resumes from
    `OUT.partial`. None of the arguments changes a byte of the output.

    Args:
        plan: What to do.
        progress: Called with (bytes of the mean written, bytes of the mean in all).
        say: Called with a line for people when something is resumed, or cannot be.
        threads: Each reads, combines and writes; by default one a core, at most four.
        part: Do this part of the plan only; a call without it does what is left and puts the output in place.
        sync: Wait for the disk before the output gets its name, so that it also survives a power cut.
        fused: Use the compiled pass; by default where numba is installed and the merge is large.
        chunk: Entries at a time.

    Returns:
        The report, which also lies beside the output; None for a part.

    Raises:
        BmergeError: One of its children: an entry that cannot be merged, a full disk, another merge or other files in
            `OUT.partial`, another process at the same part.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more.")
    partial = Partial(partial_path(plan.target), plan_hash(plan))
    run = _Run(plan, chunk, threads, fused, sync=sync, progress=progress)
    try:
        with partial.held(alone=part is None, force=plan.config.force):
            if part is not None:
                _do_part(run, partial, part)
                return None
            if not partial.is_publishing:
                _do_whole(run, partial, say)
            publish(plan, partial, sync=sync)
            report = MergeReport.model_validate_json(report_path(plan.target).read_text())
            partial.remove()
            return report
    except OSError as error:
        where = error.filename or partial.folder
        raise CheckpointError(
            f"{where}: {error.strerror or error}. Once that is mended, the same line goes on."
        ) from error


def _do_part(run: "_Run", partial: Partial, part: Part) -> None:
    plan = run.plan
    if partial.is_publishing:
        return
    refuse_existing(plan)
    _check_space(plan, partial)
    with partial.journal(part, sync=run.sync) as journal:
        done = partial.done()
        try:
            output = Output(plan, partial.out, begun=bool(done))
        except LostError as error:
            raise CheckpointError(f"{error} The same line without --shard starts anew.") from None
        with closing(output):
            run.do([u for u in units_of(plan) if part.takes(u.position)], done, output, journal)
            output.sync()
            output.sync_names()
            journal.close()


def _do_whole(run: "_Run", partial: Partial, say: Callable[[str], None]) -> None:
    plan, units, is_fresh = run.plan, units_of(run.plan), not partial.journals()
    try:
        refuse_existing(plan)
        _check_space(plan, partial)
        with closing(_open_output(plan, partial, say)) as output, partial.journal(_WHOLE, sync=run.sync) as journal:
            done = partial.done()
            _tell(plan, units, done, partial, say)
            run.do(units, done, output, journal)
            totals = Totals(plan, units, partial.done())
            totals.refuse_zero(plan)
            output.finish(totals.guarded_share)
            output.write_report(make_report(plan, totals).model_dump_json(indent=2) + "\n")
    except BmergeError as error:
        # What the data refuse is refused again, and nothing is left of it. What the disk refuses is resumed.
        if is_fresh and not (isinstance(error.__context__, OSError) and partial.done()):
            partial.remove()
        raise


def _open_output(plan: MergePlan, partial: Partial, say: Callable[[str], None]) -> Output:
    if partial.done():
        try:
            return Output(plan, partial.out, begun=True)
        except LostError as error:
            say(f"{error} Everything is done anew.")
            partial.forget()
    return Output(plan, partial.out)


class _Run:
    """Does units on threads, each with its own buffers."""

    def __init__(
        self, plan: MergePlan, chunk: int | None, threads: int | None, fused: bool | None, *, sync: bool,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.plan, self.sync, self.progress = plan, sync, progress
        self.threads = threads or min(4, _cores())
        entries = sum(s.merged for s in plan.steps)
        self.fused = (entries >= WORTH_FUSING if fused is None else fused) and can_fuse(len(plan.models))
        self.chunk = chunk or (CHUNK if self.fused else PLAIN_CHUNK)
        self._local = threading.local()
        self._writing = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def do(self, units: Sequence[Unit], done: Collection[int], output: Output, journal: Journal) -> None:
        """Do those `units` that are not `done`."""
        sizes = [s.spec.nbytes / max(s.spec.size, 1) for s in self.plan.steps]
        total = sum((u.stop - u.start) * sizes[u.step] for u in units)
        written = sum((u.stop - u.start) * sizes[u.step] for u in units if u.id in done)
        if self.sync:
            output.sync_names()
        with ThreadPoolExecutor(self.threads) as pool:
            self._pool = pool
            try:
                for future in self._futures([u for u in units if u.id not in done], output, journal):
                    unit = future.result()
                    written += (unit.stop - unit.start) * sizes[unit.step]
                    if self.progress is not None:
                        self.progress(int(written), int(total))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _futures(self, units: Sequence[Unit], output: Output, journal: Journal) -> Iterator[Future[Unit]]:
        """As they are done. Few wait at a time: an error is heard of before the first pass of all other steps."""
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


def _tell(
    plan: MergePlan, units: list[Unit], done: dict[int, Any], partial: Partial, say: Callable[[str], None]
) -> None:
    """What is there already, and which parts never came."""
    if done:
        share = sum(u.stop - u.start for u in units if u.id in done) / max(1, sum(u.stop - u.start for u in units))
        say(f"resuming '{plan.target}': {share:.0%} was there")
    if missing := partial.missing_parts():
        say(f"parts that never began are done here: {', '.join(missing)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_hash(plan: MergePlan) -> str:
    """SHA-256 of everything that decides the output's bytes: settings, inputs by content, and this version."""
    content = {
        "version": __version__,
        "config": plan.config.model_dump(mode="json", exclude={"out", "force"}),
        "settings": plan.settings,
        "models": [[m.identity, m.precision_identity if m.has_precision else None] for m in plan.models],
        "steps": [[s.name, *s.spec, s.copied] for s in plan.steps],
        "shards": plan.shards,
        "info": plan.info.model_dump(mode="json") if plan.info else None,
        "target": plan.target.name,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_space(plan: MergePlan, partial: Partial) -> None:
    """A disk that is too small is found before the first byte."""
    needed = sum(s.spec.nbytes for s in plan.steps)
    if plan.info is not None:
        needed += sum(4 * _size(s.precision_shape) for s in plan.steps if s.precisions is not None)
    there = sum(f.stat().st_blocks * 512 for f in partial.out.rglob("*") if f.is_file())
    free = shutil.disk_usage(partial.folder).free
    if needed - there > free:
        raise CheckpointError(
            f"'{plan.target}' needs {needed:,} bytes and its disk has {free:,} free. Free some space or choose "
            "another -o."
        )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def parse_part(text: str) -> Part:
    """`I/N` as a part.

    Raises `ConfigError` unless 1 <= I <= N.
    """
    index, separator, of = text.partition("/")
    if not (separator and index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/4.")
    return Part(int(index), int(of))


# Rank and world size as set by torchrun and accelerate launch, srun, Open MPI and MPICH.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


def part_of_launcher() -> Part | None:
    """This process's part if a launcher started several, else None."""
    for rank, size in _LAUNCHERS:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            if int(os.environ[size]) > 1:
                return Part(int(os.environ[rank]) + 1, int(os.environ[size]))
            return None
    return None


def join(plan: MergePlan, part: Part, **options: Any) -> MergeReport | None:
    """One rank's share of a launched merge: its part, and for the first rank also the rest.

    The first waits for the others and does what they leave undone.
    """
    try:
        carry_out(plan, part=part, **options)
    except BusyError:
        if part.number == 1:
            raise  # a later one has come after the first has stopped waiting, and it does their parts, too
    if part.number > 1:
        return None
    partial = Partial(partial_path(plan.target), plan_hash(plan))
    wait_for(partial, [u.id for u in units_of(plan)], part, PATIENCE)
    return carry_out(plan, **options)
