"""Checkpoints of a run: which are complete, and which run may continue from them.

The Trainer writes a checkpoint file by file. When all ranks have written their files, these are
flushed to the disk and a marker with their sizes is renamed into place. A folder without the
marker, or with files of other sizes, is torn.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from mergekit_bayes.checkpoint.contained import copy_contained
from mergekit_bayes.checkpoint.own_files import make_own_folder, refuse_planted, write_own
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.documents import DocumentError, read_mapping, read_record
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.libraries import call
from mergekit_bayes.records import Frozen

logger = logging.getLogger(__name__)

MARKER = "whole.json"
LOGS = "runs"  # in the output; the Trainer's own name for the folder of TensorBoard's files


class Checkpoint(NamedTuple):
    """A complete checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps made.
        settings: Identity of the run that wrote it, from `identity_of`.
        loss: Sum of the training loss over its steps.
    """

    path: Path
    step: int
    settings: dict[str, object]
    loss: float


class _Marker(Frozen):
    """What the marker of a checkpoint records.

    Attributes:
        format: Version of this record.
        step: As in `Checkpoint`.
        loss: As in `Checkpoint`.
        settings: As in `Checkpoint`.
        files: Bytes of each file by its name in the checkpoint.
    """

    format: Literal[1] = 1
    step: int = Field(gt=0)
    loss: float
    settings: dict[str, Any]
    files: dict[str, int]


def checkpoints_of(target: Path) -> Path:
    """The folder for the checkpoints of the run that writes `target`."""
    return target.with_name(f"{target.name}.checkpoints")


def has_folder(config: FinetuneConfig) -> bool:
    """Whether a run writes into `checkpoints_of` its output: checkpoints, or the files of logs."""
    return config.save_steps is not None or bool(set(config.report_to) - {"none"})


def make_checkpoint_folder(folder: Path) -> None:
    """Make the folder for the checkpoints, or check that this account has made it.

    What is in it is loaded with --resume and removed with --force. A link of this account is
    followed: checkpoints are large, and may be kept on another disk.

    Raises:
        CheckpointError: It is no folder of this account, or cannot be made.
    """
    if folder.is_symlink() and folder.lstat().st_uid == os.geteuid():
        folder = folder.resolve()
    make_own_folder(folder)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the folder of the checkpoints against other runs; at the end remove it if it is empty.

    Raises:
        CheckpointError: Another run holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"'{folder}': another run writes its checkpoints there. Wait for it, or choose another "
            "output."
        ) from None
    except OSError:  # of a disk without locks
        pass
    try:
        yield
    finally:
        remove_if_empty(folder)  # of a run that ended before its first file
        os.close(descriptor)


def open_checkpoints(folder: Path, *, resume: bool, force: bool) -> Checkpoint | None:
    """Find the newest complete checkpoint to continue from.

    Args:
        folder: Where the checkpoints are.
        resume: Continue from there. Torn checkpoints are skipped with a note, and will be written
            again.
        force: Without `resume`, remove the checkpoints of an earlier run.

    Returns:
        The checkpoint, or None for a run from the first step.

    Raises:
        CheckpointError: The folder holds checkpoints and neither `resume` nor `force` is set, or
            something that no training writes, such as a link, is in the place of a file.
    """
    if folder.is_dir():
        refuse_planted(folder.resolve(), but=folder.resolve() / LOGS)
    paths = _checkpoint_folders(folder)
    if not resume:
        if paths and not force:
            raise CheckpointError(
                f"'{folder}' holds checkpoints of an earlier run (the last is {paths[-1].name}). "
                "Continue it with --resume, replace it with --force, or choose another output."
            )
        for path in paths:
            _remove(path)
        return None
    for path in reversed(paths):
        try:
            marker = _read_marker(path)
        except DocumentError as error:
            logger.warning("'%s' is torn (%s): skipped.", path, error)
        else:
            return Checkpoint(path, marker.step, marker.settings, marker.loss)
        # Else it could vouch for files that the resumed run has only half written again.
        if (path / MARKER).is_dir():
            raise CheckpointError(f"{path / MARKER}: is a folder. Remove it, and resume again.")
        (path / MARKER).unlink(missing_ok=True)
    logger.warning("'%s' holds no whole checkpoint: training starts from the first step.", folder)
    return None


def refuse_broken(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose files the Trainer could not read, before it has changed anything.

    Raises:
        CheckpointError: A file of the right size holds something else.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    advice = f"Remove {checkpoint.path}, to resume from the checkpoint before it."
    read_mapping(checkpoint.path / "trainer_state.json", advice)
    for file in sorted(checkpoint.path.glob("*.pt*")):
        with safe_globals():  # the random states are arrays of numpy
            call(
                f"{file}: cannot be read",
                partial(torch.load, file, map_location="cpu", weights_only=True, mmap=True),
                advice,
            )


def copy_logs(folder: Path, output: Path) -> None:
    """Copy what the Trainer's reporters left beside the checkpoints to `runs` in the output.

    Args:
        folder: Where the Trainer wrote.
        output: The model's folder, not yet under its name.
    """
    for path in _log_files(folder):
        inner = path.relative_to(folder)
        target = output / (inner if inner.parts[0] == LOGS else Path(LOGS, inner))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_contained(folder, inner, target)
        except CheckpointError as error:  # a log is not worth the training
            logger.warning("a log is left out: %s", error)


def close_checkpoints(folder: Path, *, keep: bool) -> None:
    """Remove what a stored model makes superfluous: its checkpoints, and the logs copied into it.

    Args:
        folder: Where the Trainer wrote.
        keep: Keep the checkpoints.
    """
    for path in _log_files(folder):
        path.unlink()
    for path in () if keep else _checkpoint_folders(folder):
        _remove(path)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which there is no file."""
    is_empty = folder.is_dir() and not any(path.is_file() for path in folder.rglob("*"))
    if is_empty and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)  # it may be of another account


