"""What a merge of 70 B parameters costs on a machine that cannot hold its files.

    python scripts/bench/large.py --work /tmp
    python scripts/bench/large.py --parts MODELS          # four machines' --shard, and the join

Makes a base and two tasks of Llama-3-70B's shapes, each with a precision, in BF16: 847 GB of
sparse files whose headers are whole (large_models.py). `bmerge merge --dry-run` plans their merges
as a user would. Then a tenth of the units is really merged, drawn at random in each stratum (kind
of tensor), by the merge's own threads and passes. The units of a batch are filled with random
numbers just before, so that they are read from the page cache, and made zeros again after it;
outputs are written by `pwrite` to sparse files, which are cut to nothing after each measurement,
most of it before it reaches the disk. Beside each merge the same bytes are read and written bare,
by one thread and in pieces as large as the merge's. The order of the four changes from batch to
batch.

The whole is projected by stratum: cost over entries of the sample, times the entries of the
stratum. The interval is 1.96 standard errors of that ratio, from the spread between batches.
What the projection leaves out is a disk: a real one takes as long as its bytes do, and the kernel's
threads, which no process is charged for, write to it.

`--parts` needs models of merge_models.py (as merge.py --keep leaves them): it merges them in one
process, then in four parts one after another, as four machines would, and joins them; all files
must have the same bytes. Linux only.
"""

import argparse
import datetime
import hashlib
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from large_models import SHAPES, Models, Part, kind_of, refuse_small_disk
from machine import commit, cpu, status
from merge import run
from merge_models import MODELS
from merge_rows import Row, memory

from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, CheckpointSource, TensorSpec
from mergekit_bayes.merge.journal import Journals
from mergekit_bayes.merge.output import Output
from mergekit_bayes.merge.parts import Part as MergePart
from mergekit_bayes.merge.pool import Pool
from mergekit_bayes.merge.work import Sinks
from mergekit_bayes.plan import MergeConfig, MergePlan, Step, plan_merge
from mergekit_bayes.stream.units import Unit, entries_at_a_time, units_of

BATCH, FEWEST = 16, 4  # units of a batch at most, batches of a stratum at least
KEPT = 15_000_000_000  # bytes of the disk that are never used
SEED = 70
METHODS = {
    "task arithmetic": ("uniform", "read 3, write 1"),
    "gradient matching": ("precision", "read 6, write 2"),
}
KINDS = ("embedding", "attention", "MLP", "norms", "head")


class Cost(NamedTuple):
    """What a batch cost: CPU seconds of all threads, and seconds."""

    cpu: float
    wall: float


class Sample(NamedTuple):
    """What was measured of a stratum.

    Attributes:
        entries: All entries of the stratum.
        units: All units of it.
        batches: Entries of each batch that was merged.
        costs: Costs of each batch, by what was done.
    """

    entries: int
    units: int
    batches: list[int]
    costs: dict[str, list[Cost]]


class Discarded(Output):
    """Sparse files for the tensors of a merge, which `discard` empties.

    Args:
        plan: The merge.
        folder: Where the files are made.
    """

    def __init__(self, plan: MergePlan, folder: Path) -> None:  # no output of 423 GB is allocated
        self._stack = ExitStack()
        means = {step.name: step.spec for step in plan.steps}
        self._files = [self._file(folder / "means", means)]
        if plan.info is not None:
            precisions = {name: TensorSpec("F32", spec.shape) for name, spec in means.items()}
            self._files.append(self._file(folder / "precisions", precisions))

    def _file(self, path: Path, specs: Mapping[str, TensorSpec]) -> SafetensorsSink:
        sink = SafetensorsSink(path, specs, {}, sparse=True)
        self._stack.callback(sink.abandon)
        return sink

    def sinks(self, name: str) -> Sinks:
        """The files to which all tensors are written."""
        return Sinks(self._files[0], self._files[1] if len(self._files) > 1 else None)

    def discard(self) -> None:
        """Drop all that was written."""
        for sink in self._files:
            size = sink.path.stat().st_size
            os.truncate(sink.path, 0)
            os.truncate(sink.path, size)


class Peak:
    """The highest RssAnon of this process while merges run, read every 20 ms.

    Attributes:
        before: Bytes when the object was made.
        bytes: The most bytes.
    """

    def __init__(self) -> None:
        self.before = self.bytes = status("RssAnon")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what is done inside."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                self.bytes = max(self.bytes, status("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.bytes = max(self.bytes, status("RssAnon"))


