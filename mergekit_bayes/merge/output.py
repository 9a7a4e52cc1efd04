"""The files of a merge: opened in `OUT.partial`, finished, and put under their final names."""

import json
import math
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.layout import precision_path, write_index
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.side_files import copy_side_files, side_files
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Closing, TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.recipe import recipe_text
from mergekit_bayes.merge.work import Sinks
from mergekit_bayes.plan import MergePlan, recipe_path, report_path
from mergekit_bayes.posterior import PosteriorInfo, identify, write_info


class Output(Closing):
    """The sinks of a merge, by tensor. Any number of processes may hold them at once.

    Raises `LostError` if the files should have `begun` and one is not there or not in its size.
    """

    def __init__(self, plan: MergePlan, out: Path, *, begun: bool = False) -> None:
        self.plan, self.out, self._begun = plan, out, begun
        self._donor = (
            None if plan.to_file else next((m for m in plan.models if m.path.is_dir()), None)
        )
        self._check_side_files()
        count = len(plan.shards)
        if plan.to_file:
            self.means = [out / plan.target.name]
            self.precisions = [out / precision_path(plan.target).name]
        else:
            (out / "posterior").mkdir(exist_ok=True) if plan.info is not None else None
            self.means = [out / _shard("model", i, count) for i in range(count)]
            self.precisions = [
                out / "posterior" / _shard("precision", i, count) for i in range(count)
            ]
        self._mean_sinks: list[SafetensorsSink] = []
        self._precision_sinks: list[SafetensorsSink | None] = []
        self._of: dict[str, Sinks] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        plan = self.plan
        steps = {s.name: s for s in plan.steps}
        for i, names in enumerate(plan.shards):
            specs = {n: steps[n].spec for n in names}
            mean = SafetensorsSink(
                self.means[i], specs, {"format": "pt"}, shared=True, begun=self._begun
            )
            self._mean_sinks.append(mean)
            stored = {
                n: TensorSpec("F32", steps[n].precision_shape)
                for n in names
                if steps[n].precisions is not None
            }
            precision = None
            if plan.info is not None and stored:
                metadata = plan.info.to_metadata()
                precision = SafetensorsSink(
                    self.precisions[i], stored, metadata, shared=True, begun=self._begun
                )
            self._precision_sinks.append(precision)
            for name in names:
                self._of[name] = Sinks(mean, precision if name in stored else None)

    def sinks(self, name: str) -> Sinks:
        return self._of[name]

    def sync(self) -> None:
        for sink in (*self._mean_sinks, *self._precision_sinks):
            if sink is not None:
                sink.sync()

    def sync_names(self) -> None:
        """Wait until the disk has the names of the files."""
        for folder in (
            {file.parent for file in (*self.means, *self.precisions)}
            if self.plan.info
            else {self.out}
        ):
            sync_path(folder)

    def finish(self, guarded_share: float) -> None:
        """Write headers, the posterior's information, indices and side files; all tensors are
        there.
        """
        plan = self.plan
        for mean in self._mean_sinks:
            mean.close()
        if plan.info is not None:
            info = _own_info(plan, plan.info, self.means, guarded_share)
            for precision in self._precision_sinks:
                if precision is not None:
                    precision.metadata = info.to_metadata()
                    precision.close()
            if not plan.to_file:
                write_info(self.out / "posterior", info)
        recipe = recipe_path(plan.target).name
        (self.out / recipe).write_text(recipe_text(plan))
        if not plan.to_file:
            self._write_indices()
            self._copy_side_files()

    def _write_indices(self) -> None:
        if len(self.means) == 1:
            return
        plan = self.plan
        steps = {s.name: s for s in plan.steps}
        shards = {f.name: list(names) for f, names in zip(self.means, plan.shards, strict=True)}
        write_index(self.out, "model", shards, sum(s.spec.nbytes for s in plan.steps))
        if plan.info is None:
            return
        stored = {
            f.name: [n for n in names if steps[n].precisions is not None]
            for f, names, sink in zip(
                self.precisions, plan.shards, self._precision_sinks, strict=True
            )
            if sink is not None
        }
        size = sum(
            4 * math.prod(steps[n].precision_shape) for names in stored.values() for n in names
        )
        write_index(self.out / "posterior", "precision", stored, size)

    def _copy_side_files(self) -> None:
        """Config, tokenizer, chat template, code and the like, from the first model that is a
        folder.
        """
        if self._donor is None:
            return
        copy_side_files(self._donor.path, self.out, but="adapter_*")
        config = self.out / "config.json"
        if config.exists() and self._writes_another_dtype:
            content = json.loads(config.read_text())
            _set_dtype(content, _CONFIG_DTYPE[self._main_dtype()])
            config.write_text(json.dumps(content, indent=2) + "\n")

    @property
    def _writes_another_dtype(self) -> bool:
        return self.plan.config.dtype is not None or self._donor is not self.plan.donor

    def _check_side_files(self) -> None:
        """What cannot be copied is found before the first tensor is merged."""
        if self._donor is None:
            return
        for name in side_files(self._donor.path):
            file = self._donor.path / name
            try:
                with file.open("rb") as content:
                    content.read(1)
                if name == Path("config.json") and self._writes_another_dtype:
                    json.loads(file.read_bytes())
            except OSError as error:
                raise CheckpointError(
                    f"{file}: cannot be read ({error.strerror}); the output needs it."
                ) from None
            except ValueError as error:
                raise CheckpointError(f"{file}: is not JSON ({error}).") from None

    def _main_dtype(self) -> str:
        """The dtype that holds most of the parameters."""
        sizes = dict.fromkeys(_CONFIG_DTYPE, 0)
        for step in self.plan.steps:
            if step.spec.dtype in sizes:
                sizes[step.spec.dtype] += step.spec.size
        return self.plan.config.dtype or max(sizes, key=lambda dtype: sizes[dtype])

    def write_report(self, text: str) -> None:
        (self.out / report_path(self.plan.target).name).write_text(text)

    def close(self) -> None:
        for sink in (*self._mean_sinks, *self._precision_sinks):
            if sink is not None:
                sink.abandon()


_CONFIG_DTYPE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def _set_dtype(config: Any, dtype: str) -> None:
    """Say in a config, and in those of the parts of a model, what its parameters are stored in."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config"):
            _set_dtype(value, dtype)


def _own_info(
    plan: MergePlan, info: PosteriorInfo, means: list[Path], guarded_share: float
) -> PosteriorInfo:
    """The merge's info with its own identity, which only the written mean can give."""
    written = SafetensorsSource(means)
    try:
        who = identify(written, full=plan.config.verify)
    finally:
        written.close()
    assert info.merge is not None
    merge = info.merge.model_copy(update={"guarded_share": math.ceil(1e6 * guarded_share) / 1e6})
    return info.model_copy(update={"mean": who, "merge": merge})


def _shard(stem: str, index: int, count: int) -> str:
    return (
        f"{stem}.safetensors"
        if count == 1
        else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"
    )
