"""The repository on the Hub that a push goes to: made, read, and compared with a folder."""

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.hub_client import HubError, is_commit
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.hub.files import ADAPTER_FILE, MODEL_FILE

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


class Target(NamedTuple):
    """Where a push goes, and how.

    Attributes:
        repo: `org/name`.
        revision: The branch.
        private: Whether a repository that the push makes is private.
        create_pr: Open a pull request instead of committing.
        message: Message of the commit; None for a default.
    """

    repo: str
    revision: str
    private: bool
    create_pr: bool
    message: str | None


class RemoteFile(NamedTuple):
    """A file of a repository.

    Attributes:
        size: Bytes.
        sha1: Its git hash.
        sha256: SHA-256 of its content; None for a file that is not stored as a large one.
    """

    size: int
    sha1: str
    sha256: str | None


def make_repository(api: "HfApi", target: Target) -> None:
    """Make the repository unless it exists; a pull request needs one that exists.

    Raises:
        CheckpointError: It exists and is public, though a private one is asked for.
    """
    if not target.create_pr:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if target.private and not api.repo_info(target.repo).private:
        raise CheckpointError(
            f"'{target.repo}' exists and is public, so --private would not hold. Make it private "
            "on the Hub first, or push without --private."
        )


def head_commit(api: "HfApi", target: Target) -> tuple[str, bool]:
    """The commit to build on, and whether the branch must still be made from main."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        found = api.repo_info(target.repo, revision=target.revision).sha
        return checked_commit(found), False
    except RevisionNotFoundError:
        if target.revision == "main" or target.revision.startswith("refs/"):
            raise
        return checked_commit(api.repo_info(target.repo).sha), True


def checked_commit(value: object) -> str:
    """What the Hub gives as a commit.

    Raises:
        HubError: It is none.
    """
    if not is_commit(value):
        raise HubError(f"the Hub gives {shown(value)} as a commit, which is none.")
    return str(value)


def list_files(api: "HfApi", repo: str, commit: str) -> dict[str, RemoteFile]:
    """The files of a repository by path; those without a usable hash count as others than ours."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, revision=commit, recursive=True)
    files = {}
    for file in tree:
        if isinstance(file, RepoFile):
            sha256 = file.lfs.sha256 if file.lfs else None
            files[file.path] = RemoteFile(file.size, str(file.blob_id), sha256 and str(sha256))
    return files


def is_unchanged(add: "CommitOperationAdd", remote: RemoteFile | None) -> bool:
    """Whether the repository has this very content under this path."""
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.sha256 is not None:
        return bool(add.upload_info.sha256.hex() == remote.sha256)
    with add.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.sha1


def check_same_form(
    target: Target, pushed: Collection[str], remote: Mapping[str, RemoteFile]
) -> None:
    """Refuse a model where an adapter lies, and an adapter where a model lies.

    Beside each other they break loaders, and only the user can say that one replaces the other.

    Raises:
        CheckpointError: The repository holds the other form.
    """
    if any(path.startswith("adapter_model") for path in pushed):
        pattern, ours, other = MODEL_FILE, "an adapter", "a model"
        config = None
    else:
        pattern, ours, other = ADAPTER_FILE, "a model", "an adapter"
        config = None if "adapter_config.json" in pushed else "adapter_config.json"
    match = next((path for path in remote if pattern.fullmatch(path) or path == config), None)
    if match is not None:
        raise CheckpointError(
            f"'{target.repo}' ({target.revision}) holds {other} ({match}), and this is {ours}; "
            "nothing was changed. Push to another repository, or with --revision to a branch that "
            "holds none (a new one begins as main)."
        )
