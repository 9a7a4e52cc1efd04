"""Config, tokenizer, chat template, code and the like, which a merged model takes from inputs."""

import json
from collections.abc import Mapping
from pathlib import Path

from mergekit_bayes.checkpoint.model_config import change_config
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.side_files import CHAT_TEMPLATE, check_readable, copy_side_file
from mergekit_bayes.documents import read_mapping
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
    """The side files of a merge into a folder, as the plan chose them.

    Args:
        plan: The merge. Beside a single output file there are no side files.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._choice = plan, plan.side_files
        donor = plan.inputs.donor.posterior
        self._changes: dict[str, object] = {}
        self._changes_dtype = False
        if self._choice is not None:
            self._changes = {**self._choice.token_ids, **plan.config_changes}
            # An adapted tensor is written in a finer dtype than that of its base.
            self._changes_dtype = (
                plan.config.dtype is not None
                or self._choice.config_folder != donor.path
                or donor.mean.is_computed
            )

    def check(self) -> None:
        """Find what cannot be copied before the first tensor is merged.

        Raises:
            CheckpointError: A file cannot be read, or a config to be changed is not JSON.
        """
        if self._choice is None:
            return
        files = self._choice.gathered.files
        check_readable(files)
        file = files.get(Path("config.json"))
        if file is not None and (self._changes_dtype or self._changes):
            read_mapping(file, "The output needs it: save that model again.")

    def copy(self, out: Path) -> None:
        """Copy the side files, and write what is true of the output into the copied configs."""
        if self._choice is None:
            return
        for name, file in self._choice.gathered.files.items():
            copy_side_file(file, name, out)
        if self._choice.gathered.template is not None:
            (out / CHAT_TEMPLATE).write_text(self._choice.gathered.template, encoding="utf-8")
        for made, text in self._plan.made_files.items():
            (out / made).unlink(missing_ok=True)
            if text is not None:
                write_own(out / made, text)
        dtype = _CONFIG_DTYPE[self._main_dtype()] if self._changes_dtype else None
        _rewrite(out / "config.json", self._changes, dtype)
        _rewrite(out / "generation_config.json", self._choice.generation_ids, None)

    def _main_dtype(self) -> str:
        """The dtype that holds most of the parameters."""
        sizes = dict.fromkeys(_CONFIG_DTYPE, 0)
        for step in self._plan.steps:
            if step.spec.dtype in sizes and step.tied_to is None:
                sizes[step.spec.dtype] += step.spec.size
        return self._plan.config.dtype or max(sizes, key=lambda dtype: sizes[dtype])


def _rewrite(file: Path, changes: Mapping[str, object], dtype: str | None) -> None:
    """Set keys and the dtype in a config, if there is one; nothing to set leaves its bytes."""
    if not file.exists() or not (changes or dtype):
        return
    content = read_mapping(file)
    before = json.dumps(content)
    if dtype is not None:
        _set_dtype(content, dtype)
    change_config(content, changes)
    if json.dumps(content) != before:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: object, dtype: str) -> None:
    """Set the dtype in a config, and in those of a model's components."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif key.endswith("_config"):
            _set_dtype(value, dtype)
