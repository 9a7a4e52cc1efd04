"""A model folder to the Hub, in one commit, so that nobody ever sees half of it.

Only files that belong to a model go (an allowlist); what stays behind is said. Large files arrive
before the commit and are kept by the Hub, so the same line resumes an interrupted push; a folder
that is there already makes no commit. The token comes from huggingface_hub's own places and is
passed on by it; this module never sees it.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.sources import explain, forget
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.hub.card import Card, is_generated, make_card
from mergekit_bayes.hub.facts import parents
from mergekit_bayes.hub.files import (
    ADAPTER_FILE,
    CARD,
    MODEL_FILE,
    PushFile,
    choose_files,
    is_stale,
)
from mergekit_bayes.hub.licenses import hub_licenses, local_licenses
from mergekit_bayes.records import Config

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PushPlan(NamedTuple):
    """What would be pushed: files, the card, what is left out and why, and what a person should
    know.
    """

    repo: str
    folder: Path
    files: tuple[PushFile, ...]
    card: str
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


class PushReport(Config):
    """What a push did.

    Attributes:
        commit: Of the repository, the one before if nothing had changed.
        changed: Whether there was anything to commit.
        sent, unchanged, deleted: Paths in the repository. Deleted are shards, precisions and
            records of other weights.
        pull_request: Its address, where one was asked for.
        left_out: Files of the folder that do not belong to a model, with the reason.
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


def plan_push(
    folder: Path, repo: str, *, posterior: bool = True, only_posterior: bool = False
) -> PushPlan:
    """What `push_folder` would push. Contacts nobody, so licences of parents on the Hub are not in
    the card.

    Raises:
        CheckpointError: No such folder, or neither a model nor a precision in it.
        ConfigError: A name that is not `org/name`, or options that leave nothing.
        PrecisionError: A precision of other weights than those beside it, by all bytes where they
            were recorded.
    """
    check_target(repo)
    files, left_out, notes = choose_files(
        folder, posterior=posterior, only_posterior=only_posterior
    )
    licenses = local_licenses(parents(folder, posterior_only=only_posterior))
    card = make_card(
        folder,
        repo=repo,
        existing=_own_card(folder, only=only_posterior),
        licenses=licenses,
        posterior=posterior,
        posterior_only=only_posterior,
    )
    return _planned(folder, repo, files, card, left_out, notes)


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    posterior: bool = True,
    only_posterior: bool = False,
    say: Callable[[str], None] | None = None,
) -> PushReport:
    """Push a model folder and its posterior to `org/name`, which is made if it is not there.

    Args:
        folder: As `bmerge` or save_pretrained wrote it; or a folder with nothing but a precision.
            It is not changed.
        repo: `org/name`.
        private: For a repository that is made. A public one that exists is refused.
        revision: A branch, made from main if it is not there.
        create_pr: Open a pull request on a repository that exists, instead of committing.
        message: Of the commit.
        posterior: False leaves the posterior at home.
        only_posterior: Push nothing else, so that anybody can publish a precision of a model that
            they do not own.
        say: Called before the commit with a line for each file that it deletes.

    Raises:
        CheckpointError: As `plan_push`; a model over an adapter or the reverse; or the Hub refused,
            with the way out.
        ConfigError: As `plan_push`.
        PrecisionError: As `plan_push`.
    """
    check_target(repo)
    if create_pr and revision not in (None, "main"):
        raise ConfigError(
            "--create-pr opens a pull request on main; leave --revision out, or push to the branch."
        )
    files, left_out, notes = choose_files(
        folder, posterior=posterior, only_posterior=only_posterior
    )
    make_card(
        folder,
        repo=repo,
        existing=_own_card(folder, only=only_posterior),
        posterior=posterior,
        posterior_only=only_posterior,
    )  # what it refuses, it refuses before a repository is made
    with _answers(repo):
        return _push(
            _Target(repo, revision or "main", private, create_pr, message),
            folder,
            files,
            left_out,
            notes,
            posterior=posterior,
            only=only_posterior,
            say=say,
        )


def check_target(repo: str) -> None:
    """Raise `ConfigError` unless `repo` can be the name of a repository."""
    if not _NAME.fullmatch(repo):
        more = " The branch goes into --revision." if "@" in repo else ""
        raise ConfigError(f"'{repo}' is not the name of a repository on the Hub (org/name).{more}")


def check_login(repo: str) -> None:
    """Ask the Hub who we are, before work that is to be pushed to `repo`; raises what a push would.

    What a fine-grained token may do only the push finds out.
    """
    from huggingface_hub import HfApi

    check_target(repo)
    with _answers(repo):
        me = HfApi(library_name="mergekit-bayes").whoami()
    owner, token = (
        repo.partition("/")[0].casefold(),
        ((me.get("auth") or {}).get("accessToken") or {}).get("role"),
    )
    # A member who reads may yet write to some resource group.
    groups = {
        o["name"].casefold()
        for o in me.get("orgs") or ()
        if o.get("roleInOrg") != "read" or "resourceGroups" in o
    }
    if token == "read":
        raise CheckpointError(
            f"'{repo}': your token can only read. Make one that writes and log in with hf auth "
            "login."
        )
    if token == "write" and owner not in groups | {me["name"].casefold()}:
        raise CheckpointError(
            f"'{repo}': you are logged in as '{me['name']}', who may not write to "
            f"'{repo.partition('/')[0]}'. Push to "
            f"'{me['name']}/{repo.partition('/')[2]}', or log in as somebody who may."
        )


class _Target(NamedTuple):
    repo: str
    revision: str
    private: bool
    create_pr: bool
    message: str | None


class _Remote(NamedTuple):
    size: int
    sha1: str
    sha256: str | None  # of a large file


