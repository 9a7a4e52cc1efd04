"""Carry out a merge plan: stream chunks through a method, and write the mean, its precision and a report.

Memory is a few chunks, whatever the model's size: every tensor is read, combined and written piece by piece
(a slice of a merge is the merge of slices). Arithmetic is float32 (float64 where the output is), with one
rounding at the end.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.gaussian import Gaussian, rebase
from mergekit_bayes.merge.likelihood import Likelihoods
from mergekit_bayes.merge.report import MergeReport, Totals, make_report
from mergekit_bayes.plan import MergeConfig, MergePlan, Step, plan_merge, report_path
from mergekit_bayes.posterior import (
    PosteriorInfo,
    identify,
    precision_path,
    replacing,
    shard_name,
    write_index,
    write_info,
)
from mergekit_bayes.tensors import (
    ITEM_SIZE,
    Array,
    SafetensorsSink,
    SafetensorsSource,
    TensorSource,
    TensorSpec,
    chunks,
    encode,
    read_chunk,
)

__all__ = ["CHUNK", "MergeConfig", "MergePlan", "MergeReport", "carry_out", "plan_merge", "run_merge"]

CHUNK = 1 << 16  # elements; a dozen float32 scratch arrays of this size stay in cache


def run_merge(
    config: MergeConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    chunk: int = CHUNK,
) -> MergeReport:
    """Plan a merge and carry it out; nothing appears under the final name unless all of it worked.

    Args:
        config: What to merge, and how.
        progress: Called with (bytes of the mean written, bytes of the mean in all).
        chunk: Elements read at a time; the result does not depend on it.

    Raises:
        BmergeError: One of its children, before the first tensor is combined where headers can tell, else when
            an entry is not finite or the disk is full.
    """
    plan = plan_merge(config)
    try:
        return carry_out(plan, progress=progress, chunk=chunk)
    finally:
        plan.close()


def carry_out(
    plan: MergePlan, *, progress: Callable[[int, int], None] | None = None, chunk: int = CHUNK
) -> MergeReport:
    """Carry out a plan that `plan_merge` made."""
    force, target = plan.config.force, plan.target
    with ExitStack() as stack:
        if plan.to_file:
            mean_files = [stack.enter_context(replacing(target, force=force))]
            report_file = stack.enter_context(replacing(report_path(target), force=force))
            precision_files = []
            if plan.info is not None:
                precision_files = [stack.enter_context(replacing(precision_path(target), force=force))]
            folder = None
        else:
            folder = stack.enter_context(replacing(target, force=force))
            (folder / "posterior").mkdir(parents=True) if plan.info is not None else folder.mkdir()
            shards = plan.donor.mean.files
            mean_files = [folder / shard_name(shards, i, "model") for i in range(len(shards))]
            precision_files = []
            if plan.info is not None:
                precision_files = [
                    folder / "posterior" / shard_name(shards, i, "precision") for i in range(len(shards))
                ]
            report_file = report_path(folder)
        totals = _write(plan, mean_files, precision_files, progress, chunk)
        report = make_report(plan, totals)
        report_file.write_text(report.model_dump_json(indent=2) + "\n")
        if plan.to_file and plan.info is None:
            precision_path(target).unlink(missing_ok=True)  # of the file that --force replaces
        if folder is not None:
            _finish_folder(plan, folder, mean_files, precision_files)
        return report


def _write(
    plan: MergePlan,
    mean_files: list[Path],
    precision_files: list[Path],
    progress: Callable[[int, int], None] | None,
    chunk: int,
) -> Totals:
    totals = Totals(len(plan.models))
    means = _sinks(plan, mean_files, {s.name: s.spec for s in plan.steps}, {"format": "pt"})
    precisions: list[SafetensorsSink] = []
    try:
        if plan.info is not None:
            specs = {s.name: TensorSpec("F32", s.spec.shape) for s in plan.steps if s.precisions is not None}
            precisions = _sinks(plan, precision_files, specs, plan.info.to_metadata())
        size = sum(step.spec.nbytes for step in plan.steps)
        done = 0
        for step in plan.steps:
            shard = plan.donor.mean.file_of(step.name) if len(mean_files) > 1 else 0
            precision_sink = precisions[shard] if precisions and step.precisions is not None else None
            _merge_step(plan, step, means[shard], precision_sink, totals, chunk)
            done += step.spec.nbytes
            if progress:
                progress(done, size)
        for sink in means:
            sink.close()
        if plan.info is not None:
            info = _own_info(plan, plan.info, mean_files, totals)
            for sink in precisions:
                sink.metadata = info.to_metadata()
                sink.close()
        return totals
    finally:
        for sink in (*means, *precisions):
            sink.abandon()


def _sinks(
    plan: MergePlan, files: list[Path], specs: dict[str, TensorSpec], metadata: dict[str, str]
) -> list[SafetensorsSink]:
    donor = plan.donor.mean
    sinks: list[SafetensorsSink] = []
    try:
        for i, file in enumerate(files):
            here = {n: s for n, s in specs.items() if len(files) == 1 or donor.file_of(n) == i}
            sinks.append(SafetensorsSink(file, here, metadata))
    except BaseException:
        for sink in sinks:
            sink.abandon()
        raise
    return sinks


def _merge_step(
    plan: MergePlan, step: Step, mean_sink: SafetensorsSink, precision_sink: SafetensorsSink | None,
    totals: Totals, chunk: int,
) -> None:  # fmt: skip
    item = ITEM_SIZE[step.spec.dtype]
    wide = step.spec.dtype == "F64"
    likelihoods = Likelihoods(plan, step, chunk) if step.precisions is not None else None
    for start, stop in chunks(step.spec, chunk):
        if step.copied is not None:
            raw = np.empty((stop - start) * item, np.uint8)
            plan.donor.mean.read_bytes(step.sources[0], start * item, raw.data)
            mean_sink.write_bytes(step.name, start * item, raw.data)
            if precision_sink is not None and likelihoods is not None:
                kept = likelihoods.prior_precision(0, start, stop) + likelihoods.read(0, start, stop)
                precision_sink.write_bytes(step.name, start * 4, encode(kept, "F32"))
            continue
        merged = _combine(plan, step, likelihoods, totals, start, stop, wide)
        data = encode(merged.mean, step.spec.dtype)
        if step.spec.dtype == "F16" and not np.isfinite(np.frombuffer(data, "<f2")).all():
            raise CheckpointError(
                f"'{step.name}': the merge overflows F16. Cast '{plan.donor.ref}' to BF16 or F32 first."
            )
        mean_sink.write_bytes(step.name, start * item, data)
        if precision_sink is not None:
            precision_sink.write_bytes(step.name, start * 4, encode(merged.precision, "F32"))


def _combine(
    plan: MergePlan, step: Step, likelihoods: "Likelihoods | None", totals: Totals,
    start: int, stop: int, wide: bool,
) -> Gaussian:  # fmt: skip
    means = []
    for model, source in zip(plan.models, step.sources, strict=True):
        mean = read_chunk(model.mean, source, start, stop)
        _refuse_non_finite(mean, model.mean, source, start)
        means.append(mean.astype(np.float64 if wide else np.float32, copy=False))
    has_base = plan.base is not None
    base: Gaussian | None = None
    tasks: list[Gaussian] = []
    if likelihoods is None:
        base = Gaussian(means[0], None) if has_base else None
        tasks = [Gaussian(m, None) for m in means[has_base:]]
    else:
        data = [likelihoods.read(i, start, stop) for i in range(len(means))]
        for i, h in enumerate(data):
            totals.likelihood[i] += float(h.sum(dtype=np.float64))
        if has_base:
            base = Gaussian(means[0], likelihoods.prior_precision(0, start, stop) + data[0])
        for i in range(int(has_base), len(means)):
            if base is None:
                tasks.append(Gaussian(means[i], likelihoods.prior_precision(i, start, stop) + data[i]))
                continue
            pull = plan.weighings[i].pull
            if pull.precision is None:
                tasks.append(Gaussian(means[i], base.precision + data[i]))
            else:
                tasks.append(rebase(base, means[i], data[i], pull.precision, pull.decay))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        merged = plan.method.combine(base, tuple(tasks), plan.scales, (plan.guard,))
    if not np.isfinite(merged.mean).all():
        raise CheckpointError(f"'{step.name}': the merge is not finite. Are its precisions on the same scale?")
    if likelihoods is not None:
        _count(plan, base, tasks, merged, totals)
    return merged


def _count(plan: MergePlan, base: Gaussian | None, tasks: list[Gaussian], merged: Gaussian, totals: Totals) -> None:
    """Tally where the guard acted and how far it let a removal be amplified."""
    totals.entries += merged.precision.size
    if base is None:
        return
    exact = base.precision
    for scale, task in zip(plan.scales, tasks, strict=True):
        exact = exact + scale * (task.precision - base.precision)
    totals.guarded += int(np.count_nonzero(merged.precision > exact))
    for i, scale in enumerate(plan.scales):
        if scale < 0:
            # Re-basing moves a task's mean; what counts is how far its own task vector is stretched: (H + P) / S.
            pull = plan.weighings[i + 1].pull.precision
            strength = tasks[i].precision if pull is None else tasks[i].precision - base.precision + pull
            largest = float(np.max(-scale * strength / merged.precision, initial=0.0))
            totals.multiplier = max(totals.multiplier, largest)


def _refuse_non_finite(values: Array, source: TensorSource, name: str, start: int) -> None:
    good = np.isfinite(values)
    if not good.all():
        at = int(np.argmin(good))
        raise CheckpointError(
            f"{source.where(name)}: '{name}' is {values[at]} at flat index {start + at}. Did its training diverge? "
            "A merge would spread this."
        )


def _own_info(plan: MergePlan, info: PosteriorInfo, mean_files: list[Path], totals: Totals) -> PosteriorInfo:
    """The merge's info with its own identity, which only the written mean can give."""
    written = SafetensorsSource(mean_files)
    try:
        who = identify(written, full=plan.config.verify)
    finally:
        written.close()
    share = math.ceil(1e6 * totals.guarded / totals.entries) / 1e6 if totals.entries else 0.0
    assert info.merge is not None
    merge = info.merge.model_copy(update={"guarded_share": share})
    return info.model_copy(update={"mean": who, "merge": merge})


