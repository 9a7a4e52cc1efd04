"""From what a person types to a local file or folder: a path, or `org/name[@revision]` of the Hub.

A revision is looked up once a process, so that all files of one command are of one commit. Only
files that match the patterns are fetched, into huggingface_hub's cache, whose own settings hold
(`HF_HOME`, `HF_HUB_OFFLINE`, the token).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.side_files import FETCHED
from mergekit_bayes.errors import CheckpointError, nearest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]+|(?<=Bearer )\S+")
CHECKPOINT = (*FETCHED, "model*.safetensors", "adapter*.safetensors")
POSTERIOR = ("posterior/*",)
PRECISION = ("posterior/*", "precision*")
_COMMITS: dict[
    tuple[str, str, str], Any
] = {}  # the client's ResolvedRevision, by repository, type and revision


class RemoteTensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class RemoteFile(NamedTuple):
    """A safetensors file on the Hub, as far as its header says: tensors by name, and the file's
    metadata.
    """

    name: str
    bytes: int
    tensors: Mapping[str, RemoteTensor]
    metadata: Mapping[str, str]


def is_hub_id(ref: str) -> bool:
    """True if `ref` is no local path and has the form `org/name[@revision]`."""
    return (
        not Path(ref).exists()
        and not ref.startswith(("/", ".", "~"))
        and bool(_HUB_ID.fullmatch(ref))
    )


def resolve(ref: str, patterns: tuple[str, ...] = CHECKPOINT, repo_type: str = "model") -> Path:
    """The local file or folder of `ref`; of a Hub id, the files that match `patterns` are fetched.

    Without a pattern that names a folder nothing in folders is fetched. Raises `CheckpointError`
    when there is neither such a path nor such a repository, with the way to it.
    """
    path = Path(ref).expanduser()
    if path.exists():
        return path
    _refuse_paths(ref)
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
    except Exception as error:  # the client's many errors
        raise CheckpointError(explain(error, ref) + _nearby(path)) from None
    return Path(folder)


def _nearby(path: Path) -> str:
    """What a mistyped local path may have meant, where its folder is there."""
    if not path.parent.is_dir():
        return ""
    name = nearest(path.name, (p.name for p in path.parent.iterdir()))
    return f" If a local path was meant: did you mean '{path.parent / name}'?" if name else ""


def file_sizes(ref: str, repo_type: str = "model") -> dict[str, int]:
    """Sizes of a Hub repository's files by path, without fetching any. Raises `CheckpointError` as
    `resolve` does.
    """
    _refuse_paths(ref)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.hf_api import RepoFile

    repo = ref.partition("@")[0]
    try:
        revision = _commit(ref, repo_type)
        if is_offline_mode():
            folder = Path(
                snapshot_download(
                    repo, repo_type=repo_type, revision=revision, allow_patterns=["-"]
                )
            )
            files = (p for p in folder.rglob("*") if p.is_file())
            return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        tree = HfApi().list_repo_tree(
            repo, repo_type=repo_type, revision=revision.resolved, recursive=True
        )
        return {f.path: f.size for f in tree if isinstance(f, RepoFile)}
    except Exception as error:
        raise CheckpointError(explain(error, ref)) from None


def read_headers(ref: str, names: tuple[str, ...]) -> tuple[RemoteFile, ...]:
    """Headers of safetensors files on the Hub, by ranged requests: no tensor is read and nothing is
    stored.

    Raises `CheckpointError` as `resolve` does.
    """
    from huggingface_hub import HfApi

    sizes, repo = file_sizes(ref), ref.partition("@")[0]
    found = []
    try:
        for name in names:
            header = HfApi().parse_safetensors_file_metadata(repo, name, revision=commit_of(ref))
            tensors = {
                n: RemoteTensor(str(t.dtype), tuple(t.shape)) for n, t in header.tensors.items()
            }
            found.append(RemoteFile(name, sizes[name], tensors, dict(header.metadata or {})))
    except Exception as error:
        raise CheckpointError(explain(error, ref)) from None
    return tuple(found)


def commit_of(ref: str, repo_type: str = "model") -> str:
    """The commit that a Hub id means in this process. Raises `CheckpointError` as `resolve` does."""
    _refuse_paths(ref)
    try:
        return str(_commit(ref, repo_type).resolved)
    except Exception as error:
        raise CheckpointError(explain(error, ref)) from None


def commit_in(ref: str, path: Path) -> str | None:
    """The commit of a Hub id that `resolve` brought to `path`; None for a local path."""
    parts = path.parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" and is_hub_id(ref) else None


def pinned(ref: str, path: Path | None = None) -> str:
    """`ref` as it will mean the same tomorrow: a Hub id with its commit, a local path as it is.

    Without the `path` that `resolve` gave, the Hub is asked for the commit, once a process.
    """
    commit = (
        commit_in(ref, path) if path is not None else commit_of(ref) if is_hub_id(ref) else None
    )
    return ref if commit is None else f"{ref.partition('@')[0]}@{commit}"


def forget(repo: str) -> None:
    """Look a repository's revisions up anew, since it was written to."""
    for key in [k for k in _COMMITS if k[0] == repo]:
        del _COMMITS[key]


