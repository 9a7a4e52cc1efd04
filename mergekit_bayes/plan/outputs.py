"""Names and shards of the output."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.checkpoint.replacing import refuse_foreign
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.lora import AdaptedSource
from mergekit_bayes.plan.options import parse_size
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior import Posterior


def split_shards(
    config: MergeConfig, steps: Sequence[Step], donor: Posterior, target: Path
) -> tuple[tuple[str, ...], ...]:
    """Tensors by output file: filled up in order to the size asked for, else as the donor has them."""
    size = sum(s.spec.nbytes for s in steps)
    limit = parse_size(config.max_shard_size) if config.max_shard_size is not None else None
    if target.suffix == ".safetensors":
        if limit is not None and size > limit:
            raise ConfigError(
                f"--max-shard-size {config.max_shard_size}: {target} is one file and needs "
                f"{size:,} bytes. "
                "Name a folder with -o."
            )
        return (tuple(s.name for s in steps),)
    if limit is None:
        shards: dict[int, list[str]] = {}
        for step in steps:
            shards.setdefault(donor.mean.file_of(step.name), []).append(step.name)
        return tuple(tuple(names) for _, names in sorted(shards.items()))
    filled: list[list[str]] = [[]]
    room = limit
    for step in steps:
        if step.spec.nbytes > room and filled[-1]:
            filled.append([])
            room = limit
        filled[-1].append(step.name)
        room -= step.spec.nbytes
    return tuple(tuple(names) for names in filled)


def choose_target(config: MergeConfig, models: Sequence[Posterior]) -> Path:
    files_only = all(m.is_file for m in models)
    target = Path(config.out or ("merged.safetensors" if files_only else "merged")).expanduser()
    if target.name in ("", "..") or "\0" in target.name:
        raise ConfigError(f"-o {config.out}: name a new folder, or a .safetensors file.")
    if target.is_symlink():
        target = target.resolve()  # what the link points to is replaced, not the link
    written = [target]
    if target.suffix == ".safetensors":
        written += [report_path(target), recipe_path(target)]
        written.append(
            precision_path(target)
        )  # also where none is written: an old one would not belong
    for model in models:
        inputs = [*model.mean.files, *(model.precision.files if model.precision else ())]
        if isinstance(model.mean, AdaptedSource):
            inputs += model.mean.adapter.posterior.mean.files
        if any(
            p.resolve() == w.resolve() or w.resolve() in p.resolve().parents
            for p in inputs
            for w in written
        ):
            raise CheckpointError(
                f"-o {target} would overwrite '{model.ref}', an input. Choose another -o."
            )
    for path in written:
        # A merge that was stopped while it put its files in place has some of them there, and goes
        # on.
        if path.exists() and not config.force and not partial_path(target).exists():
            raise CheckpointError(
                f"'{path}' exists. Choose another -o, or pass --force to replace it."
            )
        if path.exists() and path.is_dir() == (path.suffix == ".safetensors" or path != target):
            kind = "a folder, and a file" if path.is_dir() else "a file, and a folder"
            raise CheckpointError(
                f"'{path}' is {kind} would replace it. Choose another -o, or remove it yourself."
            )
        refuse_foreign(path)
    return target


def report_path(target: Path) -> Path:
    """Where a merge's report goes: beside a file, inside a folder."""
    if target.suffix == ".safetensors":
        return target.with_name(target.name.removesuffix(".safetensors") + ".merge_report.json")
    return target / "merge_report.json"


def recipe_path(target: Path) -> Path:
    """Where a merge's resolved recipe goes: beside a file, inside a folder."""
    if target.suffix == ".safetensors":
        return target.with_name(target.name.removesuffix(".safetensors") + ".merge_recipe.yaml")
    return target / "merge_recipe.yaml"


def partial_path(target: Path) -> Path:
    """Where a merge lies until it is whole."""
    return target.with_name(target.name + ".partial")
