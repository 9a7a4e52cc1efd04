"""What a push would do (`PushPlan`), and what it did (`PushReport`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.hub.files import PushFile
from mergekit_bayes.records import Frozen


class PushPlan(NamedTuple):
    """What would be pushed.

    Attributes:
        repo: `org/name`.
        folder: The local folder.
        files: The files, the card first.
        card: The text of the card.
        left_out: Files of the folder that are not pushed, with the reason.
        notes: What the user should know before publishing.
    """

    repo: str
    folder: Path
    files: tuple[PushFile, ...]
    card: str
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


class PushReport(Frozen):
    """What a push did.

    Attributes:
        repo: `org/name`.
        url: Address of the repository.
        commit: Commit of the repository after the push, the one before if nothing had changed.
        revision: The branch.
        changed: Whether there was anything to commit.
        sent: Paths in the repository that were added or replaced.
        unchanged: Paths whose content was there already.
        deleted: Shards, precisions and records of other weights that were deleted.
        bytes: Bytes of the sent files.
        pull_request: Address of the pull request, where one was asked for.
        left_out: Files of the folder that do not belong to a model, with the reason.
        notes: What the user should know.
    """

    repo: str
    url: str
    commit: str
    revision: str
    changed: bool
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    bytes: int
    pull_request: str | None
    left_out: dict[str, str]
    notes: tuple[str, ...]