def _finish_folder(plan: MergePlan, folder: Path, mean_files: list[Path], precision_files: list[Path]) -> None:
    """Indices, `posterior.json`, and the donor's config, tokenizer and generation files."""
    donor = plan.donor
    if len(mean_files) > 1:
        for stem, files, names in (
            ("model", mean_files, [s.name for s in plan.steps]),
            ("precision", precision_files, [s.name for s in plan.steps if s.precisions is not None]),
        ):
            if files:
                shards = {f.name: [n for n in names if donor.mean.file_of(n) == i] for i, f in enumerate(files)}
                size = sum((4 if stem == "precision" else ITEM_SIZE[donor.mean.specs[n].dtype])
                           * donor.mean.specs[n].size for n in names)  # fmt: skip
                write_index(files[0].parent, stem, shards, size)
    if plan.info is not None:
        source = SafetensorsSource(precision_files[:1])
        source.close()
        write_info(folder / "posterior", PosteriorInfo.model_validate_json(source.metadata["bmerge"]))
    if donor.path.is_dir():
        for file in sorted(donor.path.iterdir()):
            if file.is_file() and _travels(file):
                (folder / file.name).write_bytes(file.read_bytes())


_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_OWN_FILES = ("merge_report.json", "trainer_state.json", "all_results.json", "train_results.json")


def _travels(file: Path) -> bool:
    return (
        file.suffix in _SIDE_SUFFIXES
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
        and file.name not in _OWN_FILES
    )