def explain(error: Exception, ref: str) -> str:
    """What an error of the Hub's client means for `ref`, and the way out; never with the token in
    it.
    """
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "error while uploading", from the error itself
    repo = ref.partition("@")[0]
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"'{ref}' is gated: ask for access at {constants.ENDPOINT}/{repo}, log in with `hf "
            "auth login` as the one "
            "who has it, and run the same line again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"'{ref}': '{repo}' has no such branch, tag or commit. Name one that {constants.ENDPOINT}/{repo} lists."
    if (
        status == 401
        and get_token() is None
        and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return f"'{ref}': you are not logged in. Log in with `hf auth login`, or set HF_TOKEN."
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"'{ref}': the Hub does not accept your token. Log in anew with `hf auth login`, or mend HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"'{ref}': no such local path, and the Hub has no such repository or keeps it from "
            "you. Check the name; if "
            "it is private, log in with `hf auth login`."
        )
    if status == 403:
        return (
            f"'{ref}': your token has no right to do this. Use one with write access to "
            f"'{repo.partition('/')[0]}' "
            "(`hf auth login`), or a name under your own account."
        )
    if constants.is_offline_mode():
        return (
            f"'{ref}': no such local path, not (or not wholly) in the Hub's cache, and offline "
            "mode is on. Unset "
            "HF_HUB_OFFLINE, or fetch it first where there is a network: `hf download`."
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    ):
        return f"'{ref}': reading or writing failed here ({error.strerror}). Mend that and run the same line again."
    if (
        status is None and isinstance(error, (OSError, errors.RevisionResolutionError))
    ) or _is_connection(error):
        return (
            f"'{ref}': the connection to {constants.ENDPOINT} failed ({_reason(error)}). Check the "
            "network and run the "
            "same line again: what has arrived is kept."
        )
    return f"'{ref}': the Hub answered with an error ({type(error).__name__}: {_reason(error)})."


def _is_connection(error: Exception) -> bool:
    names = {c.__name__ for c in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutException", "ProtocolError"})


def _reason(error: Exception) -> str:
    from huggingface_hub import get_token

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines or [type(error).__name__])
    if token := get_token():
        text = text.replace(token, "...")
    return _TOKEN.sub("...", text)[:300]  # cut last: no part of a token would be found


def _refuse_paths(ref: str) -> None:
    if not is_hub_id(ref) or ref.endswith((".safetensors", ".json", ".jsonl", ".yaml")):
        raise CheckpointError(
            f"'{ref}': no such file or folder, and not a Hub id (org/name or org/name@revision)."
        )


def _commit(ref: str, repo_type: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    repo, _, revision = ref.partition("@")
    key = (repo, repo_type, revision)
    if key not in _COMMITS:
        _COMMITS[key] = HfApi().resolve_revision(
            repo, repo_type=repo_type, revision=revision or None, local_files_only=is_offline_mode()
        )
    return _COMMITS[key]
