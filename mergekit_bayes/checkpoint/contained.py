"""Files that lie in a model's folder, and are not behind a link that leads out of it.

A model folder may come from anybody. A link in it, `LICENSE -> ~/.ssh/id_rsa`, would bring a file
of this machine into an output, onto the Hub or into a card. What is copied or published is opened
here: a regular file whose real path lies in the real folder. The folder itself may be a link, and
so may a file that leads to another one in the folder. Hard links cannot be told apart.

In a snapshot of the Hub's cache every file is a link, to `blobs` of its repository or from there to
the store that all repositories of the cache share. Both are recognised by their place and names, so
that a cache may be anywhere.

Tensors are read without this check: weights on another disk are often linked, nothing but a valid
safetensors file is read from there, and a merge writes only what it computes from them.
"""

import errno
import os
import re
import shutil
import stat
from contextlib import ExitStack
from pathlib import Path

from mergekit_bayes.errors import CheckpointError, shown

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def contained(folder: Path, name: str | Path) -> Path:
    """The real path of a regular file that lies in a folder.

    Args:
        folder: The folder, or a link to it.
        name: The file's path relative to the folder.

    Raises:
        CheckpointError: The path leads out of the folder or nowhere, or to something that is not a
            regular file.
    """
    root, inner = _place(folder, name)
    try:
        mode = os.lstat(root / inner).st_mode
    except OSError as error:
        raise CheckpointError(f"{folder / name}: {_explain(folder / name, error)}") from None
    _refuse_special(folder / name, mode)
    return root / inner


def refuse_leaving(folder: Path, name: str | Path) -> None:
    """Refuse a path, to a file or to a folder, that leads out of a folder or nowhere.

    Args:
        folder: The folder, or a link to it.
        name: The path relative to the folder.

    Raises:
        CheckpointError: It does.
    """
    _place(folder, name)


def open_contained(folder: Path, name: str | Path) -> int:
    """Open a file as `contained` finds it, and return its descriptor, for reading.

    Every step of the way is opened without following a link, so that none can be put there after
    the check. A pipe is not waited for.

    Args:
        folder: The folder, or a link to it.
        name: The file's path relative to the folder.

    Raises:
        CheckpointError: As `contained`.
        OSError: The file cannot be opened.
    """
    root, inner = _place(folder, name)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as stack:
        place = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, place)
        for part in inner.parts[:-1]:
            place = os.open(part, flags | os.O_DIRECTORY, dir_fd=place)
            stack.callback(os.close, place)
        _refuse_special(folder / name, os.lstat(inner.name, dir_fd=place).st_mode)
        descriptor = os.open(inner.name, flags | os.O_NONBLOCK, dir_fd=place)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        _refuse_special(folder / name, os.fstat(descriptor).st_mode)
        stack.pop_all()  # the caller closes it from here on
    return descriptor


def copy_contained(folder: Path, name: str | Path, target: Path) -> None:
    """Copy a file as `contained` finds it, with its permissions.

    The copy belongs to the user, who may read and change it whatever the original's mode is. Group
    and others have no more rights than they have on the original, nor than the umask leaves them.

    Args:
        folder: The folder, or a link to it.
        name: The file's path relative to the folder.
        target: The copy, whose folder exists; a file or link of that name is replaced.

    Raises:
        CheckpointError: As `contained`.
        OSError: The file cannot be read or written.
    """
    with open(open_contained(folder, name), "rb") as content:
        mode = os.fstat(content.fileno()).st_mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR
        target.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(target, flags, mode), "wb") as copy:
            shutil.copyfileobj(content, copy, 1 << 20)


def _place(folder: Path, name: str | Path) -> tuple[Path, Path]:
    """Where a path really lies: a real folder that may hold it, and the rest of the way."""
    path = folder / name
    try:
        root = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise CheckpointError(f"{path}: {_explain(path, error)}") from None
    if real.is_relative_to(root):
        return root, real.relative_to(root)
    repository = _repository(root)
    if repository is not None:
        if real.is_relative_to(blobs := repository / "blobs"):
            return blobs, real.relative_to(blobs)
        blobs = repository.parent / "blobs"
        if real.is_relative_to(blobs):
            inner = real.relative_to(blobs)
            if _SHARED_BLOB.fullmatch(inner.as_posix()):
                return blobs, inner
    raise CheckpointError(
        f"{path}: leads out of its folder, to {shown(str(real))}, and nothing from outside is "
        "read as a part of it. If it belongs there, put a copy in place of the link; otherwise "
        "remove the link."
    )


def _repository(root: Path) -> Path | None:
    """The folder of a repository in a cache of the Hub, of which `root` is a snapshot or in one."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            return repository
    return None


def _explain(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself. Remove it."
    if error.errno == errno.ENOENT and path.is_symlink():
        return (
            f"is a link to {shown(os.readlink(path))}, which is not there. Put the file there, or "
            "remove the link."
        )
    return f"cannot be read ({error.strerror or error})."


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise CheckpointError(f"{path}: is {kind}. Put a file in its place, or remove it.")
