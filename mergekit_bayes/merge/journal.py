"""Where a merge lies until it is whole: `OUT.partial`, with a journal of what has been written.

    OUT.partial/plan.json              whose it is: the hash of everything that decides the output's bytes
    OUT.partial/journal-1-of-1.jsonl   one line a unit of work, by the process that has the file locked
    OUT.partial/out/...                the output
    OUT.partial/whole.json             only while the output is given its final name

Offsets in the output are known from the plan, so that any process can write any unit, in any order, twice if need be:
the same command resumes what was killed, and the parts of a `--shard` are journals beside each other.
"""

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
from typing import IO, Any, NamedTuple

from mergekit_bayes.errors import CheckpointError

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Part(NamedTuple):
    """The number-th of `of` parts of a plan, counted from 1."""

    number: int
    of: int

    def takes(self, position: float) -> bool:
        """Whether a unit at this share of the whole, in [0, 1), is this part's."""
        return int(position * self.of) == self.number - 1


class Partial:
    """The folder of a merge that is not whole yet.

    Raises `CheckpointError` if another merge has begun there, or another process is at the same part.
    """

    def __init__(self, folder: Path, plan: str, *, force: bool) -> None:
        self.folder, self.out = folder, folder / "out"
        self._lock: IO[str] | None = None
        found = self._plan()
        if found is not None and found != plan and force:
            if busy := self.running():
                raise CheckpointError(f"{folder}: {busy[0].name} is being written by another process. Wait for it.")
            shutil.rmtree(folder)
            found = None
        if found is None:
            self._begin(plan)
        elif found != plan:
            raise CheckpointError(
                f"{folder} holds another merge that was not finished (other models, settings or version). Finish it "
                "with its own command, remove the folder, or pass --force."
            )
        self.plan = plan
        if not self.is_publishing:
            self.out.mkdir(exist_ok=True)

    def _plan(self) -> str | None:
        for name in ("plan.json", "whole.json"):
            with suppress(OSError, ValueError, AttributeError):
                return str(json.loads((self.folder / name).read_text()).get("plan"))
        return None

    def _begin(self, plan: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("plan.json", plan)  # several parts may begin at once; they write the same

    def _write(self, name: str, plan: str) -> None:
        scratch = self.folder / f"{name}.{platform.node()}.{os.getpid()}"
        scratch.write_text(json.dumps({"plan": plan}) + "\n")
        os.replace(scratch, self.folder / name)

    @contextmanager
    def journal(self, part: Part, *, sync: bool) -> Iterator["Journal"]:
        """This part's journal, locked against a second process at the same part."""
        path = self.folder / f"journal-{part.number}-of-{part.of}.jsonl"
        with path.open("a+") as file:
            if not _lock(file):
                raise CheckpointError(f"{path}: another process is at this part. Wait for it, or stop it first.")
            yield Journal(file, sync=sync)

    def journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*-of-*.jsonl"))

    def missing_parts(self) -> list[str]:
        """Parts of a `--shard` that have no journal, as I/N."""
        found = {tuple(map(int, re.findall(r"\d+", p.stem))) for p in self.journals()}
        counts = {of for _, of in found if of > 1}
        return [f"{i}/{of}" for of in sorted(counts) for i in range(1, of + 1) if (i, of) not in found]

    def running(self, but: Part | None = None) -> list[Path]:
        """Journals that some other process is writing."""
        mine = None if but is None else f"journal-{but.number}-of-{but.of}.jsonl"
        result = []
        for path in self.journals():
            if path.name == mine:
                continue
            with path.open("a") as file:
                if not _lock(file):
                    result.append(path)
        return result

    def done(self) -> dict[int, dict[str, Any]]:
        """What each unit's line says, over all journals."""
        result: dict[int, dict[str, Any]] = {}
        for path in self.journals():
            for line in _lines(path):
                if "unit" in line:
                    result.setdefault(line["unit"], line["tally"])
        return result

    @property
    def is_publishing(self) -> bool:
        """Whether the output is whole and on its way to its final name."""
        return (self.folder / "whole.json").exists()

    def publish(self) -> None:
        self._write("whole.json", self.plan)

    def remove(self) -> None:
        """What says that the output is whole goes last, so that a kill in between is resumed as well."""
        for path in self.folder.iterdir():
            if path.name != "whole.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(self.folder)


class Journal:
    """The lines of one part. Data is written before its line."""

    def __init__(self, file: IO[str], *, sync: bool) -> None:
        self._file, self._sync = file, sync
        self._write({"host": platform.node(), "boot": _boot(), "sync": sync})

    def add(self, unit: int, tally: dict[str, Any]) -> None:
        self._write({"unit": unit, "tally": tally})

    def _write(self, line: dict[str, Any]) -> None:
        # One write a line: a killed process leaves whole lines and at most one torn one, at the end.
        os.write(self._file.fileno(), b"\n" * self._is_torn() + json.dumps(line).encode() + b"\n")
        if self._sync:
            os.fsync(self._file.fileno())

    def _is_torn(self) -> bool:
        size = os.fstat(self._file.fileno()).st_size
        return size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"


def wait_for(partial: Partial, units: Collection[int], part: Part, seconds: float) -> None:
    """Until every part has come and every unit is written, or nobody else has been writing for `seconds`."""
    quiet = time.monotonic()
    while True:
        if partial.running(part):
            quiet = time.monotonic()
        else:
            whole = len(partial.journals()) >= part.of and partial.done().keys() >= set(units)
            if whole or time.monotonic() - quiet > seconds:
                return
        time.sleep(0.1)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines that can be believed: not torn, and not of a boot of this machine whose data may not be on the disk."""
    believed = True
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "boot" in line:
            believed = line["sync"] or line["host"] != platform.node() or line["boot"] == _boot()
        elif believed:
            yield line


def _boot() -> str:
    # Without it (no Linux) a power cut cannot be told from a kill; --sync then is the only guard.
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
