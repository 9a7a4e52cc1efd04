"""Trust on first use: what a panel's member was is recorded then, and enforced afterwards.

The record is a lock file: `panel.lock.json` beside `panel.yaml`, and for the panels of this package
in a folder of the user's. It holds the commit and the SHA-256 of all files that decide scores. A
Hub id is loaded at the recorded commit from then on, wherever its branch has gone. To accept
something new, the member's entry, or the file, is removed by hand.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import content_hash
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.locks import attempts, open_lock, try_lock
from mergekit_bayes.checkpoint.own_files import make_own_folder
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import group_of
from mergekit_bayes.checkpoint.sources import commit_in, resolve
from mergekit_bayes.checkpoint.stamps import Stamp, stamps_of
from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.evaluate.panels import PanelMember
from mergekit_bayes.evaluate.report import Pin
from mergekit_bayes.models.limits import ADAPTER_CONFIG, CONFIG
from mergekit_bayes.records import Frozen

_INDEX = ".safetensors.index.json"


class Lock(Frozen):
    """The content of a lock file.

    Attributes:
        members: What was found at the first use of each member.
    """

    members: dict[str, Pin] = {}


class Pinned(NamedTuple):
    """A member whose files are those of its first use.

    Attributes:
        path: The folder of its model.
        pin: What was found.
        stamps: Its files as they were when they were hashed, to be compared once they are loaded.
    """

    path: Path
    pin: Pin
    stamps: Mapping[Path, Stamp]


def open_pinned(member: PanelMember) -> Pinned:
    """Fetch a member and compare it with the record of its first use, if there is one.

    Raises:
        CheckpointError: It is not what it was at its first use, or cannot be read; or the record
            cannot be read.
        ConfigError: The model is an adapter, or it is not clear which one is meant.
    """
    recorded = _read(member.lock).members.get(member.name)
    if recorded is not None:
        _compare_model(member, recorded)
    path = _fetch(member, recorded)
    files = {file.name: file for file in _deciding_files(path)}
    stamps = stamps_of(files.values())
    pin = Pin(
        model=member.settings.model,
        commit=commit_in(member.ref, path),
        files={name: content_hash(file) for name, file in sorted(files.items())},
    )
    if recorded is not None:
        _compare(member, recorded, pin)
    return Pinned(path, pin, stamps)


def keep(member: PanelMember, pin: Pin) -> None:
    """Record the first use of a member that was opened; of a later use nothing is changed.

    What cannot be opened is not recorded: the panel is corrected, and there has been no use yet.

    Raises:
        CheckpointError: The record cannot be written, or another process has recorded something
            else meanwhile.
    """
    if member.name not in _read(member.lock).members:
        _compare(member, _record(member, pin), pin)


def _fetch(member: PanelMember, recorded: Pin | None) -> Path:
    """The folder of a member's model, at the commit of its first use."""
    ref = member.ref
    if member.on_hub and os.path.exists(ref):
        raise ConfigError(
            f"scorer '{member.spec}': '{ref}' is a Hub id for the panel, and a folder where this "
            "command runs. Run it elsewhere, or give the panel the path of the folder."
        )
    if member.on_hub and recorded is not None and recorded.commit is not None:
        ref = f"{ref.partition('@')[0]}@{recorded.commit}"
    try:
        path = resolve(ref)
    except CheckpointError as error:
        raise CheckpointError(f"scorer '{member.spec}': {error}") from None
    if path.is_file():
        raise ConfigError(
            f"scorer '{member.spec}': '{ref}' is a file. Name the folder with its config and "
            "tokenizer."
        )
    if (path / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"scorer '{member.spec}': '{ref}' is an adapter, whose base decides scores as well and "
            "would not be recorded. Merge it into its base and name the result."
        )
    return path


def _deciding_files(path: Path) -> list[Path]:
    """The files of a classifier's folder that its scores depend on."""
    beside = [
        file
        for file in sorted(path.iterdir())
        if file.name == CONFIG
        or file.name.endswith((_INDEX, ".py"))
        or group_of(Path(file.name)) == "tokenizer"
    ]
    return [*checkpoint_files(path), *beside]


def _compare_model(member: PanelMember, recorded: Pin) -> None:
    """Refuse another model than the recorded one; the recorded commit of it may be named now."""
    now = member.settings.model
    pinned = f"{recorded.model.partition('@')[0]}@{recorded.commit}"
    if now not in (recorded.model, pinned):
        raise _changed(member, "the panel names another model", recorded.model, now)


def _compare(member: PanelMember, recorded: Pin, found: Pin) -> None:
    if found.commit != recorded.commit:
        what = "its repository is at another commit"
        raise _changed(member, what, str(recorded.commit), str(found.commit))
    for name in sorted({*recorded.files, *found.files}):
        before, now = recorded.files.get(name), found.files.get(name)
        if before != now:
            raise _changed(
                member,
                f"its {name} is not the same",
                f"SHA-256 {before}" if before else "no such file",
                f"SHA-256 {now}" if now else "none",
            )


def _changed(member: PanelMember, what: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"scorer '{member.spec}' is not what it was at its first use: {what}. Expected {expected}, "
        f"found {found}. To accept what is there now, remove the entry '{member.name}' from "
        f"{member.lock}, or the whole file; the next use records it anew."
    )


def _read(lock: Path) -> Lock:
    if not os.path.lexists(lock):
        return Lock()
    return read_record(
        Lock, lock, "Correct it; or remove it, and the next use records anew what it finds."
    )


def _record(member: PanelMember, pin: Pin) -> Pin:
    """Write what was found at the first use, unless another process has; what is recorded now."""
    lock = member.lock
    try:
        if not lock.parent.is_dir():
            make_own_folder(lock.parent, 0o700)
        with _held(lock):
            members = _read(lock).members
            if member.name not in members:
                content = Lock(members={**members, member.name: pin})
                with replacing(lock, force=True) as unfinished:
                    unfinished.write_text(content.model_dump_json(indent=2) + "\n")
                return pin
            return members[member.name]
    except OSError as error:
        reason = error.strerror or str(error)
    except CheckpointError as error:
        reason = str(error)
    raise CheckpointError(
        f"{lock}: the first use of '{member.spec}' cannot be recorded ({reason}). Copy the panel "
        "to a folder where you can write; for a panel of this package set BMERGE_HOME to one."
    )


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Keep other processes from changing a lock file, by a file beside it that exists meanwhile."""
    path = lock.with_name(f".{lock.name}.held")
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path) -> int:
    """The descriptor of a file that only this process has locked."""
    for _ in attempts():
        file = open_lock(path, os.O_CREAT)
        # Whoever held it before has removed its name, perhaps after this process opened it.
        if try_lock(file) and _has_name(file, path):
            return file
        os.close(file)
    raise CheckpointError(f"another process holds {path}, or there are no locks on this disk")


def _has_name(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False
