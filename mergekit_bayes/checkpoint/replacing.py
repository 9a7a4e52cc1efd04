"""Write beside the target and rename at the end, so that a final name is never half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_bayes.errors import CheckpointError


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def refuse_foreign(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that holds something else than a model: `--force` leaves
    it alone.
    """
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not any(f for g in _OF_A_MODEL for f in folder.glob(g))
    ):
        raise CheckpointError(
            f"'{folder}' is a folder without a model in it, which --force leaves alone. Choose "
            "another -o, or remove "
            "it yourself."
        )


_OF_A_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json", "merge_report.json")


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end; nothing is left behind on
    failure.

    Raises `CheckpointError` if the target exists and `force` is False, or when the disk says no.
    """
    if target.exists() and not force:
        raise CheckpointError(
            f"'{target}' exists. Choose another -o, or pass --force to replace it."
        )
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        partial = scratch / target.name
        yield partial
        if target.is_dir() and not target.is_symlink():
            _swap_folder(target, partial, scratch / "replaced")
        else:
            os.replace(partial, target)
    except OSError as error:
        raise CheckpointError(f"{target}: writing failed ({error.strerror or error}).") from None
    finally:
        if partial is not None:
            shutil.rmtree(partial.parent, ignore_errors=True)


def _swap_folder(target: Path, new: Path, aside: Path) -> None:
    """A folder cannot be replaced in one step: move it aside, and back if the new one cannot take
    its place.
    """
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise
