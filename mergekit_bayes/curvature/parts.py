"""The state of a pass, saved from time to time, from which a later process goes on.

    OUT.partial/lock                          held by the process that works on it
    OUT.partial/record.json                   what is being estimated
    OUT.partial/part-000000120/rank-0-of-2    tensors and numbers of each process after 120 rounds

A part appears under its name when all of it is on the disk, and then the part before it goes.
Nothing is made before the first part is due.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.codec import encode, read_tensor
from mergekit_bayes.checkpoint.locks import open_lock, try_lock
from mergekit_bayes.checkpoint.own_files import make_own_folder, write_own
from mergekit_bayes.checkpoint.replacing import sync_path
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.documents import parse_json, read_text
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.libraries import call, reason
from mergekit_bayes.ranks import in_step, on_main, own_number, world

_RECORD, _LOCK, _NEW, _PART, _NUMBERS = "record.json", "lock", "new", "part-*", "numbers"
_HASH = 64  # characters of a SHA-256, which says nothing to a reader
AGAIN = "Start again without --resume and with --force."


def parts_in(folder: Path) -> list[Path]:
    """The saved parts in a folder, the earliest first."""
    return sorted(folder.glob(_PART)) if os.path.isdir(folder) else []


def batches_in(part: Path) -> int:
    """The number of batches that a saved part holds: its rounds, each of one batch a process."""
    return int(part.name.rpartition("-")[2]) * len(list(part.iterdir()))


class Parts:
    """The parts of one pass. In several processes, all of them must call each method.

    Args:
        folder: Where they are, or will be.
        record: What is being estimated; another record is another pass.
        every: Seconds between two parts.
        is_resumed: Go on from the parts that are there; otherwise they are removed.
    """

    def __init__(
        self,
        folder: Path,
        record: Mapping[str, str | int],
        *,
        every: float,
        is_resumed: bool,
    ) -> None:
        self._folder, self._record = folder, dict(record)
        self._every, self._is_resumed = every, is_resumed
        self._lock = -1
        self._saved = time.monotonic()

    def restore(
        self, into: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the last part that was saved, if there is one.

        Args:
            into: Tensors of that part, which get its values.

        Returns:
            Its other tensors, and its numbers.

        Raises:
            CheckpointError: It cannot be read, or another process works on it.
            ConfigError: It is of another pass.
        """
        last, own = on_main(self._last), _own_name()
        return None if last is None else in_step(lambda: self._read(last / own, into))

    def save_if_due(self, number: int, tensors: Mapping[str, Tensor], numbers: object) -> None:
        """Save a part, if it is time for one.

        Args:
            number: How many rounds have been made; larger than for the last part.
            tensors: This process's tensors, float32.
            numbers: What else it needs, as JSON.

        Raises:
            CheckpointError: It cannot be written.
        """
        if not on_main(lambda: time.monotonic() - self._saved >= self._every):
            return
        own = self._folder / _NEW / _own_name()
        on_main(lambda: self._guarded(self._make_room))
        in_step(lambda: self._guarded(lambda: _write(own, tensors, numbers)))
        on_main(lambda: self._guarded(lambda: self._publish(number)))
        self._saved = time.monotonic()

    def close(self, *, is_done: bool) -> None:
        """Give the folder up, in the process that holds it; remove it where nobody needs it."""
        if self._lock >= 0:
            if is_done or not parts_in(self._folder):
                shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def _last(self) -> Path | None:
        """The last part; the folder is claimed if it is there."""
        if not os.path.lexists(self._folder):
            return None
        self._guarded(self._claim)
        parts = parts_in(self._folder)
        if not self._is_resumed or not parts:
            for part in parts:
                shutil.rmtree(part)
            return None
        self._refuse_other_record()
        return parts[-1]

    def _refuse_other_record(self) -> None:
        path = self._folder / _RECORD
        found = call(f"{path}: cannot be read", lambda: parse_json(read_text(path)), AGAIN)
        old = found if isinstance(found, dict) else {}
        for name, value in self._record.items():
            before = old.get(name)
            if before == value:
                continue
            is_hash = len(str(value)) == _HASH
            differs = (
                f"{name} differ" if is_hash else f"{name} was {shown(before)} and is {value!r}"
            )
            raise ConfigError(
                f"'{self._folder}' is of another estimate: {differs}. Repeat what it began with, "
                f"or {AGAIN[0].lower()}{AGAIN[1:]}"
            )

    def _claim(self) -> None:
        if self._lock >= 0:
            return
        make_own_folder(self._folder)
        lock = open_lock(self._folder / _LOCK, os.O_CREAT)
        if not try_lock(lock):
            os.close(lock)
            raise CheckpointError(
                f"{self._folder}: another process makes this estimate. Wait for it, or stop it."
            )
        self._lock = lock

    def _make_room(self) -> None:
        self._claim()
        new = self._folder / _NEW
        if os.path.lexists(new):  # left by a process that was killed
            shutil.rmtree(new)
        if not parts_in(self._folder):
            write_own(self._folder / _RECORD, json.dumps(self._record))
        make_own_folder(new)

    def _publish(self, number: int) -> None:
        new, old = self._folder / _NEW, parts_in(self._folder)
        sync_path(new)
        os.rename(new, self._folder / f"part-{number:09d}")
        sync_path(self._folder)
        for part in old:
            shutil.rmtree(part)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: the state of the estimate cannot be saved "
                f"({error.strerror or error}). Free some space, choose another -o, or save it less "
                "often (--save-every)."
            ) from None

    def _read(
        self, path: Path, into: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
            others = {}
            with SafetensorsSource([path]) as source:
                numbers = parse_json(source.metadata[_NUMBERS])
                if not into.keys() <= source.specs.keys() or not isinstance(numbers, dict):
                    raise ValueError("it lacks tensors or numbers")
                for name in source.specs:
                    tensor = torch.from_numpy(read_tensor(source, name))
                    if name in into:
                        into[name].copy_(tensor.view_as(into[name]))
                    else:
                        others[name] = tensor
            return others, numbers

        try:
            return read()
        except (CheckpointError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: is no saved state that can be read ({reason(error)}). {AGAIN}"
            ) from None


def _own_name() -> str:
    """The name of this process's file; inside of `in_step` a process does not know the others."""
    return f"rank-{own_number()}-of-{world()}"


def _write(path: Path, tensors: Mapping[str, Tensor], numbers: object) -> None:
    specs = {name: TensorSpec("F32", tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsSink(path, specs, {_NUMBERS: json.dumps(numbers)}, shared=True) as sink:
        for name, tensor in tensors.items():
            sink.write_bytes(name, 0, encode(tensor.detach().cpu().numpy().reshape(-1), "F32"))
        sink.sync()
