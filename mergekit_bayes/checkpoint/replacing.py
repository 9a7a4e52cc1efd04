"""Write beside the target and rename at the end, so that no output is ever half written."""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergekit_bayes.checkpoint.scratch import Scratch, remove_left_over
from mergekit_bayes.checkpoint.side_files import MERGE_REPORT
from mergekit_bayes.errors import CheckpointError

# A folder with one of these files may be replaced by `--force`.
_OF_A_MODEL = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.posterior",
    MERGE_REPORT,
)

_LONGEST = 200  # bytes of a target's name in that of the folder beside it


@contextmanager
def replacing(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path beside `target` to write to, and rename it to `target` at the end.

    After a failure the target is as it was, and nothing else is left behind. What a killed process
    has left is removed by the next one with the same target. What appears at the target meanwhile
    is kept unless `force`. A link is replaced itself, never what it points to.

    Args:
        target: The file or folder to make.
        force: Replace what is there.

    Raises:
        CheckpointError: The target exists and `force` is False, or the disk refuses to write.
    """
    if os.path.lexists(target) and not force:
        remove_left_over(target.parent, _prefix(target))
        raise _exists(target)
    old: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(target.parent, _prefix(target)) as scratch:
            old = scratch.old
            if os.path.lexists(target) and not force:  # put back after a kill
                raise _exists(target)
            with _named(scratch.new / target.name, target) as partial:
                yield partial
            _publish(scratch.new / target.name, target, scratch.old if force else None)
    except OSError as error:
        kept = f" What was there before is in {old}." if old and os.path.lexists(old) else ""
        raise CheckpointError(
            f"{target}: writing failed ({error.strerror or error}).{kept}"
        ) from None


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


def refuse_inputs(target: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output in whose place an input lies: `--force` would delete it.

    Args:
        target: The output.
        inputs: What is read; a Hub id and other things that are no path here do no harm.

    Raises:
        CheckpointError: One of them is the target, or lies in it.
    """
    if not os.path.lexists(target):
        return
    place = os.path.realpath(target)
    for name in inputs:
        path = os.path.expanduser(name)
        if os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(place):
            raise CheckpointError(
                f"the output '{target}' would replace '{name}', an input. Choose another."
            )


def real_output(path: Path) -> Path:
    """Where an output is written that may be a link.

    Raises:
        CheckpointError: The link leads to itself.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise CheckpointError(f"'{path}' is a link that leads to itself. Choose another -o.")
    return real


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    with ExitStack() as stack:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


@contextmanager
def _named(partial: Path, target: Path) -> Iterator[Path]:
    """Inside, what a message says of the path beside the target is said of the target."""
    try:
        yield partial
    except CheckpointError as error:
        if str(partial) not in str(error):
            raise
        raise type(error)(str(error).replace(str(partial), str(target))) from None


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(f"'{target}' exists. Choose another -o, or pass --force to replace it.")


def _prefix(target: Path) -> str:
    """How the folder beside the target is called; with the rest it fits into 255 bytes."""
    return f".{os.fsdecode(os.fsencode(target.name)[:_LONGEST])}.bmerge-"


def _publish(new: Path, target: Path, old: Path | None) -> None:
    """Give the output its name; `old` is where to move what is there, None to leave it there."""
    if old is None:
        _move(new, target)
    elif os.path.lexists(target) and (_is_folder(target) or _is_folder(new)):
        # This takes two steps. If the second one fails, `Scratch` takes the first one back.
        os.rename(target, old)
        os.rename(new, target)
    else:
        os.replace(new, target)


def _move(new: Path, target: Path) -> None:
    """Rename to a free name, which may have been taken meanwhile."""
    try:
        if _is_folder(new):
            os.rename(new, target)  # replaces nothing but an empty folder
            return
        try:
            os.link(new, target)
        except FileExistsError:
            raise
        except OSError:  # of a disk without hard links: a moment remains between look and rename
            if os.path.lexists(target):
                raise FileExistsError from None
            os.replace(new, target)
    except OSError:
        if os.path.lexists(target):
            raise _exists(target) from None
        raise


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
