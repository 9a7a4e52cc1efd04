"""Carry out a merge plan: write the mean, its precision and a report.

Memory is a few chunks per thread, whatever the model's size: every tensor is read, combined and
written piece by piece (a slice of a merge is the merge of slices). Arithmetic is float32 (float64
where the output is), with one rounding at the end. The bytes depend on the plan alone, not on
chunks, threads, parts, or how often the merge was stopped and resumed.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.sink import LostError
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.checkpoint.token_rows import TokenSource
from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.merge.output import Output
from mergekit_bayes.merge.partial import BusyError, Partial, wait_for
from mergekit_bayes.merge.parts import Part
from mergekit_bayes.merge.pool import Pool
from mergekit_bayes.merge.publish import publish, refuse_existing
from mergekit_bayes.merge.report import MergeReport, make_report
from mergekit_bayes.merge.tally import MergeTotals
from mergekit_bayes.plan import MergeConfig, MergePlan, partial_path, plan_merge, report_path
from mergekit_bayes.records import Progress
from mergekit_bayes.stream.units import Unit, units_of

PATIENCE = 60.0  # seconds without another part at work, after which the first one does the rest
_ALL = Part(1, 1)
# Settings that decide no byte of the output.
_NO_MATTER = {"out", "force", "full_identities", "full_precision_identities"}


def _silent(_: str) -> None:
    """Say nothing."""


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
    """Plan a merge and carry it out.

    Args:
        config: The settings.
        progress: This and the following arguments are those of `carry_out`.
        threads: How many threads.
        part: Which part of the plan.
        sync: Whether to wait for the disk.
        fused: Whether to use the compiled pass.
        chunk: Entries at a time.

    Returns:
        The report; None for a part.

    Raises:
        BmergeError: What `plan_merge` and `carry_out` raise.
    """
    with plan_merge(config) as plan:
        return carry_out(
            plan, progress=progress, threads=threads, part=part, sync=sync, fused=fused, chunk=chunk
        )


def carry_out(
    plan: MergePlan,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = _silent,
    threads: int | None = None,
    part: Part | None = None,
    sync: bool = False,
    fused: bool | None = None,
    chunk: int | None = None,
) -> MergeReport | None:
    """Carry out a plan that `plan_merge` made.

    If the process is killed at any moment, the output's final name does not exist or is complete,
    and the same plan resumes from `OUT.partial`. Apart from the plan, no argument changes a byte of
    the output.

    Args:
        plan: What to do.
        progress: Called with (bytes of the mean written, bytes of the mean in all).
        say: Called with a line for the user when something is resumed, or cannot be.
        threads: How many threads read, combine and write; by default one per core, at most four.
        part: Do this part of the plan only. A call without it does the rest and puts the output in
            place.
        sync: Wait for the disk before the output gets its name, so that it also survives a power
            cut.
        fused: Use the compiled pass; by default where numba is installed and the merge is large.
        chunk: Entries that are read, combined and written at a time.

    Returns:
        The report, which is also written beside the output; None for a part.

    Raises:
        BmergeError: An entry that cannot be merged, a full disk, another merge or other files in
            `OUT.partial`, another process at the same part, an input that was changed meanwhile.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more.")
    plan.refuse_changed()
    partial = _partial(plan)
    pool = Pool(plan, chunk, threads, fused, sync=sync, progress=progress)
    try:
        with partial.locked(alone=part is None, force=plan.config.force):
            if part is not None:
                _do_part(pool, partial, part)
                return None
            if not partial.is_publishing:
                _do_all(pool, partial, say)
            publish(plan, partial, sync=sync)
            report = read_record(MergeReport, report_path(plan.target))
            partial.remove()
            return report
    except OSError as error:
        where = error.filename or partial.folder
        raise CheckpointError(
            f"{where}: {error.strerror or error}. Once that is solved, the same command goes on."
        ) from error


def join(
    plan: MergePlan,
    part: Part,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = _silent,
    threads: int | None = None,
    sync: bool = False,
    fused: bool | None = None,
    chunk: int | None = None,
) -> MergeReport | None:
    """Do one rank's share of a launched merge: its part, and for the first rank also the rest.

    The first rank waits for the others and does what they leave undone.

    Args:
        plan: What to do.
        part: The rank's part.
        progress: This and the following arguments are those of `carry_out`.
        say: Called with lines for the user.
        threads: How many threads.
        sync: Whether to wait for the disk.
        fused: Whether to use the compiled pass.
        chunk: Entries at a time.

    Returns:
        The report for the first rank, None for the others.

    Raises:
        BmergeError: What `carry_out` raises.
    """
    carry = functools.partial(
        carry_out,
        plan,
        progress=progress,
        say=say,
        threads=threads,
        sync=sync,
        fused=fused,
        chunk=chunk,
    )
    try:
        carry(part=part)
    except BusyError:
        if part.number == 1:
            raise
        # The first rank has stopped waiting for this one and does its part, too.
    if part.number > 1:
        return None
    partial = _partial(plan)
    wait_for(partial, [unit.id for unit in units_of(plan)], part, PATIENCE)
    return carry()


