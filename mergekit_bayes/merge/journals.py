"""The journals in `OUT.partial`, one for each part that has begun."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.journal import Journal, read_lines
from mergekit_bayes.merge.locks import attempts, open_lock, try_lock
from mergekit_bayes.merge.parts import Part
from mergekit_bayes.merge.tally import TallyLine


class Journals:
    """All journals of a merge.

    Args:
        folder: `OUT.partial`.
        plan: The plan's hash.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        self._folder, self._plan = folder, plan

    @contextmanager
    def open(self, part: Part, *, sync: bool) -> Iterator[Journal]:
        """The journal of a part, locked against a second process at the same part.

        Args:
            part: The part.
            sync: Whether to wait for the disk after every line.

        Raises:
            CheckpointError: Another process is at this part.
        """
        path = self._path(part)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # For a moment the lock may belong to a process that only looks: see `running`.
            if not any(try_lock(file) for _ in attempts()):
                raise CheckpointError(
                    f"{path}: another process is at this part. Wait for it, or stop it first."
                )
            if sync:
                sync_path(self._folder)
            yield Journal(path, file, self._plan, sync=sync)
        finally:
            os.close(file)

    def paths(self) -> list[Path]:
        """All journals."""
        return sorted(self._folder.glob("journal-*-of-*.jsonl"))

    def missing_parts(self) -> list[str]:
        """The parts of a `--shard` that have no journal, as I/N."""
        begun = {tuple(map(int, re.findall(r"\d+", path.stem))) for path in self.paths()}
        counts = {of for _, of in begun if of > 1}
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
            for line in read_lines(path, self._plan):
                done.setdefault(line["unit"], line["tally"])
        return done

    def forget(self) -> None:
        """Remove the journals, so that no unit counts as written."""
        for path in self.paths():
            path.unlink()

    def _path(self, part: Part) -> Path:
        return self._folder / f"journal-{part.number}-of-{part.of}.jsonl"
