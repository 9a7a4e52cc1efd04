"""Where a merge lies until it is whole: `OUT.partial`, with a journal of what has been written.

    OUT.partial/lock                   held by one process for the whole, or by several for a part each
    OUT.partial/plan.json              whose it is: the hash of everything that decides the output's bytes
    OUT.partial/journal-1-of-1.jsonl   one line a unit of work, by the process that has the file locked
    OUT.partial/out/...                the output
    OUT.partial/whole.json             only while the output is given its final name
    OUT.partial/replaced               what had that name, only as long

Offsets in the output are known from the plan, so that any process can write any unit, in any order, twice if need be:
the same command resumes what was killed, and the parts of a `--shard` are journals beside each other.

A line is believed where its data cannot have been lost: under `sync`; in the boot of this machine in which it was
written; and, from any machine, once its part has waited for the disk at its end.
"""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.errors import CheckpointError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOMENT = 3.0  # seconds that a process waits for others to begin, look or leave


class Part(NamedTuple):
    """The number-th of `of` parts of a plan, counted from 1."""

    number: int
    of: int

    def takes(self, position: float) -> bool:
        """Whether a unit at this share of the whole, in [0, 1), is this part's."""
        return int(position * self.of) == self.number - 1


class BusyError(CheckpointError):
    """Another process has the merge, or a part of it that this one would have to wait for."""


