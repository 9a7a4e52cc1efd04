"""Config, tokenizer, chat template, code and the like, which a merged model takes from an input."""

import json
from pathlib import Path

from mergekit_bayes.checkpoint.side_files import check_side_files, copy_side_files
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.plan import MergePlan

_CONFIG_DTYPE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class SideFiles:
    """The side files of a merge into a folder: those of the first input that is a folder.

    Args:
        plan: The merge. Beside a single output file there are no side files.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        folders = (m for m in plan.inputs if m.posterior.path.is_dir())
        model = None if plan.to_file else next(folders, None)
        self._folder = None if model is None else model.posterior.path
        self._changes_dtype = plan.config.dtype is not None or model is not plan.inputs.donor
        self._changes = plan.config_changes

    def check(self) -> None:
        """Find what cannot be copied before the first tensor is merged.

        Raises:
            CheckpointError: A file cannot be read, or a config to be changed is not JSON.
        """
        if self._folder is None:
            return
        check_side_files(self._folder)
        file = self._folder / "config.json"
        if file.exists() and (self._changes_dtype or self._changes):
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                raise CheckpointError(f"{file}: is not JSON ({error}).") from None

    def copy(self, out: Path) -> None:
        """Copy the side files, and write what is true of the output into the copied config."""
        if self._folder is None:
            return
        copy_side_files(self._folder, out, but="adapter_*")
        config = out / "config.json"
        if config.exists() and (self._changes_dtype or self._changes):
            content = json.loads(config.read_text())
            if self._changes_dtype:
                _set_dtype(content, _CONFIG_DTYPE[self._main_dtype()])
            for key, value in self._changes.items():
                if value is None:
                    content.pop(key, None)
                else:
                    content[key] = value
            config.write_text(json.dumps(content, indent=2) + "\n")

    def _main_dtype(self) -> str:
        """The dtype that holds most of the parameters."""
        sizes = dict.fromkeys(_CONFIG_DTYPE, 0)
        for step in self._plan.steps:
            if step.spec.dtype in sizes:
                sizes[step.spec.dtype] += step.spec.size
        return self._plan.config.dtype or max(sizes, key=lambda dtype: sizes[dtype])


def _set_dtype(config: object, dtype: str) -> None:
    """Set the dtype in a config, and in those of a model's components."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config"):
            _set_dtype(value, dtype)
