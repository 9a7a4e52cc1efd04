"""Scratch folders with a name that others can foresee, and the files in them.

Where other accounts can write beside an output, one of them may have made its scratch folder first,
with links in it that lead to files of this account. So a scratch folder is used only if this
account made it, no link is followed, and a file is written to only if it has no other name. All of
this is checked on the opened descriptor, because a path can change after a look at it.
"""

import errno
import os
import pwd
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_bayes.errors import CheckpointError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe must not be waited for before it is refused; for files the flag has no effect.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WAY_OUT = "Remove it, or choose another output."


def make_own_folder(path: Path, mode: int = 0o775) -> None:
    """Make a scratch folder, or check that this account has made it.

    Args:
        path: The folder; its parents are made too.
        mode: Its mode, from which the umask is taken. Others than the group may never write there.

    Raises:
        CheckpointError: It is a link or a file, belongs to another account, or can be written by
            every account; or it cannot be made.
        OSError: It cannot be opened, or another process has removed it meanwhile.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path, mode)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror}. Choose another output."
        ) from error
    with _opened(path) as folder:
        status = os.fstat(folder)
        is_open = bool(status.st_mode & stat.S_IWOTH)
        if status.st_uid == os.geteuid() and not is_open:
            return
        made = _file_made_in(folder)
        if made is None or made.st_uid != status.st_uid:
            raise CheckpointError(
                f"{path} belongs to {_account(status)}, and what others prepared is not used. "
                f"{_WAY_OUT}"
            )
        if is_open and not made.st_mode & stat.S_IWOTH:
            raise CheckpointError(
                f"{path} can be written by every account (its mode is "
                f"{stat.S_IMODE(status.st_mode):o}), so that its content cannot be relied on. "
                f"{_WAY_OUT}"
            )


def refuse_planted(folder: Path, but: Path) -> None:
    """Refuse anything in a scratch folder that writing there does not make.

    Args:
        folder: The scratch folder.
        but: What in it is not looked at: an earlier output, in which there may be anything.

    Raises:
        CheckpointError: There is a link, a file with another name elsewhere, something that is
            neither file nor folder, or something of another account.
    """
    with _opened(folder) as opened:
        owner = os.fstat(opened).st_uid
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):  # another process has finished meanwhile
                if path != but or path.is_symlink():
                    _check(path.lstat(), path, owner)
        folders[:] = [name for name in folders if Path(parent, name) != but]


def refuse_foreign_link(path: Path) -> None:
    """Refuse a link in a folder where everybody can write, unless its maker can be relied on.

    These are this account, root and the owner of the folder, as for Linux' `protected_symlinks`.

    Raises:
        CheckpointError: Somebody else made the link.
    """
    link, folder = path.lstat(), path.parent.stat()
    if folder.st_mode & stat.S_IWOTH and link.st_uid not in (os.geteuid(), 0, folder.st_uid):
        raise CheckpointError(
            f"{path} is a link of {_account(link)}, which is not followed. {_WAY_OUT}"
        )


def open_own(path: Path, flags: int) -> int:
    """Open a file in a scratch folder to write to it, and return its descriptor.

    Args:
        path: The file, directly in a folder of this account.
        flags: Flags of `os.open`; a truncating one would act before the check.

    Raises:
        CheckpointError: The file or its folder is a link, belongs to another account or is of
            another kind, or the file has another name elsewhere.
        OSError: It cannot be opened.
    """
    with _opened(path.parent) as folder:
        try:
            file = os.open(path.name, flags | _FILE, 0o666, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                _check(os.lstat(path), path, os.fstat(folder).st_uid)
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            _check(os.fstat(file), path, os.fstat(folder).st_uid)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise CheckpointError(f"{path} is not a file. {_WAY_OUT}")
        except BaseException:
            os.close(file)
            raise
    return file


def write_own(path: Path, text: str) -> None:
    """Write a text into a new file of a scratch folder, in place of what has that name.

    Raises:
        CheckpointError: The folder is a link or belongs to another account.
        OSError: It cannot be written.
    """
    with _opened(path.parent) as folder, suppress(FileNotFoundError):
        os.unlink(path.name, dir_fd=folder)
    file = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a folder that is no link."""
    try:
        folder = os.open(path, _FOLDER)
    except OSError as error:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
            kind = "a link, which is not followed" if stat.S_ISLNK(status.st_mode) else "no folder"
            raise CheckpointError(f"{path} is {kind}. {_WAY_OUT}") from None
        if error.errno == errno.EACCES and status.st_uid != os.geteuid():
            raise CheckpointError(f"{path} belongs to {_account(status)}. {_WAY_OUT}") from None
        raise
    try:
        yield folder
    finally:
        os.close(folder)


def _check(status: os.stat_result, path: Path, owner: int) -> None:
    """Refuse what writing in a scratch folder of `owner` does not make."""
    is_file = stat.S_ISREG(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        reason = "is a link, which is not followed"
    elif not is_file and not stat.S_ISDIR(status.st_mode):
        reason = "is neither a file nor a folder"
    # New files may get another owner than their folder on some network disks.
    elif status.st_uid not in (owner, os.geteuid()):
        reason = f"belongs to {_account(status)}"
    elif is_file and status.st_nlink > 1:
        reason = "has another name elsewhere (a hard link)"
    else:
        return
    raise CheckpointError(f"{path} {reason}. {_WAY_OUT}")


def _file_made_in(folder: int) -> os.stat_result | None:
    """What the file system says of a file that is made now; None if none can be made.

    Some network and user-space file systems show other owners and modes than were asked for, and
    show the same for everything that this account makes.
    """
    name = f".{secrets.token_hex(8)}"
    try:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600, dir_fd=folder)
    except OSError:
        return None
    try:
        return os.fstat(file)
    finally:
        os.close(file)
        os.unlink(name, dir_fd=folder)


def _account(status: os.stat_result) -> str:
    """The name of the account to which something belongs, or its number."""
    try:
        return f"the account {pwd.getpwuid(status.st_uid).pw_name}"
    except KeyError:
        return f"the account number {status.st_uid}"
