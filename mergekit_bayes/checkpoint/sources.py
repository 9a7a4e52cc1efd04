"""From what a user types to a local file or folder: a path, or `org/name[@revision]` of the Hub.

A revision is resolved once a process, so that all files of one command are of one commit. Only
files that match the patterns are fetched, into huggingface_hub's cache, whose own settings apply
(`HF_HOME`, `HF_HUB_OFFLINE`, the token).
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.hub_client import HubError, is_commit, prepare
from mergekit_bayes.checkpoint.hub_errors import asking, explain
from mergekit_bayes.checkpoint.side_files import FETCHED
from mergekit_bayes.errors import CheckpointError, nearest, shown

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision

CHECKPOINT = (*FETCHED, "model*.safetensors", "adapter*.safetensors")
POSTERIOR = ("posterior/*",)
PRECISION = ("posterior/*", "precision*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_FILE_ENDINGS = (".safetensors", ".json", ".jsonl", ".yaml")  # of no repository's name
_COMMITS: "dict[tuple[str, str, str], ResolvedRevision]" = {}  # by repository, type and revision


def is_hub_id(ref: str) -> bool:
    """Whether `ref` has the form `org/name[@revision]` and no local path of that name exists."""
    return (
        not os.path.exists(os.path.expanduser(ref))  # False for a name that no file can have
        and not ref.startswith(("/", ".", "~"))
        and bool(_HUB_ID.fullmatch(ref))
    )


def resolve(ref: str, patterns: tuple[str, ...] = CHECKPOINT, repo_type: str = "model") -> Path:
    """The local file or folder of `ref`; files of a Hub id are fetched first.

    Args:
        ref: A local path or `org/name[@revision]`.
        patterns: Files to fetch from the Hub; empty for all. Files in folders are fetched only if
            a pattern names a folder.
        repo_type: `model` or `dataset`.

    Raises:
        CheckpointError: There is neither such a path nor such a repository, or the Hub refused;
            the message has a remedy.
    """
    path = Path(os.path.expanduser(ref))
    if os.path.exists(path):
        return path
    _refuse_paths(ref)
    prepare()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            ref.partition("@")[0],
            repo_type=repo_type,
            revision=_commit(ref, repo_type),
            allow_patterns=list(patterns) or None,
            # '*' matches '/', too: a merge by equal weights needs no posterior/posterior.json.
            ignore_patterns=["*/*"] if patterns and not any("/" in p for p in patterns) else None,
        )
    except Exception as error:  # the client raises errors of many libraries
        raise CheckpointError(explain(error, ref) + _neighbour(path)) from None
    return Path(folder)


def commit_of(ref: str, repo_type: str = "model") -> str:
    """The commit that a Hub id means in this process.

    Raises:
        CheckpointError: As `resolve`.
    """
    _refuse_paths(ref)
    with asking(ref):
        return str(_commit(ref, repo_type).resolved)


def commit_in(ref: str, path: Path) -> str | None:
    """The commit of a Hub id that `resolve` fetched to `path`; None for a local path."""
    parts = path.parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" and is_hub_id(ref) else None


def pinned(ref: str, path: Path | None = None) -> str:
    """A reference that means the same at any time: a Hub id with its commit, or a local path.

    Args:
        ref: A local path or `org/name[@revision]`.
        path: What `resolve` returned for it. Without it the Hub is asked for the commit.

    Raises:
        CheckpointError: As `resolve`.
    """
    if path is not None:
        commit = commit_in(ref, path)
    else:
        commit = commit_of(ref) if is_hub_id(ref) else None
    return ref if commit is None else f"{ref.partition('@')[0]}@{commit}"


def forget(repo: str) -> None:
    """Resolve a repository's revisions again from now on, since it was written to."""
    for key in [key for key in _COMMITS if key[0] == repo]:
        del _COMMITS[key]


def _neighbour(path: Path) -> str:
    """A hint at the file or folder that a mistyped local path may have meant."""
    try:
        name = nearest(path.name, (p.name for p in path.parent.iterdir()))
    except OSError:
        return ""
    meant = shown(str(path.parent / (name or "")))
    return f" If a local path was meant: did you mean {meant}?" if name else ""


def _refuse_paths(ref: str) -> None:
    # A revision is a path below the cache's `refs`, where its commit is written down.
    leaves = any(part in ("", ".", "..") for part in re.split("[@/]", ref))
    if not is_hub_id(ref) or ref.endswith(_FILE_ENDINGS) or leaves:
        _refuse_pair(ref)
        raise CheckpointError(
            f"{shown(ref)}: no such file or folder, and not a Hub id (org/name or "
            "org/name@revision)."
        )


def _refuse_pair(ref: str) -> None:
    """Refuse `BASE+ADAPTER` where one model is read."""
    for plus in re.finditer(r"\+", ref):
        base, adapter = ref[: plus.start()], ref[plus.end() :]
        if all(
            is_hub_id(one) or os.path.exists(os.path.expanduser(one)) for one in (base, adapter)
        ):
            raise CheckpointError(
                f"{shown(ref)}: one folder is expected here, and not BASE+ADAPTER. Name the "
                f"adapter's, {shown(adapter)}, whose config knows its base; or fold it first: "
                f"`bmerge merge {ref} -o WHOLE`."
            )


def _commit(ref: str, repo_type: str) -> "ResolvedRevision":
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    repo, _, revision = ref.partition("@")
    key = (repo, repo_type, revision)
    if key not in _COMMITS:
        _check_note(repo, repo_type, revision or "main")
        found = HfApi().resolve_revision(
            repo, repo_type=repo_type, revision=revision or None, local_files_only=is_offline_mode()
        )
        if not is_commit(found.resolved):
            raise HubError(
                f"{shown(found.resolved)} is given as the commit of '{revision or 'main'}', and is "
                "none. Either the Hub says so, or the cache's note under `refs` is damaged: remove "
                "it there."
            )
        _COMMITS[key] = found
    return _COMMITS[key]


def _check_note(repo: str, repo_type: str, revision: str) -> None:
    """Refuse a cache whose note of a revision's commit is no file; a pipe would be waited for."""
    from huggingface_hub import constants

    folder = f"{repo_type}s--{repo.replace('/', '--')}"
    note = Path(constants.HF_HUB_CACHE).expanduser() / folder / "refs" / revision
    if note.exists() and not note.is_file():
        raise HubError(f"the cache's note {shown(str(note))} is not a file: remove it.")
