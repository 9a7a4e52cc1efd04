"""The journals of a merge: one for each part, with one line for each unit that has been written.

    OUT.partial/lock                   locked by one process for all, or by several, a part each
    OUT.partial/plan.json              the plan's hash: which merge the folder belongs to
    OUT.partial/journal-1-of-1.jsonl   one line per unit, written by the process that locks the file
    OUT.partial/out/...                the output
    OUT.partial/whole.json             only while the output is given its final name
    OUT.partial/replaced               only then: what had that name before

Offsets in the output follow from the plan, so that any process can write any unit, in any order,
and twice if need be: the same command resumes a merge that was killed, and the parts of a `--shard`
are journals beside each other.

A line is believed where its data cannot have been lost: if it was written under `sync`; if this
boot of this machine wrote it; and, from any machine, once its part has waited for the disk at its
end. It is not believed where an input was written after it: see `stamps.changed_since`.
"""

import errno
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.locks import attempts, open_lock, try_lock
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.checkpoint.stamps import Stamp, changed_since, to_json
from mergekit_bayes.documents import DocumentError, parse_json, read_bytes, read_text
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.parts import Part
from mergekit_bayes.merge.tally import TallyLine, UnitTally

_BOOT = Path("/proc/sys/kernel/random/boot_id")
Line = dict[str, Any]  # one line, as JSON


class Journals:
    """All journals of a merge, in `OUT.partial`.

    Args:
        folder: `OUT.partial`.
        plan: The plan's hash.
        inputs: The files that are read, as they were when this process opened them.
    """

    def __init__(self, folder: Path, plan: str, inputs: Mapping[Path, Stamp] | None = None) -> None:
        self._folder, self._plan, self._inputs = folder, plan, inputs or {}

    @contextmanager
    def open(self, part: Part, *, sync: bool) -> Iterator["Journal"]:
        """The journal of a part, locked against a second process at the same part.

        Args:
            part: The part.
            sync: Whether to wait for the disk after every line.

        Raises:
            CheckpointError: Another process is at this part.
        """
        path = self._path(part)
        file = open_lock(path, os.O_CREAT | os.O_APPEND)
        try:
            # For a moment the lock may belong to a process that only looks: see `running`.
            if not any(try_lock(file) for _ in attempts()):
                raise CheckpointError(
                    f"{path}: another process is at this part. Wait for it, or stop it first."
                )
            if sync:
                sync_path(self._folder)
            yield Journal(path, file, self._plan, self._inputs, sync=sync)
        finally:
            os.close(file)

    def paths(self) -> list[Path]:
        """All journals."""
        return sorted(self._folder.glob("journal-*-of-*.jsonl"))

    def parts(self) -> list[Part]:
        """The parts of which there is a journal; a merge in one piece is part 1 of 1."""
        numbers = (map(int, re.findall(r"\d+", path.stem)) for path in self.paths())
        return sorted(Part(number, of) for number, of in numbers)

    def missing_parts(self) -> list[str]:
        """The parts of a `--shard` that have no journal, as I/N."""
        begun = set(self.parts())
        counts = {part.of for part in begun if part.of > 1}
        return [
            f"{i}/{of}" for of in sorted(counts) for i in range(1, of + 1) if (i, of) not in begun
        ]

    def running(self, but: Part | None = None) -> list[Path]:
        """The journals that another process is writing; `but` is a part not to look at."""
        running = []
        for path in self.paths():
            if but is not None and path == self._path(but):
                continue
            with suppress(FileNotFoundError):
                file = open_lock(path)
                if not try_lock(file):
                    running.append(path)
                os.close(file)
        return running

    def done(self) -> dict[int, TallyLine]:
        """The tally of each unit that has been written, by the unit's number."""
        done: dict[int, TallyLine] = {}
        for path in self.paths():
            for line in _read_lines(path, self._plan, self._inputs):
                unit, tally = line.get("unit"), line.get("tally")
                if isinstance(unit, int) and UnitTally.is_line(tally):
                    done.setdefault(unit, tally)
        return done

    def changed_inputs(self) -> list[Path]:
        """The inputs that were written after some unit of this plan was."""
        lines = (line for path in self.paths() for line in _parse(path))
        found = (_changed(line, self._inputs) for line in lines if line.get("plan") == self._plan)
        return sorted({path for changed in found for path in changed})

    def forget(self) -> None:
        """Remove the journals, so that no unit counts as written."""
        for path in self.paths():
            path.unlink()

    def _path(self, part: Part) -> Path:
        return self._folder / f"journal-{part.number}-of-{part.of}.jsonl"