def _push(
    target: _Target,
    folder: Path,
    files: list[PushFile],
    left_out: Mapping[str, str],
    notes: list[str],
    *,
    posterior: bool,
    only: bool,
    say: Callable[[str], None] | None,
) -> PushReport:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo = HfApi(library_name="mergekit-bayes"), target.repo
    _prepare(api, target)
    head, is_new = _head(api, target)
    there = _listing(api, repo, head)
    if not only:
        _check_kind(target, [f.path for f in files], there)
    existing = _own_card(folder, only=only)
    if not existing and CARD in there:  # somebody's text on the Hub is kept, too
        existing = Path(api.hf_hub_download(repo, CARD, revision=head)).read_text()
    licenses = hub_licenses(api, parents(folder, posterior_only=only))
    card = make_card(
        folder,
        repo=repo,
        existing=existing,
        licenses=licenses,
        posterior=posterior,
        posterior_only=only,
    )
    plan = _planned(folder, repo, files, card, left_out, notes)
    if is_new:
        api.create_branch(repo, branch=target.revision, exist_ok=True)
    sent, unchanged = [], []
    for file in plan.files:
        content: Any = plan.card.encode() if file.source is None else str(file.source.resolve())
        add = CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=content)
        if _is_same(add, there.get(file.path)):
            unchanged.append(file.path)
        else:
            sent.append(add)
    new = {f.path for f in plan.files}
    weights = any(re.fullmatch(r"[^/]+\.safetensors", add.path_in_repo) for add in sent)
    stale = [
        p for p in there if p not in new and is_stale(p, weights=weights, pushed=new, only=only)
    ]
    if say is not None:
        for path in stale:
            say(f"  deletes   {path}: it does not belong to what is pushed")
    commit, pull_request = head, None
    if sent or stale:
        operations: list[Any] = [
            *sent,
            *(CommitOperationDelete(path_in_repo=p, is_folder=False) for p in stale),
        ]
        done = api.create_commit(
            repo,
            operations,
            commit_message=target.message
            or ("Posterior" if only else "Model") + ", pushed by bmerge",
            revision=None if target.create_pr else target.revision,
            create_pr=target.create_pr,
            parent_commit=head,
        )
        commit, pull_request = str(done.oid), done.pr_url
        forget(repo)
    sizes = {f.path: f.size for f in plan.files}
    return PushReport(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=commit,
        revision=target.revision,
        changed=bool(sent or stale),
        sent=tuple(a.path_in_repo for a in sent),
        unchanged=tuple(unchanged),
        deleted=tuple(stale),
        bytes=sum(sizes[a.path_in_repo] for a in sent),
        pull_request=pull_request,
        left_out=dict(plan.left_out),
        notes=plan.notes,
    )


def _prepare(api: Any, target: _Target) -> None:
    """The repository, made if it is not there."""
    if not target.create_pr:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    if target.private and not api.repo_info(target.repo).private:
        raise CheckpointError(
            f"'{target.repo}' exists and is public, so --private would not hold. Make it private "
            "on the Hub first, or "
            "push without --private."
        )


def _head(api: Any, target: _Target) -> tuple[str, bool]:
    """The commit to build on, and whether the branch is still to be made (from main)."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return str(api.repo_info(target.repo, revision=target.revision).sha), False
    except RevisionNotFoundError:
        if target.revision == "main" or target.revision.startswith("refs/"):
            raise
        return str(api.repo_info(target.repo).sha), True


def _listing(api: Any, repo: str, commit: str) -> dict[str, _Remote]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, revision=commit, recursive=True)
    return {
        f.path: _Remote(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None)
        for f in tree
        if isinstance(f, RepoFile)
    }


def _is_same(add: Any, remote: _Remote | None) -> bool:
    if remote is None or remote.size != add.upload_info.size:
        return False
    if remote.sha256 is not None:
        return bool(add.upload_info.sha256.hex() == remote.sha256)
    with add.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.sha1


def _check_kind(target: _Target, pushed: list[str], there: Mapping[str, _Remote]) -> None:
    """Beside each other a model and an adapter break loaders, and replacing one by the other is a
    person's choice.
    """
    is_adapter = any(p.startswith("adapter_model") for p in pushed)
    other, ours, theirs = (
        (MODEL_FILE, "an adapter", "a model")
        if is_adapter
        else (ADAPTER_FILE, "a model", "an adapter")
    )
    config = () if is_adapter or "adapter_config.json" in pushed else ("adapter_config.json",)
    found = next((p for p in there if other.fullmatch(p) or p in config), None)
    if found is not None:
        raise CheckpointError(
            f"'{target.repo}' ({target.revision}) holds {theirs} ({found}), and this is {ours}; "
            "nothing was changed. "
            "Push to another repository, or with --revision to a branch that holds none (a new one "
            "begins as main)."
        )


def _own_card(folder: Path, *, only: bool) -> str:
    """The folder's card, if it says a person's word or ours; a model's is not that of its posterior
    alone.
    """
    file = folder / CARD
    if not file.is_file() or (only and not list(folder.glob("precision*.safetensors"))):
        return ""
    text = file.read_text()
    return "" if is_generated(text) else text


def _planned(
    folder: Path,
    repo: str,
    files: list[PushFile],
    card: Card,
    left_out: Mapping[str, str],
    notes: list[str],
) -> PushPlan:
    whole = [PushFile(CARD, None, len(card.text.encode())), *files]
    return PushPlan(repo, folder, tuple(whole), card.text, left_out, (*card.notes, *notes))


@contextmanager
def _answers(repo: str) -> Iterator[None]:
    """Errors of the client as one message with the way out, without a traceback that might show
    what it sent.
    """
    try:
        yield
    except BmergeError:
        raise
    except Exception as error:
        raise CheckpointError(explain(error, repo)) from None
