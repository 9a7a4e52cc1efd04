"""The folder `OUT.partial`, in which a merge is written until it is complete.

`merge.journal` lists the files in it. Its name can be foreseen: nothing in it is used before
`checkpoint.own_files` has checked that this account made it.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_bayes.checkpoint.locks import attempts, open_lock, try_lock
from mergekit_bayes.checkpoint.own_files import make_own_folder, refuse_planted, write_own
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.documents import read_object
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.journal import Journals, is_this_boot, this_host
from mergekit_bayes.merge.parts import Part

# What a merge creates beside its journals and the lock. The files that name the plan are deleted
# last: until then the folder can be recognised as that of a merge.
_CONTENT = ("out", "replaced", "plan.json.new", "whole.json.new", "plan.json", "whole.json")


class BusyError(CheckpointError):
    """Another process has the merge, or a part of it that this one would have to wait for."""


class Partial:
    """The folder of a merge that is not complete.

    Args:
        folder: `OUT.partial`.
        plan: The plan's hash.
        inputs: The files that are read, as they were when this process opened them.

    Attributes:
        out: Where the output is written.
        replaced: Where the folder that the output replaces is kept, until the output is in place.
        journals: What has been written.
    """

    def __init__(self, folder: Path, plan: str, inputs: Mapping[Path, Stamp] | None = None) -> None:
        self.folder, self.out, self.plan = folder, folder / "out", plan
        self.replaced = folder / "replaced"
        self.journals = Journals(folder, plan, inputs)
        self._lock: int | None = None

    @contextmanager
    def locked(self, *, alone: bool, force: bool) -> Iterator[None]:
        """Begin the plan in the folder, or continue it.

        Args:
            alone: Whether no other process may work in the folder; otherwise others may, at other
                parts of the same plan.
            force: Whether another plan that has begun in the folder is replaced.

        Raises:
            BusyError: Another process works there that would be in the way.
            CheckpointError: The folder is not a merge's or not of this account, something in it
                leads elsewhere, or another plan has begun there.
        """
        self._lock = self._enter(alone=alone, force=force)
        try:
            if not self.is_publishing:
                self.out.mkdir(exist_ok=True)
            yield
        finally:
            self._release()

    @property
    def is_publishing(self) -> bool:
        """Whether the output is complete and is being given its final name."""
        record = read_object(self.folder / "whole.json")
        is_certain = record.get("sync") or is_this_boot(record)
        return bool(record.get("plan") == self.plan and is_certain)

    def publish(self, *, sync: bool) -> None:
        """Record that the output is complete.

        Args:
            sync: Whether the disk has it already.
        """
        self._write("whole.json", sync=sync, **this_host())

    def remove(self) -> None:
        """Delete the merge's own files. Call while holding the exclusive lock.

        The files that name the plan go last, so that a process killed in between can be resumed.
        """
        self._clear()
        (self.folder / "lock").unlink(missing_ok=True)
        self._release()
        with suppress(OSError):  # another merge has begun in it, or a file is not a merge's
            self.folder.rmdir()

    def _enter(self, *, alone: bool, force: bool) -> int:
        """The folder's lock. Only a process that is alone begins a plan, or replaces one."""
        for _ in attempts():
            file, has_entered = self._open_lock(), False
            try:
                has_entered = self._begin(file, alone=alone, force=force)
            finally:
                if not has_entered:
                    os.close(file)
            if has_entered:
                return file
        if running := self.journals.running():
            raise BusyError(f"{running[0]}: that part is still being written. Wait for it.")
        raise BusyError(f"{self.folder}: another process is at this merge. Wait for it.")

    def _begin(self, file: int, *, alone: bool, force: bool) -> bool:
        """Try to lock the folder and to begin the plan in it; False if others are in the way."""
        is_alone = try_lock(file)
        if not is_alone and (alone or not try_lock(file, shared=True)):
            return False
        if not self._is_current(file):
            return False
        if self._begun_plan() not in (None, self.plan) and not force:
            raise CheckpointError(
                f"{self.folder} holds another merge that was not finished (other models, settings "
                "or version). Finish it with its own command, remove the folder, or pass --force."
            )
        refuse_planted(self.folder, but=self.replaced)
        if is_alone:
            if not self.is_publishing:
                self._unpublish()
            if self._begun_plan() != self.plan:
                self._clear()
                self._write("plan.json")
            if alone:
                return True
            if not try_lock(file, shared=True):  # another process may have locked it in between
                return False
        return self._begun_plan() == self.plan and self._is_current(file)

    def _open_lock(self) -> int:
        while True:
            # A process that has just finished may remove the folder in between.
            with suppress(FileNotFoundError):
                # One merge is of one account: nobody else has to look in, or could add to it.
                make_own_folder(self.folder, 0o700)
                self._refuse_foreign()
                return open_lock(self.folder / "lock", os.O_CREAT)

    def _refuse_foreign(self) -> None:
        """Refuse a folder of this name that no merge has created."""
        if self._begun_plan() is not None:
            return
        names: list[str] = []
        with suppress(FileNotFoundError):
            names = sorted(set(os.listdir(self.folder)) - {"lock", "plan.json.new"})
        if names and self._begun_plan() is None:  # no other process has begun meanwhile
            raise CheckpointError(
                f"{self.folder} would hold the merge until it is complete, but is another folder: "
                f"it has {names[0]!r} in it. Move it away, or choose another -o."
            )

    def _is_current(self, file: int) -> bool:
        """Whether a lock is that of the folder, and not of one that was removed meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.lstat(self.folder / "lock"))
        return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _begun_plan(self) -> str | None:
        """The hash of the plan that has begun in the folder."""
        for name in ("plan.json", "whole.json"):
            plan = read_object(self.folder / name).get("plan")
            if isinstance(plan, str):
                return plan
        return None

    def _write(self, name: str, **more: object) -> None:
        scratch = self.folder / f"{name}.new"
        write_own(scratch, json.dumps({"plan": self.plan, **more}) + "\n")
        sync_path(scratch)
        os.replace(scratch, self.folder / name)
        sync_path(self.folder)

    def _unpublish(self) -> None:
        """Take back what another merge left half in place, or this one before a power cut."""
        target = self.folder.with_name(self.folder.name.removesuffix(".partial"))
        if os.path.lexists(self.replaced) and not os.path.lexists(target):
            os.rename(self.replaced, target)
        (self.folder / "whole.json").unlink(missing_ok=True)

    def _clear(self) -> None:
        self.journals.forget()
        for name in _CONTENT:
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def wait_for(partial: Partial, units: Collection[int], part: Part, seconds: float) -> None:
    """Wait for the other parts of a launched merge.

    Returns once every part has begun and every unit is written, or once no other process has been
    writing for some time.

    Args:
        partial: The merge's folder.
        units: The numbers of all units.
        part: The part of this process.
        seconds: For how long no other process may have been writing.
    """
    journals, last_seen = partial.journals, time.monotonic()
    while not partial.is_publishing:
        if journals.running(but=part):
            last_seen = time.monotonic()
        else:
            have_begun = len(journals.paths()) >= part.of
            is_complete = have_begun and journals.done().keys() >= set(units)
            if is_complete or time.monotonic() - last_seen > seconds:
                return
        time.sleep(0.1)