def mark_whole(path: Path, step: int, settings: Mapping[str, object], loss: float) -> None:
    """Flush a checkpoint's files to the disk, then put its marker in place.

    Call this when all ranks have written their files.

    Args:
        path: The checkpoint's folder.
        step: Optimizer steps made.
        settings: Identity of the run, from `identity_of`.
        loss: Sum of the training loss over its steps.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        sync_path(file)
    marker = _Marker(
        step=step,
        loss=loss,
        settings=dict(settings),
        files={str(file.relative_to(path)): file.stat().st_size for file in files},
    )
    partial = path / f"{MARKER}.partial"
    write_own(partial, json.dumps(marker.model_dump(), indent=1))
    sync_path(partial)
    os.replace(partial, path / MARKER)
    sync_path(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; of a link to one only the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def _log_files(folder: Path) -> list[Path]:
    """Files of a run's folder that belong to no checkpoint."""
    checkpoints = _checkpoint_folders(folder)
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(path.is_relative_to(c) for c in checkpoints)
    ]


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, in order of N."""
    steps = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and path.is_dir():
            steps[path] = int(number)
    return sorted(steps, key=steps.__getitem__)


def _read_marker(path: Path) -> _Marker:
    """The marker of a checkpoint.

    Raises:
        DocumentError: The checkpoint is not complete; the text says why.
    """
    file = path / MARKER
    if not os.path.lexists(file):
        raise DocumentError("it was never finished")
    try:
        marker = read_record(_Marker, file)
    except CheckpointError:
        raise DocumentError(f"its {MARKER} cannot be read") from None
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    for name, size in marker.files.items():
        if (actual := sizes.get(name)) != size:
            problem = "is missing" if actual is None else f"holds {actual}"
            raise DocumentError(f"{name} should hold {size} bytes and {problem}")
    return marker
