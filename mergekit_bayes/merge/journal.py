"""Where a merge lies until it is whole: `OUT.partial`, with a journal of what has been written.

    OUT.partial/lock                   held by one process for the whole, or by several for a part each
    OUT.partial/plan.json              whose it is: the hash of everything that decides the output's bytes
    OUT.partial/journal-1-of-1.jsonl   one line a unit of work, by the process that has the file locked
    OUT.partial/out/...                the output
    OUT.partial/whole.json             only while the output is given its final name
    OUT.partial/replaced               what had that name, only as long

Offsets in the output are known from the plan, so that any process can write any unit, in any order,
twice if need be: the same command resumes what was killed, and the parts of a `--shard` are
journals beside each other.

A line is believed where its data cannot have been lost: under `sync`; in the boot of this machine
in which it was written; and, from any machine, once its part has waited for the disk at its end.
"""

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.specs import Closing

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal(Closing):
    """The lines of one part. Data is written before its line."""

    def __init__(self, path: Path, file: int, plan: str, *, sync: bool) -> None:
        self.path, self._file, self._sync = path, file, sync
        self._write({"plan": plan, "sync": sync, **this_host()})

    def add(self, unit: int, tally: dict[str, Any]) -> None:
        self._write({"unit": unit, "tally": tally})

    def close(self) -> None:
        """Say that the disk has all data of the lines so far."""
        self._write({"synced": True})
        os.fsync(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        # One write a line: a killed process leaves whole lines and at most one torn one, at the
        # end.
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


def read_lines(path: Path, plan: str) -> Iterator[dict[str, Any]]:
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
            mine, now = line.get("plan") == plan, line["sync"] or is_this_boot(line)
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


def this_host() -> dict[str, str]:
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text().strip()
    return {"host": platform.node(), "boot": boot}


def is_this_boot(line: dict[str, Any]) -> bool:
    """Whether this boot of this machine wrote a line.

    Of a boot there is one name, in all containers. Where there is none (no Linux), a power cut
    cannot be told from a kill, and `sync` is the only guard.
    """
    here = this_host()
    return bool(
        line.get("boot") == here["boot"] and (here["boot"] or line.get("host") == here["host"])
    )
