"""Names and shards of the output."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.layout import old_precision_path, precision_path
from mergekit_bayes.checkpoint.own_files import refuse_foreign_link
from mergekit_bayes.checkpoint.replacing import real_output, refuse_foreign
from mergekit_bayes.checkpoint.side_files import MERGE_RECIPE, MERGE_REPORT
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.options import parse_size
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior import Posterior


def choose_target(config: MergeConfig, inputs: Inputs) -> Path:
    """The output's path: what `-o` says, else `merged`, as a file if all models are files.

    Raises:
        CheckpointError: The output exists, or would replace an input or something that is not a
            model.
        ConfigError: `-o` names nothing that can be created.
    """
    are_files = all(model.posterior.is_file for model in inputs)
    target = Path(config.out or ("merged.safetensors" if are_files else "merged")).expanduser()
    if target.name in ("", "..") or "\0" in target.name:
        raise ConfigError(f"-o {config.out}: name a new folder, or a .safetensors file.")
    if target.is_symlink():
        refuse_foreign_link(target)
        target = real_output(target)  # what the link points to is replaced, not the link
    written = [target]
    if target.suffix == ".safetensors":
        # The precision also where none is written: an old one would not belong to the new mean.
        written += [report_path(target), recipe_path(target)]
        written += [precision_path(target), old_precision_path(target)]
    for model in inputs:
        _refuse_overwriting(target, written, model.posterior)
    for path in written:
        refuse_replacing(path, target, force=config.force)
    return target


def refuse_replacing(path: Path, target: Path, *, force: bool) -> None:
    """Refuse to replace what is at a path of the output.

    Args:
        path: The output, or a file that is written beside it.
        target: The output.
        force: Whether a model that is there is replaced.

    Raises:
        CheckpointError: It exists and is not to be replaced, or is no model.
    """
    # A merge that was stopped while its files were put in place has left some of them there, and
    # is resumed.
    if path.exists() and not force and not partial_path(target).exists():
        raise CheckpointError(f"'{path}' exists. Choose another -o, or pass --force to replace it.")
    if path.exists() and path.is_dir() == (path.suffix == ".safetensors" or path != target):
        conflict = "a folder, and a file" if path.is_dir() else "a file, and a folder"
        raise CheckpointError(
            f"'{path}' is {conflict} would replace it. Choose another -o, or remove it yourself."
        )
    refuse_foreign(path)


def split_shards(
    config: MergeConfig, steps: Sequence[Step], donor: Posterior, target: Path
) -> tuple[tuple[str, ...], ...]:
    """The names of the tensors of each output file.

    With `--max-shard-size` the files are filled up in order; otherwise they are the donor's.

    Args:
        config: The settings.
        steps: The tensors of the output.
        donor: The model whose shards the output has.
        target: The output.

    Raises:
        ConfigError: The output is one file and larger than `--max-shard-size`.
    """
    size = sum(step.spec.nbytes for step in steps)
    limit = parse_size(config.max_shard_size) if config.max_shard_size is not None else None
    if target.suffix == ".safetensors":
        if limit is not None and size > limit:
            raise ConfigError(
                f"--max-shard-size {config.max_shard_size}: {target} is one file and needs "
                f"{size:,} bytes. Name a folder with -o."
            )
        return (tuple(step.name for step in steps),)
    if limit is None:
        shards: dict[int, list[str]] = {}
        for step in steps:
            # A tensor that the donor does not store goes where what it is made of lies.
            name = step.name if step.name in donor.mean.specs else step.donor.mean.name
            shards.setdefault(donor.mean.file_of(name), []).append(step.name)
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


def report_path(target: Path) -> Path:
    """Where a merge's report goes: beside a file, inside a folder."""
    if target.suffix == ".safetensors":
        return target.with_name(f"{target.stem}.{MERGE_REPORT}")
    return target / MERGE_REPORT


def recipe_path(target: Path) -> Path:
    """Where a merge's resolved recipe goes: beside a file, inside a folder."""
    if target.suffix == ".safetensors":
        return target.with_name(f"{target.stem}.{MERGE_RECIPE}")
    return target / MERGE_RECIPE


def partial_path(target: Path) -> Path:
    """Where a merge is written until it is complete."""
    return target.with_name(target.name + ".partial")


def _refuse_overwriting(target: Path, written: Sequence[Path], model: Posterior) -> None:
    for file in (path.resolve() for path in model.inputs):
        if any(path.resolve() in (file, *file.parents) for path in written):
            raise CheckpointError(
                f"-o {target} would overwrite '{model.ref}', an input. Choose another -o."
            )
