"""The folder `OUT.stages`, in which the outputs lie that only other documents need.

Beside each output a record says of which plan it is, and which files the merge wrote. Only these
are removed: what else lies there is somebody's, and stays.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mergekit_bayes.checkpoint.own_files import make_own_folder, write_own
from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import BmergeError, CheckpointError
from mergekit_bayes.merge.run import plan_hash
from mergekit_bayes.plan import MergePlan, partial_path
from mergekit_bayes.records import Record

RECORD = ".plan.json"  # ending of the record of an output


class StageRecord(Record):
    """Which merge an output is.

    Attributes:
        plan: SHA-256 of all that decides its bytes.
        files: The files that the merge wrote, relative to the output; None until it is complete.
    """

    plan: str
    files: tuple[str, ...] | None = None


def is_done(plan: MergePlan) -> bool:
    """Whether the output of a plan is there already: of the same models, recipe and flags."""
    record = _record(plan.target)
    if record is None or not plan.target.is_dir() or partial_path(plan.target).exists():
        return False
    return record.plan == _hash(plan) and not set(record.files or ()) - set(_files(plan.target))


def begin(plan: MergePlan) -> None:
    """Record which merge will be there, and remove the output of another one.

    Raises:
        CheckpointError: Files are in the way that no merge wrote, or the folder is another
            account's or cannot be written.
    """
    target, plan_id = plan.target, _hash(plan)
    refuse_taken(target)
    record = _record(target)
    try:
        make_own_folder(target.parent)
        is_whole = record is not None and record.plan == plan_id and partial_path(target).exists()
        if record is not None and not is_whole:  # else the merge puts what is there in place
            if foreign := set(_files(target)) - set(record.files or _files(target)):
                raise _taken(target / min(foreign))
            _remove_files(target, record)
        write_own(_record_path(target), StageRecord(plan=plan_id).model_dump_json() + "\n")
    except OSError as error:
        raise _failed(target, error) from error


def finish(plan: MergePlan) -> None:
    """Record which files a merge that is complete has written.

    Raises:
        CheckpointError: The record cannot be written.
    """
    record = StageRecord(plan=_hash(plan), files=tuple(_files(plan.target)))
    try:
        write_own(_record_path(plan.target), record.model_dump_json() + "\n")
    except OSError as error:
        raise _failed(plan.target, error) from error


def refuse_taken(target: Path) -> None:
    """Refuse the place of an output in which lies what no merge of a stage wrote.

    Raises:
        CheckpointError: A file or folder is there without a record, or a link.
    """
    if os.path.lexists(target) and (_record(target) is None or target.is_symlink()):
        raise _taken(target)


def remove_stages(targets: Iterable[Path]) -> None:
    """Remove what the merges of stages wrote, and their folders where nothing else is left in them.

    Args:
        targets: The outputs.
    """
    folders = set()
    for target in targets:
        folders.add(target.parent)
        with suppress(OSError):
            _remove_files(target, _record(target))
            _record_path(target).unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # something else lies in it
            folder.rmdir()


def _hash(plan: MergePlan) -> str:
    """SHA-256 of all that decides the bytes of all files of an output."""
    copied = {}
    for file in plan.documents:
        with suppress(OSError), file.open("rb") as stream:
            copied[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    content = json.dumps([plan_hash(plan), copied], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + RECORD)


def _record(target: Path) -> StageRecord | None:
    try:
        return read_record(StageRecord, _record_path(target))
    except (BmergeError, OSError):
        return None


def _files(folder: Path) -> list[str]:
    """All files of a folder, relative to it; links are not followed."""
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _remove_files(target: Path, record: StageRecord | None) -> None:
    """Remove the files that a record lists, and folders without any other."""
    if record is None or target.is_symlink():
        return
    for name in _files(target):
        if record.files is None or name in record.files:
            (target / name).unlink()
    for parent, _, _ in os.walk(target, topdown=False):
        with suppress(OSError):
            os.rmdir(parent)


def _taken(target: Path) -> CheckpointError:
    return CheckpointError(
        f"'{target}' is where the output of a document goes, and no merge of it wrote that. Move "
        "it elsewhere, or choose another -o."
    )


def _failed(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{error.filename or target}: {error.strerror or error}. Once that is solved, the same "
        "command goes on."
    )