def strata(plan: MergePlan) -> dict[str, list[Unit]]:
    """All units of a plan, by the kind of their tensor."""
    result: dict[str, list[Unit]] = {kind: [] for kind in KINDS}
    for unit in units_of(plan):
        result[kind_of(plan.steps[unit.step].name)].append(unit)
    return result


def batches_of(units: Sequence[Unit], share: float, draws: random.Random) -> list[list[Unit]]:
    """A share of the units, drawn without replacement, as batches of at most `BATCH`."""
    number = min(len(units), max(FEWEST, math.ceil(share * len(units))))
    drawn = sorted(draws.sample(units, number))
    count = min(number, max(FEWEST, math.ceil(number / BATCH)))
    draws.shuffle(drawn)  # a batch is spread over the model
    return [sorted(drawn[i::count]) for i in range(count)]


def projected(batches: Sequence[int], costs: Sequence[float], entries: int) -> tuple[float, float]:
    """What a whole stratum costs, and its standard error.

    The ratio of cost to entries in the sample, times all entries. The error is that of a ratio
    estimated from n batches drawn without replacement, by the residuals of the batches.

    Args:
        batches: Entries of each batch.
        costs: Cost of each batch.
        entries: Entries of the stratum.
    """
    sampled, n = sum(batches), len(batches)
    ratio = sum(costs) / sampled
    if n == 1:
        return ratio * entries, math.inf if sampled < entries else 0.0
    squares = sum((cost - ratio * size) ** 2 for size, cost in zip(batches, costs, strict=True))
    left = max(0.0, 1 - sampled / entries)
    return ratio * entries, entries / sampled * math.sqrt(left * n / (n - 1) * squares)


def read_by(step: Step) -> Iterator[tuple[CheckpointSource, str]]:
    """What a tensor is made of: the sources and names of all means and precisions."""
    for operand in step.operands:
        yield operand.mean.source, operand.mean.name
        if operand.precision is not None and operand.precision.source is not None:
            yield operand.precision.source, operand.precision.name


def bare(plan: MergePlan, units: Sequence[Unit], output: Discarded) -> None:
    """Read what the units are made of, and write as many bytes, in the merge's pieces and order."""
    buffer = memoryview(bytearray())
    for unit in units:
        step = plan.steps[unit.step]
        entries = entries_at_a_time(plan, step)
        if len(buffer) < 4 * entries:
            buffer = memoryview(bytearray(4 * entries))
        for at in range(unit.start, unit.stop, entries):
            count = min(entries, unit.stop - at)
            for source, name in read_by(step):
                size = ITEM_SIZE[source.specs[name].dtype]
                source.read_bytes(name, at * size, buffer[: count * size])
            mean, precision = output.sinks(step.name)
            for sink, size in ((mean, ITEM_SIZE[step.spec.dtype]), (precision, 4)):
                if sink is not None:
                    sink.write_bytes(step.name, at * size, buffer[: count * size])