def plan_hash(plan: MergePlan) -> str:
    """SHA-256 of all that decides the output's bytes: settings, content of the inputs, the rule."""
    models = [model.posterior for model in plan.inputs]
    content = {
        "version": __version__,
        "rule": plan.method.code,
        "config": plan.config.model_dump(mode="json", exclude=_NO_MATTER),
        "settings": plan.settings,
        "models": [[m.identity, m.precision_identity if m.has_precision else None] for m in models],
        "steps": [
            [step.name, *step.spec, step.copied, *([step.tied_to] if step.tied_to else [])]
            for step in plan.steps
        ],
        "shards": plan.shards,
        "info": plan.info.model_dump(mode="json") if plan.info else None,
        "target": plan.target.name,
    }
    if plan.recipe is not None:
        content["recipe"] = plan.recipe
        content["made_files"] = dict(plan.made_files)
    sources = [model.mean for model in models]
    if rows := [source.maps.identity for source in sources if isinstance(source, TokenSource)]:
        content["rows"] = json.dumps(rows)
    if any(task.mixture is not None for task in plan.tasks):
        content["mixtures"] = json.dumps([[task.mixture, task.weight] for task in plan.tasks])
    if plan.config.verify:
        content["full"] = [
            [m.full_identity, m.full_precision_identity if m.has_precision else None]
            for m in models
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _partial(plan: MergePlan) -> Partial:
    return Partial(partial_path(plan.target), plan_hash(plan), plan.inputs.files)


@contextmanager
def _unchanged(plan: MergePlan) -> Iterator[None]:
    """What is done inside has read the inputs as they were when the plan was made, or fails.

    An error is looked into as well: what cannot be merged may be half of a file that is written.

    Raises:
        ChangedError: A file was written to or replaced.
        CheckpointError: A file is gone or cannot be reached.
    """
    try:
        yield
    except BmergeError:
        try:
            plan.refuse_changed()
        except ChangedError:
            raise
        except CheckpointError:  # of a disk that is away, the first error says more
            pass
        raise
    plan.refuse_changed(full=plan.config.verify)


def _do_part(pool: Pool, partial: Partial, part: Part) -> None:
    plan = pool.plan
    if partial.is_publishing:
        return
    refuse_existing(plan)
    _check_space(plan, partial)
    with partial.journals.open(part, sync=pool.sync) as journal:
        done = partial.journals.done()
        try:
            output = Output(plan, partial.out, begun=bool(done))
        except LostError as error:
            raise CheckpointError(
                f"{error} The same command without --shard starts again."
            ) from None
        with output:
            units = [unit for unit in units_of(plan) if part.takes(unit.position)]
            try:
                with _unchanged(plan):
                    pool.run(units, done, output, journal)
            except ChangedError:
                journal.forget()
                raise
            output.sync()
            output.sync_names()
            journal.mark_synced()


def _do_all(pool: Pool, partial: Partial, say: Callable[[str], None]) -> None:
    plan, units, is_fresh = pool.plan, units_of(pool.plan), not partial.journals.paths()
    try:
        refuse_existing(plan)
        _check_space(plan, partial)
        with (
            _unchanged(plan),
            _open_output(plan, partial, say) as output,
            partial.journals.open(_ALL, sync=pool.sync) as journal,
        ):
            done = partial.journals.done()
            _tell(plan, units, done, partial, say)
            pool.run(units, done, output, journal)
            totals = MergeTotals(plan, units, partial.journals.done())
            totals.refuse_zero()
            output.finish(totals.guarded_share)
            output.write_report(make_report(plan, totals).model_dump_json(indent=2) + "\n")
    except BmergeError as error:
        # Data that is refused will be refused again, so nothing of the merge is kept, and nothing
        # of inputs that were changed. After an error of the disk what is written is kept, to be
        # resumed.
        is_resumable = isinstance(error.__context__, OSError) and partial.journals.done()
        if isinstance(error, ChangedError) or (is_fresh and not is_resumable):
            partial.remove()
        raise


def _open_output(plan: MergePlan, partial: Partial, say: Callable[[str], None]) -> Output:
    if partial.journals.done():
        try:
            return Output(plan, partial.out, begun=True)
        except LostError as error:
            say(f"{error} The merge starts again from the beginning.")
            partial.journals.forget()
    return Output(plan, partial.out)


def _tell(
    plan: MergePlan,
    units: Sequence[Unit],
    done: Collection[int],
    partial: Partial,
    say: Callable[[str], None],
) -> None:
    """Tell the user what is written already, and which parts never began."""
    if done:
        total = max(1, sum(unit.stop - unit.start for unit in units))
        written = sum(unit.stop - unit.start for unit in units if unit.id in done)
        # The parts of a launcher or of --shard were not interrupted; they are put together.
        joins = any(part.of > 1 for part in partial.journals.parts())
        action = "joining the parts of" if joins else "resuming"
        say(f"{action} '{plan.target}': {written / total:.0%} is written already")
    if changed := partial.journals.changed_inputs():
        say(
            f"'{changed[0]}' was written to after parts of this merge were made; they are made "
            "again"
        )
    if missing := partial.journals.missing_parts():
        say(f"parts that never began are done here: {', '.join(missing)}")


def _check_space(plan: MergePlan, partial: Partial) -> None:
    """Refuse a disk that is too small, before the first byte is written."""
    needed = sum(step.spec.nbytes for step in plan.steps)
    if plan.info is not None:
        specs = (step.precision_spec for step in plan.steps)
        needed += sum(spec.nbytes for spec in specs if spec is not None)
    files = (file for file in partial.out.rglob("*") if file.is_file())
    written = sum(file.stat().st_blocks * 512 for file in files)
    free = shutil.disk_usage(partial.folder).free
    if needed - written > free:
        raise CheckpointError(
            f"'{plan.target}' needs {needed:,} bytes and its disk has {free:,} free. Free some "
            "space or choose another -o."
        )