class Journal:
    """Adds lines to the journal of one part. The data of a unit is written before its line.

    `Journals.open` opens, locks and closes the file.

    Args:
        path: The file.
        file: Its descriptor, open for appending.
        plan: The plan's hash.
        inputs: The files that are read.
        sync: Whether to wait for the disk after every line.
    """

    def __init__(
        self, path: Path, file: int, plan: str, inputs: Mapping[Path, Stamp], *, sync: bool
    ) -> None:
        self.path, self._file, self._sync = path, file, sync
        self._write({"plan": plan, "sync": sync, **this_host(), "inputs": to_json(inputs)})

    def add(self, unit: int, tally: Mapping[str, object]) -> None:
        """Add the line of a unit that has been written."""
        self._write({"unit": unit, "tally": tally})

    def forget(self) -> None:
        """Remove all lines, so that none of the part's units counts as written."""
        os.ftruncate(self._file, 0)

    def mark_synced(self) -> None:
        """Add that the disk has the data of all lines so far."""
        self._write({"synced": True})
        os.fsync(self._file)

    def _write(self, line: Line) -> None:
        # Each line is one write: a killed process leaves complete lines, and at most one torn one
        # at the end.
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


def this_host() -> dict[str, str]:
    """The machine's name and the identity of its boot, empty where the system has none."""
    boot = ""
    with suppress(OSError, DocumentError):
        boot = read_text(_BOOT).strip()
    return {"host": platform.node(), "boot": boot}


def is_this_boot(line: Mapping[str, object]) -> bool:
    """Whether this boot of this machine wrote a line.

    A boot has one identity, which all containers share. Where there is none (no Linux), a power cut
    cannot be told from a kill, and `sync` is the only protection.
    """
    here = this_host()
    return bool(
        line.get("boot") == here["boot"] and (here["boot"] or line.get("host") == here["host"])
    )


def _changed(line: Line, inputs: Mapping[Path, Stamp]) -> list[Path]:
    """The inputs that were written after the process that wrote this line had opened them."""
    same_machine = is_this_boot(line) or line.get("host") == platform.node()
    return changed_since(line.get("inputs"), inputs, same_machine=same_machine)


def _parse(path: Path) -> Iterator[Line]:
    """The lines of a journal, without torn ones.

    Raises:
        CheckpointError: It is no file that can be read.
    """
    try:
        content = read_bytes(path)
    except (OSError, DocumentError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path}: cannot be read ({reason}). Remove it, and its part is merged again."
        ) from None
    for text in content.splitlines():
        with suppress(DocumentError):
            line = parse_json(text)
            if isinstance(line, dict):
                yield line


def _read_lines(path: Path, plan: str, inputs: Mapping[Path, Stamp]) -> Iterator[Line]:
    """The lines of a plan's units that can be believed.

    Args:
        path: The journal.
        plan: The plan's hash; lines of other plans are skipped.
        inputs: The files that are read; lines that are older than one of them are skipped.

    Raises:
        CheckpointError: It is no file that can be read.
    """
    is_plans = is_certain = False
    boot: object = None
    doubtful: list[Line] = []
    for line in _parse(path):
        if "boot" in line:
            is_plans = line.get("plan") == plan and not _changed(line, inputs)
            is_certain = line.get("sync") is True or is_this_boot(line)
            if not is_plans or line["boot"] != boot:
                doubtful = []
            boot = line["boot"]
        elif not is_plans:
            continue
        elif "synced" in line:
            yield from doubtful
            doubtful = []
        elif is_certain:
            yield line
        else:
            doubtful.append(line)
