"""Checkpoints of a run, whole or torn, and what a run must share with the checkpoint that it
continues.

The Trainer writes a checkpoint file by file. When all ranks have written theirs, the files are
flushed to the disk and a marker with their sizes is renamed into place; a folder without it, or
with other sizes, is torn.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.posterior import Identity

logger = logging.getLogger(__name__)

MARKER = "whole.json"
# Settings that may change between a run and its continuation: where things go, and what happens
# after training.
_FREE = {
    "output",
    "model",
    "data",
    "resume",
    "force",
    "report_to",
    "num_processes",
    "posterior",
    "flush_batches",
}


class Checkpoint(NamedTuple):
    """A whole checkpoint; `loss` is the sum of the training loss over its steps."""

    path: Path
    step: int
    settings: dict[str, Any]
    loss: float


def checkpoints_of(target: Path) -> Path:
    """Where the checkpoints of the run that writes `target` are kept."""
    return target.with_name(f"{target.name}.checkpoints")


def open_checkpoints(folder: Path, *, resume: bool, force: bool) -> Checkpoint | None:
    """The newest whole checkpoint to continue from, or None for a run from the start.

    With `resume`, torn checkpoints after it are skipped, with a note, and will be written again;
    without, the folder must hold none, or `force` removes them.

    Raises `CheckpointError` if the folder holds checkpoints and neither was asked for.
    """
    found = _folders(folder)
    if not resume:
        if found and not force:
            raise CheckpointError(
                f"'{folder}' holds checkpoints of an earlier run (the last is {found[-1].name}). "
                "Continue it with "
                "--resume, replace it with --force, or choose another output."
            )
        for path in found:
            shutil.rmtree(path)
        return None
    while found:
        path = found.pop()
        why = _torn(path)
        if why is None:
            about = json.loads((path / MARKER).read_text())
            return Checkpoint(path, about["step"], about["settings"], about["loss"])
        logger.warning("'%s' is torn (%s): skipped.", path, why)
        (path / MARKER).unlink(
            missing_ok=True
        )  # or it could vouch for files half of which were written again
    logger.warning("'%s' holds no whole checkpoint: training starts from the first step.", folder)
    return None


def mark_whole(path: Path, step: int, settings: Mapping[str, Any], loss: float) -> None:
    """Flush a checkpoint's files to the disk, then put its marker in place. Call when all ranks
    have written.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        _flush(file)
    about = {
        "format": 1,
        "step": step,
        "loss": loss,
        "settings": dict(settings),
        "files": {str(f.relative_to(path)): f.stat().st_size for f in files},
    }
    partial = path / f"{MARKER}.partial"
    partial.write_text(json.dumps(about, indent=1))
    _flush(partial)
    os.replace(partial, path / MARKER)
    _flush(path)


def identity_of(
    config: FinetuneConfig,
    settings: Mapping[str, Any],
    base: Identity | None,
    examples: Sequence[Mapping[str, Any]],
    processes: int,
) -> dict[str, Any]:
    """All that decides the bits of a training run, as JSON values; the model and the data by what
    they hold.
    """
    found: dict[str, Any] = {
        k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE
    }
    found |= {
        k: v for k, v in settings.items() if found.get(k) is None
    }  # what was left out, as it was chosen
    found |= {
        "model": base.blocks if base is not None else config.model,
        "data": _digest(examples),
        "processes": processes,
    }
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def refuse_other_settings(checkpoint: Checkpoint, here: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` that names every setting in which the checkpoint differs from this run."""
    there = checkpoint.settings
    lines = []
    for name in sorted(set(there) | set(here)):
        if there.get(name) != here.get(name):
            if name in ("model", "data"):
                lines.append(f"{name} holds something else")
            else:
                lines.append(f"{name} is {there.get(name)} there and {here.get(name)} here")
    if lines:
        raise ConfigError(
            f"'{checkpoint.path}' belongs to a run with other settings: {'; '.join(lines)}. Resume "
            "with the settings "
            "of the checkpoint, or leave --resume out and start anew with --force."
        )


def _folders(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, by N."""
    found = [
        p
        for p in folder.glob("checkpoint-*")
        if p.name.removeprefix("checkpoint-").isdigit() and p.is_dir()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _torn(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is."""
    try:
        sizes = json.loads((path / MARKER).read_text())["files"]
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, KeyError):
        return f"its {MARKER} cannot be read"
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} should hold {size} bytes and {'is missing' if found is None else f'holds {found}'}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(examples: Sequence[Mapping[str, Any]]) -> str:
    found = hashlib.sha256()
    for example in examples:
        for name in sorted(example):
            values = np.atleast_1d(np.asarray(example[name], dtype=np.int64))
            found.update(f"{name} {len(values)} ".encode())
            found.update(values.tobytes())
    return found.hexdigest()