def timed(act: Callable[[], None]) -> Cost:
    """Call and measure; all threads of the process count."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    act()
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(used, wall)


class Tenth:
    """Merges a share of the units of both methods, batch by batch.

    Args:
        models: The models.
        work: A folder for outputs and journals.
        stack: Closes what is opened.
    """

    def __init__(self, models: Models, work: Path, stack: ExitStack) -> None:
        self._models, self._work = models, work
        self.plans: dict[str, MergePlan] = {}
        self._jobs: dict[str, Callable[[list[Unit]], None]] = {}
        self._outputs: list[Discarded] = []
        base, *tasks = map(str, models.paths)
        for method, (weights, io) in METHODS.items():
            folder = work / method.replace(" ", "-")
            folder.mkdir()
            config = MergeConfig(
                models=tasks, base=base, weights=weights, out=str(folder / "merged")
            )
            plan = stack.enter_context(plan_merge(config))
            output = stack.enter_context(Discarded(plan, folder))
            self.plans[method] = plan
            self._outputs.append(output)
            self._jobs[method] = self._merging(plan, folder, output)
            self._jobs[io] = self._reading(plan, output)
        self.peak = Peak()

    def _merging(
        self, plan: MergePlan, folder: Path, output: Discarded
    ) -> Callable[[list[Unit]], None]:
        def act(units: list[Unit]) -> None:
            with Journals(folder, "bench").open(MergePart(1, 1), sync=False) as journal:
                pool = Pool(plan, None, None, None, sync=False, progress=None)
                pool.run(units, (), output, journal)

        return act

    def _reading(self, plan: MergePlan, output: Discarded) -> Callable[[list[Unit]], None]:
        return lambda units: bare(plan, units, output)

    def measure(self, share: float) -> dict[str, Sample]:
        """Merge a share of each stratum; the first batch is run once more before, uncounted."""
        draws = random.Random(SEED)
        plan = next(iter(self.plans.values()))
        samples: dict[str, Sample] = {}
        turn = 0
        for kind, units in strata(plan).items():
            batches = batches_of(units, share, draws)
            entries = sum(unit.stop - unit.start for unit in units)
            costs: dict[str, list[Cost]] = {job: [] for job in self._jobs}
            samples[kind] = Sample(entries, len(units), [], costs)
            if not turn:
                self._batch(batches[0], turn)
            for number, batch in enumerate(batches, 1):
                turn += 1
                samples[kind].batches.append(sum(unit.stop - unit.start for unit in batch))
                for job, cost in self._batch(batch, turn).items():
                    costs[job].append(cost)
                print(f"{kind}: {number}/{len(batches)}", file=sys.stderr, flush=True)
        return samples

    def _batch(self, batch: list[Unit], turn: int) -> dict[str, Cost]:
        refuse_small_disk(self._work, KEPT)
        steps = next(iter(self.plans.values())).steps
        self._models.fill(Part(steps[u.step].name, u.start, u.stop) for u in batch)
        costs = {}
        jobs = list(self._jobs.items())
        turn %= len(jobs)
        for job, act in jobs[turn:] + jobs[:turn]:
            if job in self.plans:
                with self.peak.watched():
                    costs[job] = timed(lambda act=act: act(batch))
            else:
                costs[job] = timed(lambda act=act: act(batch))
            for output in self._outputs:
                output.discard()
        self._models.empty()
        return costs


def projections(samples: Mapping[str, Sample], job: str, what: str) -> tuple[float, float]:
    """CPU or wall seconds of the whole, and half the width of their interval."""
    parts = [
        projected(s.batches, [getattr(c, what) for c in s.costs[job]], s.entries)
        for s in samples.values()
    ]
    return sum(cost for cost, _ in parts), 1.96 * math.hypot(*(error for _, error in parts))


def tenth_table(samples: Mapping[str, Sample]) -> str:
    """What was measured by stratum, and the projection to the whole, in Markdown."""
    lines = [
        "| stratum | entries | merged | | CPU s | of bare I/O | whole: CPU s | of bare I/O "
        "| whole: wall s |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: list[tuple[str, Mapping[str, Sample]]] = [(k, {k: s}) for k, s in samples.items()]
    for name, group in [*groups, ("**all**", samples)]:
        entries = sum(s.entries for s in group.values())
        merged = sum(sum(s.batches) for s in group.values()) / entries
        for method, (_, io) in METHODS.items():
            used = [
                sum(c.cpu for s in group.values() for c in s.costs[job]) for job in (method, io)
            ]
            whole = [
                "{:,.1f} ± {:.1f}".format(*projections(group, job, what))
                for job, what in ((method, "cpu"), (io, "cpu"), (method, "wall"))
            ]
            cells = [name, f"{entries:,}", f"{merged:.1%}", method]
            lines.append(f"| {' | '.join([*cells, *(f'{u:.2f}' for u in used), *whole])} |")
    return "\n".join(lines)


def bytes_of(plan: MergePlan) -> tuple[int, int]:
    """How many bytes a merge reads and writes."""
    read = written = 0
    for step in plan.steps:
        read += sum(source.specs[name].nbytes for source, name in read_by(step))
        written += step.spec.nbytes
        if plan.info is not None and step.precision_spec is not None:
            written += step.precision_spec.nbytes
    return read, written


def command(paths: Sequence[Path], weights: str, out: Path, *flags: str) -> list[str]:
    """The command line of a merge."""
    base, *tasks = map(str, paths)
    binary = str(Path(sys.executable).with_name("bmerge"))
    line = [binary, "merge", *tasks, "--base", base, "--weights", weights]
    return [*line, "-o", str(out), *flags]


def dry_runs(paths: Sequence[Path], work: Path) -> str:
    """What plans of the whole cost, and what that of a part says, in Markdown."""
    lines = ["| `--dry-run` | CPU s | wall s | anonymous MiB |", "| --- | ---: | ---: | ---: |"]
    part = ("--shard", "3/4")
    line = command(paths, "precision", work / "merged", "--dry-run", *part)
    said = subprocess.run(line, check=True, capture_output=True, text=True).stderr  # warms up, too
    for name, weights, flags in (
        ("task arithmetic", "uniform", ()),
        ("gradient matching", "precision", ()),
        (f"gradient matching, `{' '.join(part)}`", "precision", part),
    ):
        line = command(paths, weights, work / "merged", "--dry-run", *flags)
        cost = run(Row(70, name, line, work / "merged"))
        lines.append(f"| {name} | {cost.cpu:.2f} | {cost.wall:.2f} | {cost.anonymous:.0f} |")
    text = said.replace(f"{paths[0].parent}/", "")
    return "\n".join([*lines, "", "```", text.strip(), "```"])


def large(options: argparse.Namespace) -> str:
    """Plan the merges and carry out a share of them; the tables in Markdown."""
    work = Path(tempfile.mkdtemp(prefix="bmerge-large-", dir=options.work))
    try:
        refuse_small_disk(work, KEPT)
        with Models(work, SHAPES[options.size], SEED) as models, ExitStack() as stack:
            planned = dry_runs(models.paths, work)
            tenth = Tenth(models, work, stack)
            samples = tenth.measure(options.share)
            moved = [
                f"{method}: {read / 1e9:,.0f} GB read, {written / 1e9:,.0f} GB written; a disk "
                f"of 1 GB/s takes {(read + written) / 1e9:,.0f} s for them"
                for method, plan in tenth.plans.items()
                for read, written in (bytes_of(plan),)
            ]
            peak = tenth.peak
            held = (
                f"anonymous MiB: {peak.before / 2**20:.0f} of the script with both plans, "
                f"{peak.bytes / 2**20:.0f} at most while merging"
            )
            return "\n\n".join([about(), planned, tenth_table(samples), *moved, held])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def about() -> str:
    """On what was measured, in one line."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba"))
    return (
        f"{datetime.date.today()}, {cpu()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory() / 2**30:.1f} GiB, Python {sys.version.split()[0]}, {packages}, commit "
        f"{commit()}, load {load}"
    )


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of an output."""
    result = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        result[str(path.relative_to(folder))] = digest.hexdigest()
    return result


def parts(models: Path, parent: Path, count: int = 4) -> str:
    """Merge in one process and in parts; their costs in Markdown.

    Raises:
        SystemExit: A byte differs.
    """
    paths = [models / name for name in MODELS]
    work = Path(tempfile.mkdtemp(prefix="bmerge-parts-", dir=parent))
    out, found, costs = work / "merged", [], {}
    whole, shards = "one process", [f"{i}/{count}" for i in range(1, count + 1)]
    try:
        # The first warms the page cache and makes compiled code, and does not count.
        for names in ([whole], [whole], [*shards, "join"]):
            for name in names:
                flags = ("--shard", name) if name in shards else ()
                line = command(paths, "precision", out, "-q", *flags)
                # `run` removes what a row wrote; the parts are to stay until they are joined.
                costs[name] = run(Row(0, name, line, work / "nothing"))
            found.append(hashes(out))
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    first, *_, last = found
    if wrong := [n for n in sorted(first.keys() | last.keys()) if first.get(n) != last.get(n)]:
        raise SystemExit(f"parts and one process differ in {', '.join(wrong)}")
    lines = ["| | CPU s | wall s | anonymous MiB |", "| --- | ---: | ---: | ---: |"]
    for name, cost in costs.items():
        shown = f"`--shard {name}`" if name in shards else name
        lines.append(f"| {shown} | {cost.cpu:.2f} | {cost.wall:.2f} | {cost.anonymous:.0f} |")
    wall = max(costs[name].wall for name in shards) + costs["join"].wall
    same = f"longest part and join: {wall:.2f} s. All {len(first)} files are equal byte by byte."
    return "\n\n".join([about(), "\n".join(lines), same])


def main() -> int:
    """Make the models, measure, print Markdown, and remove what was made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--share", type=float, default=0.1, help="of the units that is merged")
    parser.add_argument("--size", type=float, default=70, choices=SHAPES, help="B of parameters")
    parser.add_argument("--parts", type=Path, metavar="MODELS", help="a folder of merge_models.py")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error("--share: expected more than 0 and at most 1.")
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # what was made is removed, too
    try:
        print(parts(options.parts, options.work) if options.parts else large(options))
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