class Partial:
    """The folder of a merge that is not whole yet.

    Args:
        folder: `OUT.partial`.
        plan: The plan's hash.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder, self.out, self.plan = folder, folder / "out", plan
        self.replaced = folder / "replaced"
        self._held: int | None = None

    @contextmanager
    def held(self, *, alone: bool, force: bool) -> Iterator[None]:
        """Begin the plan there, or go on with it, alone or beside others at their parts.

        Raises `CheckpointError` if the folder is not a merge's or another merge has begun there (unless `force`), and
        `BusyError` while another process works there that would be in the way.
        """
        self._held = self._enter(alone=alone, force=force)
        try:
            if not self.is_publishing:
                self.out.mkdir(exist_ok=True)
            yield
        finally:
            self._release()

    def _enter(self, *, alone: bool, force: bool) -> int:
        """The folder's lock. A plan begins, and is replaced, by who has it alone."""
        until = time.monotonic() + _MOMENT
        while True:
            file, has_entered = self._open_lock(), False
            try:
                has_entered = self._begin(file, alone=alone, force=force)
            finally:
                if not has_entered:
                    os.close(file)
            if has_entered:
                return file
            if time.monotonic() > until:
                busy = [f"{p}: that part is still being written. Wait for it." for p in self.running()]
                raise BusyError((busy or [f"{self.folder}: another process is at this merge. Wait for it."])[0])
            time.sleep(0.01)

    def _begin(self, file: int, *, alone: bool, force: bool) -> bool:
        has_all = _lock(file, fcntl.LOCK_EX)
        if not (has_all or (not alone and _lock(file, fcntl.LOCK_SH))) or not self._is_there(file):
            return False
        if self._found() not in (None, self.plan) and not force:
            raise CheckpointError(
                f"{self.folder} holds another merge that was not finished (other models, settings or version). Finish "
                "it with its own command, remove the folder, or pass --force."
            )
        if has_all:
            if not self.is_publishing:
                self._unpublish()
            if self._found() != self.plan:
                self._clear()
                self._write("plan.json")
            if alone:
                return True
            if not _lock(file, fcntl.LOCK_SH):  # between the two, another may have had it alone
                return False
        return self._found() == self.plan and self._is_there(file)

    def _open_lock(self) -> int:
        while True:
            self._refuse_foreign()
            self.folder.mkdir(parents=True, exist_ok=True)
            # The folder may be removed in between, by who has just finished.
            with suppress(FileNotFoundError):
                return _open(self.folder / "lock", os.O_CREAT)

    def _refuse_foreign(self) -> None:
        """Whatever else has such a name is not touched."""
        if self._found() is None:
            names: list[str] = []
            with suppress(FileNotFoundError):
                names = sorted(set(os.listdir(self.folder)) - {"lock", "plan.json.new"})
            if names and self._found() is None:  # no other process has begun meanwhile
                raise CheckpointError(
                    f"{self.folder} would hold the merge until it is whole, but is another folder: it has {names[0]!r} "
                    "in it. Move it away, or choose another -o."
                )

    def _is_there(self, file: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self.folder / "lock"))
        return False

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _found(self) -> str | None:
        """The hash of the plan that has begun there."""
        for name in ("plan.json", "whole.json"):
            with suppress(OSError, ValueError, AttributeError):
                if isinstance(plan := json.loads((self.folder / name).read_text()).get("plan"), str):
                    return plan
        return None

    def _write(self, name: str, **more: Any) -> None:
        scratch = self.folder / f"{name}.new"
        with scratch.open("w") as file:
            file.write(json.dumps({"plan": self.plan, **more}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.folder / name)
        sync_path(self.folder)

    @contextmanager
    def journal(self, part: Part, *, sync: bool) -> Iterator["Journal"]:
        """This part's journal, locked against a second process at the same part."""
        path = self._journal(part)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            until = time.monotonic() + _MOMENT
            while not _lock(file, fcntl.LOCK_EX):  # or somebody looks whether it is: see `running`
                if time.monotonic() > until:
                    raise CheckpointError(f"{path}: another process is at this part. Wait for it, or stop it first.")
                time.sleep(0.01)
            if sync:
                sync_path(self.folder)
            yield Journal(path, file, self.plan, sync=sync)
        finally:
            os.close(file)

    def _journal(self, part: Part) -> Path:
        return self.folder / f"journal-{part.number}-of-{part.of}.jsonl"

    def journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*-of-*.jsonl"))

    def missing_parts(self) -> list[str]:
        """Parts of a `--shard` that have no journal, as I/N."""
        found = {tuple(map(int, re.findall(r"\d+", p.stem))) for p in self.journals()}
        counts = {of for _, of in found if of > 1}
        return [f"{i}/{of}" for of in sorted(counts) for i in range(1, of + 1) if (i, of) not in found]

    def running(self, but: Part | None = None) -> list[Path]:
        """Journals that some other process is writing."""
        result = []
        for path in self.journals():
            if but is not None and path == self._journal(but):
                continue
            with suppress(FileNotFoundError):
                file = _open(path)
                if not _lock(file, fcntl.LOCK_EX):
                    result.append(path)
                os.close(file)
        return result

    def done(self) -> dict[int, dict[str, Any]]:
        """What each unit's line says, over all journals."""
        result: dict[int, dict[str, Any]] = {}
        for path in self.journals():
            for line in _lines(path, self.plan):
                result.setdefault(line["unit"], line["tally"])
        return result

    @property
    def is_publishing(self) -> bool:
        """Whether the output is whole and on its way to its final name."""
        with suppress(OSError, ValueError, AttributeError):
            whole = json.loads((self.folder / "whole.json").read_text())
            return bool(whole.get("plan") == self.plan and (whole.get("sync") or _is_now(whole)))
        return False

    def publish(self, *, sync: bool) -> None:
        """Say that the output is whole."""
        self._write("whole.json", sync=sync, **_here())

    def _unpublish(self) -> None:
        """What another merge left half in place, or this one before a power cut, goes back."""
        target = self.folder.with_name(self.folder.name.removesuffix(".partial"))
        if os.path.lexists(self.replaced) and not os.path.lexists(target):
            os.rename(self.replaced, target)
        (self.folder / "whole.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Nothing of the plan is done."""
        for path in self.journals():
            path.unlink()

    def remove(self) -> None:
        """Remove it, by who has it alone: what a merge has made there, and no other file.

        What says whose it is goes last, so that a kill in between is resumed as well.
        """
        self._clear()
        (self.folder / "lock").unlink(missing_ok=True)
        self._release()
        with suppress(OSError):  # another has begun there, or a file is not a merge's
            self.folder.rmdir()

    def _clear(self) -> None:
        self.forget()
        for name in ("out", "replaced", "plan.json.new", "whole.json.new", "plan.json", "whole.json"):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class Journal:
    """The lines of one part. Data is written before its line."""

    def __init__(self, path: Path, file: int, plan: str, *, sync: bool) -> None:
        self.path, self._file, self._sync = path, file, sync
        self._write({"plan": plan, "sync": sync, **_here()})

    def add(self, unit: int, tally: dict[str, Any]) -> None:
        self._write({"unit": unit, "tally": tally})

    def close(self) -> None:
        """Say that the disk has all data of the lines so far."""
        self._write({"synced": True})
        os.fsync(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        # One write a line: a killed process leaves whole lines and at most one torn one, at the end.
        text = b"\n" * self._is_torn() + json.dumps(line).encode() + b"\n"
        try:
            written = os.write(self._file, text)
            if self._sync:
                os.fsync(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _is_torn(self) -> bool:
        size = os.fstat(self._file).st_size
        return size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def wait_for(partial: Partial, units: Collection[int], part: Part, seconds: float) -> None:
    """Until every part has come and every unit is written, or nobody else has been writing for `seconds`."""
    quiet = time.monotonic()
    while not partial.is_publishing:
        if partial.running(part):
            quiet = time.monotonic()
        else:
            whole = len(partial.journals()) >= part.of and partial.done().keys() >= set(units)
            if whole or time.monotonic() - quiet > seconds:
                return
        time.sleep(0.1)


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _lines(path: Path, plan: str) -> Iterator[dict[str, Any]]:
    """The plan's units that can be believed; not torn ones."""
    mine = now = False
    boot: Any = None
    doubtful: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "boot" in line:
            mine, now = line.get("plan") == plan, line["sync"] or _is_now(line)
            if not mine or line["boot"] != boot:
                doubtful = []
            boot = line["boot"]
        elif not mine:
            continue
        elif "synced" in line:
            yield from doubtful
            doubtful = []
        elif now:
            yield line
        else:
            doubtful.append(line)


def _here() -> dict[str, str]:
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text().strip()
    return {"host": platform.node(), "boot": boot}


def _is_now(line: dict[str, Any]) -> bool:
    """Whether this boot of this machine wrote a line.

    Of a boot there is one name, in all containers. Where there is none (no Linux), a power cut cannot be told from a
    kill, and `sync` is the only guard.
    """
    here = _here()
    return bool(line.get("boot") == here["boot"] and (here["boot"] or line.get("host") == here["host"]))


def _open(path: Path, flags: int = 0) -> int:
    """For a lock; a file of another account can often be read only, which is enough for one on a local disk."""
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
