"""The folder `OUT.partial`: locks, journals and what is left of a stopped merge."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.journal import Journal, is_this_boot, read_lines, this_host
from mergekit_bayes.merge.parts import Part

_MOMENT = 3.0  # seconds that a process waits for others to begin, look or leave


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
    def locked(self, *, alone: bool, force: bool) -> Iterator[None]:
        """Begin the plan there, or go on with it, alone or beside others at their parts.

        Raises `CheckpointError` if the folder is not a merge's or another merge has begun there
        (unless `force`), and `BusyError` while another process works there that would be in the
        way.
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
                busy = [
                    f"{p}: that part is still being written. Wait for it." for p in self.running()
                ]
                raise BusyError(
                    (busy or [f"{self.folder}: another process is at this merge. Wait for it."])[0]
                )
            time.sleep(0.01)

    def _begin(self, file: int, *, alone: bool, force: bool) -> bool:
        has_all = _lock(file, fcntl.LOCK_EX)
        if not (has_all or (not alone and _lock(file, fcntl.LOCK_SH))) or not self._is_there(file):
            return False
        if self._found() not in (None, self.plan) and not force:
            raise CheckpointError(
                f"{self.folder} holds another merge that was not finished (other models, settings "
                "or version). Finish "
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
                    f"{self.folder} would hold the merge until it is whole, but is another folder: "
                    f"it has {names[0]!r} "
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
                if isinstance(
                    plan := json.loads((self.folder / name).read_text()).get("plan"), str
                ):
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
                    raise CheckpointError(
                        f"{path}: another process is at this part. Wait for it, or stop it first."
                    )
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
        return [
            f"{i}/{of}" for of in sorted(counts) for i in range(1, of + 1) if (i, of) not in found
        ]

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
            for line in read_lines(path, self.plan):
                result.setdefault(line["unit"], line["tally"])
        return result

    @property
    def is_publishing(self) -> bool:
        """Whether the output is whole and on its way to its final name."""
        with suppress(OSError, ValueError, AttributeError):
            whole = json.loads((self.folder / "whole.json").read_text())
            return bool(
                whole.get("plan") == self.plan and (whole.get("sync") or is_this_boot(whole))
            )
        return False

    def publish(self, *, sync: bool) -> None:
        """Say that the output is whole."""
        self._write("whole.json", sync=sync, **this_host())

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
        for name in (
            "out",
            "replaced",
            "plan.json.new",
            "whole.json.new",
            "plan.json",
            "whole.json",
        ):
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def wait_for(partial: Partial, units: Collection[int], part: Part, seconds: float) -> None:
    """Until every part has come and every unit is written, or nobody else has been writing for
    `seconds`.
    """
    quiet = time.monotonic()
    while not partial.is_publishing:
        if partial.running(part):
            quiet = time.monotonic()
        else:
            whole = len(partial.journals()) >= part.of and partial.done().keys() >= set(units)
            if whole or time.monotonic() - quiet > seconds:
                return
        time.sleep(0.1)


def _open(path: Path, flags: int = 0) -> int:
    """For a lock; a file of another account can often be read only, which is enough for one on a
    local disk.
    """
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
