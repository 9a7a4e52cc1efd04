"""The tensor files of a merge: opened in `OUT.partial`, written to, and finished."""

import math
from contextlib import ExitStack
from pathlib import Path

from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_FOLDER,
    precision_name,
    precision_path,
    shard_name,
    write_index,
    write_precision_index,
)
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.merge.recipe import recipe_text
from mergekit_bayes.merge.side_files import SideFiles
from mergekit_bayes.merge.work import Sinks
from mergekit_bayes.plan import MergePlan, recipe_path, report_path
from mergekit_bayes.posterior import PosteriorInfo, identify, write_info
from mergekit_bayes.posterior.stored import PrecisionSink


class Output(Closing):
    """The files of a merge. Several processes may have them open at once.

    Args:
        plan: The merge.
        out: The folder inside `OUT.partial`.
        begun: Whether the files must exist already, because earlier units are in them.

    Raises:
        LostError: The files should exist, and one is gone or not of its size.
        CheckpointError: A file cannot be created, or a side file cannot be copied.
    """

    def __init__(self, plan: MergePlan, out: Path, *, begun: bool = False) -> None:
        self.plan, self.out = plan, out
        self._begun = begun
        self._steps = {step.name: step for step in plan.steps}
        self._side_files = SideFiles(plan)
        self._side_files.check()
        count = len(plan.shards)
        if plan.to_file:
            self._means = [out / plan.target.name]
            self._precisions = [out / precision_path(plan.target).name]
        else:
            folder = out / POSTERIOR_FOLDER
            if plan.info is not None:
                folder.mkdir(exist_ok=True)
            self._means = [out / shard_name("model", i, count) for i in range(count)]
            self._precisions = [folder / precision_name(i, count) for i in range(count)]
        self._mean_sinks: list[SafetensorsSink] = []
        self._precision_sinks: list[SafetensorsSink | None] = []
        self._sinks: dict[str, Sinks] = {}
        with ExitStack() as stack:
            for shard, names in enumerate(plan.shards):
                self._open_shard(shard, names, stack)
            self._stack = stack.pop_all()

    def _open_shard(self, shard: int, names: tuple[str, ...], stack: ExitStack) -> None:
        specs = {name: self._steps[name].spec for name in names}
        metadata, path = {"format": "pt"}, self._means[shard]
        mean = SafetensorsSink(path, specs, metadata, shared=True, begun=self._begun)
        stack.callback(mean.abandon)
        self._mean_sinks.append(mean)
        stored = {name: parts for name in names if (parts := self._steps[name].precision_parts)}
        precision, info = None, self.plan.info
        if info is not None and stored:
            path = self._precisions[shard]
            precision = PrecisionSink(path, stored, info, shared=True, begun=self._begun)
            stack.callback(precision.abandon)
        self._precision_sinks.append(precision)
        for name in names:
            self._sinks[name] = Sinks(mean, precision if name in stored else None)

    def close(self) -> None:
        """Close the files as they are, complete after `finish` and incomplete before."""
        self._stack.close()

    def sinks(self, name: str) -> Sinks:
        """The files to which a tensor is written."""
        return self._sinks[name]

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        for sink in (*self._mean_sinks, *self._precision_sinks):
            if sink is not None:
                sink.sync()

    def sync_names(self) -> None:
        """Wait until the disk has the names of the files."""
        files = (*self._means, *self._precisions) if self.plan.info else self._means
        for folder in {file.parent for file in files}:
            sync_path(folder)

    def finish(self, guarded_share: float) -> None:
        """Write headers, the posterior's record, indices and side files. All tensors are written.

        Args:
            guarded_share: Share of entries at which the guard acted, which the record keeps.
        """
        plan = self.plan
        for mean in self._mean_sinks:
            mean.close()
        if plan.info is not None:
            info = _identified(plan, plan.info, self._means, guarded_share)
            for precision in self._precision_sinks:
                if precision is not None:
                    precision.metadata = info.to_metadata()
                    precision.close()
            if not plan.to_file:
                write_info(self.out / POSTERIOR_FOLDER, info)
        write_own(self.out / recipe_path(plan.target).name, recipe_text(plan))
        if not plan.to_file:
            self._write_indices()
            self._side_files.copy(self.out)

    def write_report(self, text: str) -> None:
        """Write the report beside the tensors."""
        write_own(self.out / report_path(self.plan.target).name, text)

    def _write_indices(self) -> None:
        plan, steps = self.plan, self._steps
        if len(self._means) > 1:
            shards = {f.name: list(n) for f, n in zip(self._means, plan.shards, strict=True)}
            write_index(self.out, "model", shards, sum(step.spec.nbytes for step in plan.steps))
        stored = {
            file.name: [part for n in names for part in steps[n].precision_parts]
            for file, names, sink in zip(
                self._precisions, plan.shards, self._precision_sinks, strict=True
            )
            if sink is not None
        }
        if stored:
            precisions = (step.precision_spec for step in plan.steps)
            size = sum(spec.nbytes for spec in precisions if spec is not None)
            write_precision_index(self.out / POSTERIOR_FOLDER, stored, size)


def _identified(
    plan: MergePlan, info: PosteriorInfo, means: list[Path], guarded_share: float
) -> PosteriorInfo:
    """The merge's record with its own identity, which only the written mean can give."""
    assert info.merge is not None
    with SafetensorsSource(means) as written:
        identity = identify(written, full=plan.config.verify)
    merge = info.merge.model_copy(update={"guarded_share": math.ceil(1e6 * guarded_share) / 1e6})
    return info.model_copy(update={"mean": identity, "merge": merge})
