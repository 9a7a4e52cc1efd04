"""Carry out a merge plan: stream chunks through a method, and write the mean, its precision and a
report.

Memory is a few chunks a thread, whatever the model's size: every tensor is read, combined and
written piece by piece (a slice of a merge is the merge of slices). Arithmetic is float32 (float64
where the output is), with one rounding at the end. The bytes depend on the plan alone, not on
chunks, threads, parts, or how often it was stopped and resumed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.sink import LostError
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.merge.output import Output
from mergekit_bayes.merge.partial import BusyError, Partial, wait_for
from mergekit_bayes.merge.parts import Part
from mergekit_bayes.merge.pool import Pool, Progress
from mergekit_bayes.merge.publish import publish, refuse_existing
from mergekit_bayes.merge.report import MergeReport, Totals, make_report
from mergekit_bayes.plan import MergeConfig, MergePlan, partial_path, plan_merge, report_path
from mergekit_bayes.stream.units import Unit, units_of

PATIENCE = 60.0  # seconds without any other part at work, after which the first does what is left
_WHOLE = Part(1, 1)


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
        return carry_out(
            plan, progress=progress, threads=threads, part=part, sync=sync, fused=fused, chunk=chunk
        )


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

    Killed at any moment, the output's final name does not exist or is whole, and the same plan
    resumes from `OUT.partial`. None of the arguments changes a byte of the output.

    Args:
        plan: What to do.
        progress: Called with (bytes of the mean written, bytes of the mean in all).
        say: Called with a line for people when something is resumed, or cannot be.
        threads: Each reads, combines and writes; by default one a core, at most four.
        part: Do this part of the plan only; a call without it does what is left and puts the output
            in place.
        sync: Wait for the disk before the output gets its name, so that it also survives a power
            cut.
        fused: Use the compiled pass; by default where numba is installed and the merge is large.
        chunk: Entries at a time.

    Returns:
        The report, which also lies beside the output; None for a part.

    Raises:
        BmergeError: One of its children: an entry that cannot be merged, a full disk, another merge
            or other files in `OUT.partial`, another process at the same part.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: expected 1 or more.")
    partial = Partial(partial_path(plan.target), plan_hash(plan))
    run = Pool(plan, chunk, threads, fused, sync=sync, progress=progress)
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


def _do_part(run: "Pool", partial: Partial, part: Part) -> None:
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


def _do_whole(run: "Pool", partial: Partial, say: Callable[[str], None]) -> None:
    plan, units, is_fresh = run.plan, units_of(run.plan), not partial.journals()
    try:
        refuse_existing(plan)
        _check_space(plan, partial)
        with (
            closing(_open_output(plan, partial, say)) as output,
            partial.journal(_WHOLE, sync=run.sync) as journal,
        ):
            done = partial.done()
            _tell(plan, units, done, partial, say)
            run.do(units, done, output, journal)
            totals = Totals(plan, units, partial.done())
            totals.refuse_zero(plan)
            output.finish(totals.guarded_share)
            output.write_report(make_report(plan, totals).model_dump_json(indent=2) + "\n")
    except BmergeError as error:
        # What the data refuse is refused again, and nothing is left of it. What the disk refuses is
        # resumed.
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


def _tell(
    plan: MergePlan,
    units: list[Unit],
    done: dict[int, Any],
    partial: Partial,
    say: Callable[[str], None],
) -> None:
    """What is there already, and which parts never came."""
    if done:
        share = sum(u.stop - u.start for u in units if u.id in done) / max(
            1, sum(u.stop - u.start for u in units)
        )
        say(f"resuming '{plan.target}': {share:.0%} was there")
    if missing := partial.missing_parts():
        say(f"parts that never began are done here: {', '.join(missing)}")


def plan_hash(plan: MergePlan) -> str:
    """SHA-256 of everything that decides the output's bytes: settings, inputs by content, and this
    version.
    """
    content = {
        "version": __version__,
        "config": plan.config.model_dump(mode="json", exclude={"out", "force"}),
        "settings": plan.settings,
        "models": [
            [m.identity, m.precision_identity if m.has_precision else None] for m in plan.models
        ],
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
            f"'{plan.target}' needs {needed:,} bytes and its disk has {free:,} free. Free some "
            "space or choose "
            "another -o."
        )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def join(plan: MergePlan, part: Part, **options: Any) -> MergeReport | None:
    """One rank's share of a launched merge: its part, and for the first rank also the rest.

    The first waits for the others and does what they leave undone.
    """
    try:
        carry_out(plan, part=part, **options)
    except BusyError:
        if part.number == 1:
            # a later one has come after the first has stopped waiting, and it does their parts, too
            raise
    if part.number > 1:
        return None
    partial = Partial(partial_path(plan.target), plan_hash(plan))
    wait_for(partial, [u.id for u in units_of(plan)], part, PATIENCE)
    return carry_out(plan, **options)
