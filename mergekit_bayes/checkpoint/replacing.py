"""Write beside the target and rename at the end, so that no output is ever half written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergekit_bayes.checkpoint.side_files import MERGE_REPORT
from mergekit_bayes.errors import CheckpointError

# A folder with one of these files may be replaced by `--force`.
_OF_A_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json", MERGE_REPORT)


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path beside `target` to write to, and rename it to `target` at the end.

    After a failure the target is as it was, and nothing else is left behind.

    Args:
        target: The file or folder to make.
        force: Replace what is there.

    Raises:
        CheckpointError: The target exists and `force` is False, or the disk refuses to write.
    """
    if target.exists() and not force:
        raise CheckpointError(
            f"'{target}' exists. Choose another -o, or pass --force to replace it."
        )
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:60]}.", dir=target.parent))
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


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace a folder that holds something other than a model, even with `--force`.

    Raises:
        CheckpointError: The folder holds files, and none of them is a model's.
    """
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not any(f for g in _OF_A_MODEL for f in folder.glob(g))
    ):
        raise CheckpointError(
            f"'{folder}' is a folder without a model in it, which --force leaves alone. Choose "
            "another -o, or remove it yourself."
        )


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    with ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


def _swap_folder(target: Path, new: Path, aside: Path) -> None:
    """Replace a folder, which takes two steps: the old one moves aside, and back on failure."""
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise
